"""Samples in the layout of VBench's image-to-video suite (Huang 2024, arXiv 2411.13503), for its own tool to judge.

    OUT/PROMPT-INDEX.mp4    INDEX from 0, five a prompt in the official protocol; nothing else lies there, since the
                            tool takes the videos' extension from whatever file comes first
    OUT.json                beside it: what made them, and each file's prompt, picture and seed

Prompts are those of the suite's vbench2_i2v_full_info.json (`prompt_en`, `image_name`, `dimension`), whose pictures
lie in its data/crop/RATIO; without that file, the name of each picture is its prompt, as the tool's
`--mode=custom_input` has it. A sample's seed comes from --seed, prompt and index alone, so that a part of the suite, or
a run that goes on after a cut, makes the same videos. The tool itself needs torch and its own environment.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from magic141_jax import __version__, weights
from magic141_jax.errors import UserError, nearest
from magic141_jax.evaluation import report
from magic141_jax.evaluation.protocol import MAX_SEED
from magic141_jax.pipelines import media
from magic141_jax.pipelines.options import resolve
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
RATIOS = {"1-1": 1.0, "8-5": 1.6, "7-4": 1.75, "16-9": 16 / 9}  # that the suite's pictures are cut to
MAX_NAME = 255  # bytes of a file's name


class Task(NamedTuple):
    """A picture and the prompt that it is to be animated by."""

    prompt: str
    image: Path


def read_tasks(images: Path, prompts: Path | None, dimensions: Sequence[str] = ()) -> tuple[Task, ...]:
    """The tasks of the suite's list, or of the pictures' names where there is no list; each once, in order.

    Args:
      images: folder of pictures.
      prompts: JSON list of objects with `prompt_en` and `image_name`, and `dimension`, a list of names.
      dimensions: keeps only tasks of these.

    Raises:
      UserError: nothing there, another form, a picture that is missing, one prompt for two pictures, a prompt that
        can't be a file's name.
    """
    if not images.is_dir():
        raise UserError(f"no folder {images} of pictures")
    if prompts is None:
        files = sorted(path for path in images.iterdir() if path.suffix.lower() in PICTURES)
        tasks = [Task(path.stem, path) for path in files]
        if dimensions:
            raise UserError("--dimensions are those of a --prompts file; give one, or leave them out")
    else:
        tasks = [Task(*found) for found in dict.fromkeys(_listed(images, prompts, dimensions))]
    if not tasks:
        raise UserError(
            f"no pictures ({', '.join(PICTURES)}) in {images}" if prompts is None else f"{prompts} is empty"
        )
    names = [task.prompt for task in tasks]
    for prompt in names:
        if names.count(prompt) > 1:
            raise UserError(f"two pictures have the prompt {prompt!r}, so that their videos would have one name")
        if not prompt.strip() or "/" in prompt or "\0" in prompt or len(f"{prompt}-00.mp4".encode()) > MAX_NAME - 11:
            raise UserError(f"the prompt {prompt[:60]!r} can't be a file's name; shorten it, without /")
    absent = [task.image for task in tasks if not task.image.is_file()]
    if absent:
        raise UserError(f"{len(absent)} pictures are missing in {images}, the first one is {absent[0].name}")
    return tuple(tasks)


def sample_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of one sample: of nothing but these three."""
    return int(np.random.default_rng((seed, zlib.crc32(prompt.encode()), index)).integers(MAX_SEED))


def describe(
    pipeline: TextToVideoPipeline, tasks: Sequence[Task], options: Mapping[str, Any], *, samples: int, seed: int
) -> dict[str, Any]:
    """What OUT.json says: how all are made, and each file's prompt, picture and seed."""
    resolved = resolve(options, pipeline.components)
    names = ("num_inference_steps", "guidance_scale", "shift", "sampler", "num_frames", "height", "width")
    return {
        "made": {
            "weights_digest": pipeline.components.digest,
            "version": __version__,
            "seed": seed,
            "fps": pipeline.components.sampling.fps,
            **{name: getattr(resolved, name) for name in names},
        },
        "samples": {
            f"{task.prompt}-{i}.mp4": {
                "prompt": task.prompt,
                "image": task.image.name,
                "seed": sample_seed(seed, task.prompt, i),
            }
            for task in tasks
            for i in range(samples)
        },
    }


def write(
    pipeline: TextToVideoPipeline,
    tasks: Sequence[Task],
    out: Path,
    about: Mapping[str, Any],
    *,
    options: Mapping[str, Any],
) -> Iterator[Path]:
    """Makes the samples of `about` (`describe`) that `out` lacks, one after the other; yields each path.

    Raises:
      UserError: `out` holds samples that were made otherwise, or other files; a picture can't be read.
    """
    earlier = _earlier(out, about)
    out.mkdir(parents=True, exist_ok=True)
    everything = {**about, "samples": earlier | about["samples"]}
    report.write(_manifest(out), report.to_json(everything))
    images = {task.prompt: task.image for task in tasks}
    for name, sample in about["samples"].items():
        path = out / name
        if not path.exists():
            picture = media.read_image(images[sample["prompt"]])
            made = pipeline.image_to_video(sample["prompt"], image=picture, seed=sample["seed"], **options)
            told = {**about["made"], **sample}
            with media.staged(path) as (new,), media.BackgroundWriter(new, told["fps"], told) as writer:
                writer.write(made.frames[0])
        yield path


def nearest_ratio(height: int, width: int) -> str:
    """The suite's name of the picture ratio that is nearest to that of the clips."""
    return min(RATIOS, key=lambda name: abs(np.log(RATIOS[name] * height / width)))


def _listed(images: Path, prompts: Path, dimensions: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """(prompt, picture) of a list in the suite's form, repeated where it is."""
    try:
        found = json.loads(prompts.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {prompts}: {error}") from None
    if not isinstance(found, list):
        raise UserError(f"{prompts} holds no list; it must be as VBench's vbench2_i2v_full_info.json")
    known = {d for entry in found if isinstance(entry, dict) for d in entry.get("dimension", ())}
    for dimension in dimensions:
        if dimension not in known:
            raise UserError(f"--dimensions names {dimension!r}.{nearest(dimension, sorted(known))}")
    for i, entry in enumerate(found):
        try:
            prompt, image, of = entry["prompt_en"], entry["image_name"], entry.get("dimension", [])
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"entry {i} of {prompts} lacks prompt_en or image_name, as VBench's I2V list has") from None
        if not dimensions or set(dimensions) & set(of):
            yield prompt, images / image


def _manifest(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


def _earlier(out: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """The samples that `out` holds from before; raises `UserError` for another making, and for strange files."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder")
    if not out.absolute().parent.is_dir():
        raise UserError(f"no folder {out.parent} to make {out.name} in")
    there = sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) if out.exists() else []
    if not there:
        return {}
    before = weights.read_json(_manifest(out)) if _manifest(out).exists() else {}
    samples = before.get("samples", {})
    strange = [name for name in there if name not in {**samples, **about["samples"]}]
    if strange or not before:
        raise UserError(f"{out} holds {(strange or there)[0]}, which is none of these samples; name another folder")
    made = before.get("made", {})
    key = next((k for k in about["made"] if made.get(k) != about["made"][k]), None)
    if key:
        raise UserError(
            f"{out} holds samples of {key} {made.get(key)}, not {about['made'][key]}; name another folder, or delete it"
        )
    return samples
