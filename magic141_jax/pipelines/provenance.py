"""What made a video or an image, kept in its metadata, and the same made again from that.

A file's metadata say all that its frames follow from: the prompts, the seed and every option with its value; how the
weights were loaded, and their digests; the first picture, if one was given. `make` reads nothing else, so that
what is written once can be written again. On the same kind of device, with the same versions of jax and of the
encoders, frames are equal; elsewhere sums are taken in another order.

A picture is embedded whole where its file is small. Of a larger one the metadata hold what it was cut to, if nothing
looks at it before it is cut, and else only its digest and where it was.
"""

from __future__ import annotations

import base64
import binascii
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image, UnidentifiedImageError

from magic141_jax import __version__, processes, sharding, weights
from magic141_jax.errors import UserError
from magic141_jax.pipelines import media
from magic141_jax.pipelines.components import DEFAULT, DEFAULT_FOLDER, find_folder
from magic141_jax.pipelines.image_to_video import fit_images
from magic141_jax.pipelines.long_video import stream_video
from magic141_jax.pipelines.options import SamplingOptions, resolve
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline

FORMAT = 2  # of the metadata; 1 had no such key, and no "loading"
OPTIONS = (
    *("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "shift", "sampler"),
    *("overlap_latents", "history_noise", "match_colors", "carry", "blend", "anchor"),
)
NEEDED = ("prompt", "seed", "frames", "fps", "upscale", "options", "weights_digest")
LOADING = ("weights", "revision", "image_weights", "lora", "lora_scale", "dtype", "offload", "vae_tiles")
MAX_PICTURE = 64 << 10  # bytes of a picture that is embedded
Progress = Callable[[str, int], None]


class Difference(NamedTuple):
    """How two files differ: the first frame, from 0, where they do, how many do, and by how much at most, of 255."""

    first: int
    frames: int
    largest: int


def describe(
    pipeline: TextToVideoPipeline,
    prompt: str,
    options: Mapping[str, Any],
    *,
    schedule: Sequence[tuple[float, str]] = (),
    frames: int,
    upscale: int = 1,
    loading: Mapping[str, Any],
    image: Path | None = None,
) -> dict[str, Any]:
    """What makes a video, JSON-ready.

    Args:
      pipeline: with which.
      prompt: what the first image shows.
      options: keyword options of the pipelines.
      schedule: further prompts by their seconds.
      frames: how many there are to be.
      upscale: how much larger they are written.
      loading: how the pipeline was loaded: by the names of `LOADING`, and "mesh", {axis: devices}, if it has one.
      image: the file that the first frame is from.
    """
    components = pipeline.components
    resolved = resolve(options, components)
    image_components = pipeline.text_to_image.engine.components
    device = next(iter(components.mesh.devices.flat)) if components.mesh is not None else jax.local_devices()[0]
    return {
        "format": FORMAT,
        "prompt": prompt,
        "prompt_schedule": [{"time": time, "prompt": text} for time, text in schedule],
        "negative_prompt": options.get("negative_prompt"),
        "image": image.name if image else None,
        "seed": options["seed"],
        "frames": frames,
        "fps": components.sampling.fps,
        "upscale": upscale,
        "options": {name: getattr(resolved, name) for name in OPTIONS},
        "weights": components.folder.name,
        "weights_digest": components.digest,
        "config_digest": components.config_digest,
        "image_weights_digest": None if image_components is components else image_components.digest,
        "lora_digest": weights.digest(Path(loading["lora"])) if loading.get("lora") else None,
        "loading": {name: str(x) if isinstance(x, Path) else x for name, x in loading.items()},
        "device": device.device_kind,
        "jax": jax.__version__,
        "version": __version__,
        **({} if image is None else _of_picture(image, pipeline, resolved)),
    }


def read(path: Path) -> dict[str, Any]:
    """What made a file: from its metadata, else from the .json beside it; `path` may be that one itself.

    Raises:
      UserError: no such file; neither has it, or it is incomplete, or of a newer version.
    """
    path, sidecar = Path(path), Path(path).with_suffix(".json")
    if not path.is_file():
        raise UserError(f"no file {path}")
    if path.suffix.lower() not in (".json", *media.FORMATS):
        raise UserError(f"{path} is none of {', '.join(media.FORMATS)}; what made other files is not known")
    try:
        about = weights.read_json(path) if path == sidecar else media.read_metadata(path)
    except UserError as error:
        if path == sidecar or not sidecar.is_file():
            beside = "" if path == sidecar else f", and there is no {sidecar.name} beside it"
            raise UserError(f"{error}{beside}: what made it is not known") from None
        about = weights.read_json(sidecar)
    if not isinstance(about, dict) or not isinstance(about.get("format", 1), int):
        raise UserError(f"the metadata of {path} are not ours: what made it is not known")
    if about.get("format", 1) > FORMAT:
        raise UserError(
            f"{path} was written by a newer version, {about.get('version')} (format {about['format']}; this is "
            f"{__version__}, which reads up to {FORMAT}): update magic141_jax"
        )
    missing = [name for name in NEEDED if name not in about]
    if missing:
        raise UserError(f"the metadata of {path} lack {', '.join(missing)}: what made it is not known")
    return about


def load(about: Mapping[str, Any], *, other_weights: bool = False, **places: Any) -> TextToVideoPipeline:
    """The pipeline that made a file.

    Args:
      about: see `read`.
      other_weights: whether weights may differ from those that made it.
      **places: where things are now: "weights", "image_weights" and "lora"; where not given, or None, where they were.

    Raises:
      UserError: weights that are not there, or whose digest differs.
    """
    was = dict(about.get("loading", {}))
    if "loading" not in about and about.get("weights") == DEFAULT_FOLDER.name:
        was["weights"] = DEFAULT
    was |= {name: str(place) for name, place in places.items() if place is not None}
    asked = {name: was[name] for name in LOADING if was.get(name) is not None}
    for name in ("weights", "image_weights"):
        digest = about.get(f"{name}_digest")
        if digest is not None:
            revision = asked.get("revision") if name == "weights" else None
            folder = _find(asked.get(name), about, name, revision)
            if not other_weights:
                _require_same(name, str(folder), weights.digest(folder), digest)
    if asked.get("lora"):
        if not Path(asked["lora"]).is_file():
            raise UserError(f"no file {asked['lora']}; say where the adapters are with --lora")
        if not other_weights:
            _require_same("lora", asked["lora"], weights.digest(Path(asked["lora"])), about.get("lora_digest"))
    mesh = sharding.make_mesh(sharding.MeshConfig(**was["mesh"])) if was.get("mesh") else None
    pipeline = TextToVideoPipeline.from_pretrained(asked.pop("weights"), mesh=mesh, **asked)
    config = about.get("config_digest")
    if config and not other_weights:
        folder = pipeline.components.folder
        _require_same("weights", f"the configuration of {folder}", pipeline.components.config_digest, config)
    return pipeline


def picture(about: Mapping[str, Any], given: Path | None = None) -> np.ndarray | None:
    """The picture (y, x, 3) that a video begins with; None where it was made from the prompt.

    Args:
      about: see `read`.
      given: where it is now; unless given, it is the embedded one, or the file where it was.

    Raises:
      UserError: it is not embedded and not to be found, or has changed; one is given and none was used.
    """
    name, digest = about.get("image"), about.get("image_digest")
    if name is None:
        if given is not None:
            raise UserError("--image: this video's first image was made from its prompt; leave it out")
        return None
    if given is None and about.get("picture"):
        return _unpacked(about["picture"])
    file = Path(given or about.get("image_path") or name)
    if not file.is_file():
        raise UserError(
            f"the picture {name} that it begins with is not embedded ({digest or 'no hash of it either'}) and not at "
            f"{file}: say where it is with --image"
        )
    if digest is not None:
        _require_same("image", str(file), weights.digest(file), digest)
    return media.read_image(file)


def make(
    pipeline: TextToVideoPipeline,
    about: Mapping[str, Any],
    path: Path,
    *,
    image: np.ndarray | None = None,
    progress: Progress = lambda label, frames: None,
) -> tuple[Path, ...]:
    """Makes what is described and writes it with its first image and its sidecar, all of them or none.

    Processes that do not write compute it only.

    Args:
      pipeline: see `load`.
      about: see `describe`; what makes the video, and what its metadata become.
      path: the video, or the image alone (.png).
      image: the first frame, made from the prompt unless given.
      progress: called with "image" before, with "video" after the first image is made, and with each frames' number.

    Returns:
      the files written.
    """
    still, sidecar = path.with_suffix(".png"), path.with_suffix(".json")
    progress("image", 0)
    schedule = [(cue["time"], cue["prompt"]) for cue in about.get("prompt_schedule", ())]
    options = {**about["options"], "negative_prompt": about.get("negative_prompt"), "seed": about["seed"]}
    told = {"total_frames": about["frames"], "image": image, "schedule": schedule}
    stream = stream_video(pipeline, about["prompt"], **told, **options)
    progress("video", 0)
    clip = stream if path != still else ()  # of a png no window is computed, by any process
    if not processes.leads():
        for _ in clip:
            pass
        return ()
    # A dict, because a png output is its own still.
    targets = tuple(dict.fromkeys((path, still, sidecar)))
    with media.staged(*targets) as temporary:
        names = dict(zip(targets, temporary, strict=True))
        media.write_image(names[still], stream.image, about, upscale=about["upscale"])
        if path != still:
            with media.BackgroundWriter(names[path], about["fps"], about, upscale=about["upscale"]) as writer:
                for frames in clip:
                    writer.write(frames)
                    progress("video", len(frames))
        names[sidecar].write_text(json.dumps(about, indent=2) + "\n")
    return targets


def compare(one: Path, other: Path) -> tuple[int, Difference | None]:
    """The number of frames of `one`, and how another file's decoded frames differ from them; None where they don't.

    Frames that only one of them has, or of another size, differ by 255.
    """
    first, differing, largest, count = -1, 0, 0, 0
    for number, (a, b) in enumerate(itertools.zip_longest(media.read_frames(one), media.read_frames(other))):
        count += a is not None
        distance = 255 if a is None or b is None or a.shape != b.shape else int(np.abs(a.astype(int) - b).max())
        if distance:
            first = number if first < 0 else first
            differing, largest = differing + 1, max(largest, distance)
    return count, Difference(first, differing, largest) if differing else None


def _find(place: Any, about: Mapping[str, Any], name: str, revision: str | None) -> Path:
    """The folder of weights that made a file."""
    if place is None:
        raise UserError(f"it was made by weights called {about.get(name)!r}; say where they are with --{name}")
    try:
        return find_folder(place, revision)
    except UserError as error:
        raise UserError(f"{error}; say with --{name} where the weights are that made it") from None


def _require_same(name: str, what: str, found: str, wanted: str | None) -> None:
    if found != wanted:
        go_on = "" if name == "image" else ", or go on with --other_weights"
        raise UserError(
            f"{what} is not what made it: its digest is {found} and was {wanted}; "
            f"name the right one with --{name}{go_on}"
        )


def _of_picture(image: Path, pipeline: TextToVideoPipeline, options: SamplingOptions) -> dict[str, Any]:
    """What the metadata say of a picture besides its name."""
    data = image.read_bytes()
    if len(data) > MAX_PICTURE and not pipeline.components.text_encoder.image_tokens:
        fitted = fit_images([media.read_image(image)], options, pipeline.components)[0]
        exact = np.array_equal(media.to_uint8(fitted).astype(np.float32) / 255, fitted)
        stream = io.BytesIO()
        media.to_pil(fitted).save(stream, format="PNG", optimize=True)
        data = stream.getvalue() if exact else data
    small = len(data) <= MAX_PICTURE
    return {
        "image_path": str(image),
        "image_digest": weights.digest(image),
        "picture": base64.b64encode(data).decode() if small else None,
    }


def _unpacked(text: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as opened:
            return media.read_image(opened)
    except (binascii.Error, UnidentifiedImageError, OSError, ValueError) as error:
        raise UserError(f"the embedded picture is damaged: {error}; give it with --image") from None
