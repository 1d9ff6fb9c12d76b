"""Several samplers, of one or several weights folders, on the same captions, first frames and noise.

A row is a sampler: `label=FOLDER:steps=50,guidance=1.5`, with the keys of `KEYS`; what is left out is as the weights
were made for. `lora` names an adapter that is added to the folder's transformer, `transformer` a component folder that
takes its place. For every seed and split, each row makes clips of the same scenes (`protocol`), of the kinds that are
asked for:

    i2v   from the rendered clip's first frame, which says nothing about the motion
    t2v   from the row's own text-to-image picture of the caption
    text  from the caption alone, without a picture in between

and, of the first captions, further draws under other noise. Measures of a kind, means over captions:

    first_*, last_*    `protocol.frame_values` of the first and the last frame; i2v is given its first, so that one
                       has first_frame_psnr instead
    motion             share of the clips that move as the caption says
    motion_amount      over that of true clips
    frechet            `features.frechet` to true clips of the same scenes (not i2v: started as a caption's picture is)
    perceptual         `features.perceptual` to the true clip of the same first frame (i2v only)
    diversity          `features.diversity` over noises: of the pictures (t2v), of the clips (i2v, text)
    dit_seconds        of the transformer alone a clip, in batches of one size: t2v is picture and clip
    evaluations        of the network a clip, both passes of guidance counted
    dit_megabytes      of the transformer's parameters on their devices, in the forms that they are held in
    clip_*, video_*    by published networks, where they are given (`networks`)

and under `by_caption` what each caption has of those that are means over captions, in their order (of the diversity:
the first ones only), for paired comparison (`paired`).

DiT seconds are the median over batches without the first; the engine keeps text, VAE and compilation apart. Seeds are
the outer loop, so that what else the machine does falls on all rows alike, and what was measured before a cut is
whole (`record`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from magic141_jax import weights
from magic141_jax.data.emoji import EmojiPack
from magic141_jax.errors import UserError, nearest
from magic141_jax.evaluation import features, metrics, protocol
from magic141_jax.evaluation.networks import Networks
from magic141_jax.evaluation.protocol import BATCH, MAX_SEED, SPLITS, Clips, Progress
from magic141_jax.evaluation.standing import BY_CAPTION
from magic141_jax.evaluation.templates import Search
from magic141_jax.models.mmdit import MMDiTConfig
from magic141_jax.models.resident import taken
from magic141_jax.pipelines.components import find_folder
from magic141_jax.pipelines.options import PipelineOutput, SamplingOptions, resolve
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline

SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "steps": ("num_inference_steps", int),
    "guidance": ("guidance_scale", float),
    "shift": ("shift", float),
    "sampler": ("sampler", str),
}
WINDOWS: dict[str, tuple[str, Callable[[str], Any]]] = {  # of long videos, see `drift`
    "overlap": ("overlap_latents", int),
    "history_noise": ("history_noise", float),
    "match_colors": ("match_colors", float),
    "carry": ("carry", str),
    "blend": ("blend", lambda text: bool(TRUTH.index(text))),
    "anchor": ("anchor", lambda text: bool(TRUTH.index(text))),
}
TRUTH = ("false", "true")
PARTS = {"lora": ("lora", str), "transformer": ("transformer", str)}
KEYS = SETTINGS | WINDOWS | PARTS
FORM = "a row is label=FOLDER or label=FOLDER:steps=4,guidance=1"
REFERENCE = 128  # true clips that the units of the features come from
REFERENCE_SEED, NOISE_SEED = 1410, 141
NO_NETWORKS = Networks()


@dataclasses.dataclass(frozen=True)
class Row:
    """A sampler to compare: its label, its weights (a folder, "default" or a Hub id) and its sampling options.

    `lora` and `transformer` are paths that change the folder's transformer, see `load_components`.
    """

    label: str
    weights: str
    options: dict[str, Any]
    lora: str = ""
    transformer: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """On what the rows are compared: `samples` captions of each split for each seed, `draws` noises for diversity, and
    the `kinds` of clips.
    """

    seeds: tuple[int, ...] = (0,)
    splits: tuple[str, ...] = ("train", "triples")
    samples: int = 32
    draws: int = 4
    kinds: tuple[str, ...] = ("t2v", "i2v")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A row with its pipeline, which rows of the same files share, and its resolved options."""

    row: Row
    pipeline: TextToVideoPipeline
    resolved: SamplingOptions


@dataclasses.dataclass(frozen=True)
class Judge:
    """What all rows are measured with."""

    search: Search
    space: features.FeatureSpace
    networks: Networks = NO_NETWORKS


@dataclasses.dataclass(frozen=True)
class Made:
    """What a row made of one split and seed, by kind (`standing.KINDS`).

    Attributes:
      clips: (n, t, y, x, 3).
      draws: at least two arrays (m, t, y, x, 3) of the first m captions under other noise; pictures for t2v.
      seconds: of the transformer, a clip.
    """

    clips: dict[str, np.ndarray]
    draws: dict[str, list[np.ndarray]]
    seconds: dict[str, float]


def read_rows(texts: Sequence[str], *, fewest: int = 2) -> tuple[Row, ...]:
    """Rows as the command line gives them; raises `UserError` for a wrong form or key, and for equal labels."""
    rows = tuple(_read_row(text) for text in texts)
    if len(rows) < fewest:
        why = "a comparison takes at least two --row: the others are held against the first"
        raise UserError(why if fewest == 2 else f"give at least {fewest} --row")
    labels = [row.label for row in rows]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{labels.count(label)} rows are named {label!r}; give each its own label")
    return rows


def with_labels(texts: Sequence[str]) -> tuple[str, ...]:
    """Rows as `read_rows` takes them, where a label may be left out: it is then the folder's name.

    "weights" tells nothing, so that of runs/a/weights it is "a"; of equal names the later ones are numbered.
    """
    rows: list[str] = []
    for text in texts:
        named = "=" in text and ":" not in text.partition("=")[0]
        path = Path(text.partition(":")[0].strip())
        label = path.parent.name if path.name == "weights" and path.parent.name else path.name
        taken = sum(row.startswith((f"{label}=", f"{label} (")) for row in rows)
        rows.append(text if named else f"{f'{label} ({taken + 1})' if taken else label}={text}")
    return tuple(rows)


def write_row(row: Row) -> str:
    """The inverse of `read_rows` for one row."""
    names = {name: key for key, (name, _) in KEYS.items()}
    parts = {name: getattr(row, name) for name in PARTS if getattr(row, name)}
    listed = ",".join(f"{names[name]}={value}" for name, value in {**row.options, **parts}.items())
    return f"{row.label}={row.weights}" + (f":{listed}" if listed else "")


def read_seeds(text: str) -> tuple[int, ...]:
    """ "0,1,2" -> (0, 1, 2); raises `UserError` for what isn't a number, is out of range or comes twice."""
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"\d{1,10}", word) and int(word) <= MAX_SEED for word in words):
        raise UserError(f"--seeds is {text!r}; write numbers from 0 to {MAX_SEED}, such as 0,1,2")
    return _once(tuple(int(word) for word in words), "--seeds")


def read_names(text: str, flag: str, known: Sequence[str]) -> tuple[str, ...]:
    """ "train,triples" -> ("train", "triples"); raises `UserError` for an unknown name or one that comes twice."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in known:
            raise UserError(f"{flag} names {word!r}.{nearest(word, known)}")
    return _once(tuple(words), flag)


def load_rows(rows: Sequence[Row]) -> tuple[Loaded, ...]:
    """Loads shared files once; raises `UserError`, before anything is sampled, for what can't be compared."""
    folders = [find_folder(row.weights).resolve() for row in rows]
    pipelines: dict[tuple[Any, ...], TextToVideoPipeline] = {}
    loaded = []
    for row, folder in zip(rows, folders, strict=True):
        try:
            parts = {name: getattr(row, name) or None for name in PARTS}
            source = (folder, *parts.values())
            if source not in pipelines:
                pipelines[source] = TextToVideoPipeline.from_pretrained(folder, **parts)
            loaded.append(Loaded(row, pipelines[source], resolve(row.options, pipelines[source].components)))
            protocol.frame_side(pipelines[source])
        except UserError as error:
            raise UserError(f"row {row.label}: {error}") from None
    first, *others = loaded
    for other in others:
        if _shape(other) != _shape(first):
            raise UserError(
                f"row {other.row.label} makes clips of (frames, height, width) {_shape(other)} and row "
                f"{first.row.label} of {_shape(first)}; only clips of one shape can be compared"
            )
    return tuple(loaded)


def identity(loaded: Loaded) -> dict[str, Any]:
    """What a row is, apart from its label and from where its files lie: two rows of one identity make the same clips.

    Returns:
      digests of its files by part, the options that were given, and all resolved settings; ready for JSON.
    """
    row = loaded.row
    parts = {name: Path(getattr(row, name)) for name in PARTS if getattr(row, name)}
    return {
        "digests": {
            "folder": loaded.pipeline.components.digest,
            **{name: weights.digest(path.expanduser()) for name, path in parts.items()},
        },
        "options": dict(row.options),
        "settings": {name: getattr(loaded.resolved, name) for name, _ in SETTINGS.values()},
    }


def compare(
    loaded: Sequence[Loaded],
    pack: EmojiPack,
    plan: Plan,
    *,
    networks: Networks = NO_NETWORKS,
    progress: Progress = lambda text: None,
    show: Callable[[int, str, str, Clips, Made], None] = lambda *of: None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Measures all rows, seed by seed.

    Args:
      loaded: the rows.
      pack: the emoji.
      plan: on what they are compared.
      networks: published ones, that measure too.
      progress: is told what is done.
      show: is shown (seed, split, label, true clips, what the row made of them).

    Yields:
      a seed and its `values[label][split][kind][measure]`, when all rows are measured under it.
    """
    num_frames, side, _ = _shape(loaded[0])
    known = protocol.draw_scenes(pack, "train", REFERENCE, seed=REFERENCE_SEED)
    true = protocol.render_clips(pack, known, side=side, num_frames=num_frames)
    judge = Judge(Search(pack, side), features.FeatureSpace.of(true), networks)
    for seed in plan.seeds:
        values: dict[str, dict[str, Any]] = {x.row.label: {} for x in loaded}
        for split in plan.splits:
            clips = protocol.true_clips(pack, split, plan.samples, side=side, num_frames=num_frames, seed=seed)
            noises = noise_seeds(seed, split, plan.samples, draws=plan.draws)
            for row in loaded:
                name = row.row.label
                made = make(row, clips, noises, kinds=plan.kinds)
                show(seed, split, name, clips, made)
                progress(f"{name}, {split}, seed {seed}: made")
                values[name][split] = measure(made, clips, judge, resolved=row.resolved, config=_config(row))
                for found in values[name][split].values():
                    found["dit_megabytes"] = megabytes(row)
                progress(f"{name}, {split}, seed {seed}: measured")
        yield seed, values


def progress_steps(rows: Sequence[Row], plan: Plan) -> int:
    """How often `compare` tells its progress."""
    return 2 * len(rows) * len(plan.seeds) * len(plan.splits)


def noise_seeds(seed: int, split: str, count: int, *, draws: int) -> np.ndarray:
    """(draws, count) seeds of noise, the same for all rows; no two seeds of a comparison share any."""
    return np.random.default_rng((NOISE_SEED, seed, SPLITS.index(split))).integers(MAX_SEED, size=(draws, count))


def make(row: Loaded, clips: Clips, noises: np.ndarray, *, kinds: Sequence[str] = Plan.kinds) -> Made:
    """Samples a row: clips under noises[0], and draws of the first captions, of one batch, under each of `noises`.

    Text to video is called as its two halves, so that the clock sees the transformer alone; the result is the same.
    Held-out subjects, which no caption can name, are only animated.
    """
    spent: dict[str, list[float]] = {"image": [], "video": [], "text": []}
    pipeline, clock = row.pipeline, row.pipeline.engine.seconds
    text_to_image = _timed(pipeline.text_to_image, clock, "image", spent["image"])
    image_to_video = _timed(pipeline.image_to_video, clock, "video", spent["video"])
    from_text = _timed(pipeline.from_text, clock, "video", spent["text"])
    firsts, captions, options = clips.made["truth"][:, 0], clips.captions, row.row.options
    several = min(BATCH, len(captions))

    def animate(images: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        count = len(seeds)
        return protocol.generate(image_to_video, captions[:count], seeds, options=options, images=images[:count])[0]

    def draw(kind: str, seeds: np.ndarray) -> np.ndarray:
        """What diversity is about: pictures (m, 1, y, x, 3) for t2v, else clips."""
        if kind == "i2v":
            return animate(firsts, seeds)
        make = text_to_image if kind == "t2v" else from_text
        frames, images = protocol.generate(make, captions[: len(seeds)], seeds, options=options)
        return images[:, None] if frames is None else frames

    made, draws = {}, {}
    for kind in (k for k in kinds if k == "i2v" or "posters" in clips.made):
        drawn = draw(kind, noises[0])
        made[kind] = animate(drawn[:, 0], noises[0]) if kind == "t2v" else drawn
        draws[kind] = [drawn[:several], *(draw(kind, more[:several]) for more in noises[1:])]
    parts = {"i2v": ("video",), "t2v": ("image", "video"), "text": ("text",)}
    seconds = {kind: sum(float(np.median(spent[part][1:])) for part in parts[kind]) for kind in made}
    return Made(made, draws, seconds)


def measure(
    made: Made, clips: Clips, judge: Judge, *, resolved: SamplingOptions, config: MMDiTConfig
) -> dict[str, dict[str, Any]]:
    """The measures of the module docstring, by kind."""
    values = {}
    for kind, frames in made.clips.items():
        true = clips.made["truth" if kind == "i2v" else "posters"]
        each = {f"last_{k}": v for k, v in protocol.each_frame(frames[:, -1], clips.scenes, judge.search).items()}
        if kind == "i2v":
            each["first_frame_psnr"] = [metrics.psnr(a, b) for a, b in zip(frames[:, 0], true[:, 0], strict=True)]
        else:
            first = protocol.each_frame(frames[:, 0], clips.scenes, judge.search)
            each |= {f"first_{k}": v for k, v in first.items()}
        space = judge.space
        if kind == "i2v":
            each["perceptual"] = features.perceptual(space.maps(frames), space.maps(true))
        judged, whole = judge.networks.measure(frames, clips.captions, true)
        if kind != "i2v":
            judged.pop("clip_perceptual", None)  # a clip from text alone has no true one to be held against
        each |= judged
        each |= protocol.each_clip(frames, clips.scenes, true)
        each["diversity"] = features.diversity_of_each([space.maps(draw) for draw in made.draws[kind]])
        values[kind] = (
            {name: protocol.mean(of) for name, of in each.items()}
            | whole
            | {
                "frechet": features.frechet(space.statistics(frames), space.statistics(true)),
                "dit_seconds": made.seconds[kind],
                "evaluations": evaluations(resolved, config) * (2 if kind == "t2v" else 1),
                BY_CAPTION: {name: _short(of) for name, of in each.items()},
            }
        )
    return values


def evaluations(options: SamplingOptions, config: MMDiTConfig) -> int:
    """How often the network is run for one picture or clip: by sampler and steps, twice with guidance unless the
    network is told its scale.
    """
    steps = options.num_inference_steps
    walked = 2 * steps - 1 if options.sampler == "heun" else steps  # Heun's last step is an Euler step  # pyright: ignore[reportOperatorIssue]
    return walked * (1 if options.guidance_scale == 1 or config.guidance_embedding else 2)  # pyright: ignore[reportOperatorIssue]


def megabytes(row: Loaded) -> float:
    """10^6 bytes of the buffers that hold the row's transformer."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(taken(row.pipeline.components.transformer.params))) / 1e6


def _timed(
    call: Callable[..., PipelineOutput], seconds: Mapping[str, float], label: str, spent: list[float]
) -> Callable[..., PipelineOutput]:
    """The call of a pipeline; each adds what it takes of the engine's `seconds[label]`, a prompt, to `spent`."""

    def run(prompts: Sequence[str], **options: Any) -> PipelineOutput:
        before = seconds[label]
        made = call(prompts, **options)
        spent.append((seconds[label] - before) / len(prompts))
        return made

    return run


def _read_row(text: str) -> Row:
    label, _, source = text.partition("=")
    folder, colon, listed = source.rpartition(":") if ":" in source else (source, "", "")
    label, folder = label.strip(), folder.strip()
    if not label or not folder or "|" in label or "\n" in label:
        raise UserError(f"can't read the row {text!r}; {FORM}")
    given: dict[str, Any] = {}
    for item in listed.split(",") if colon else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise UserError(f"row {label}: {item!r} is no key=value; {FORM}")
        if key not in KEYS:
            raise UserError(f"row {label}: unknown key {key!r}.{nearest(key, KEYS)}")
        name, kind = KEYS[key]
        if name in given:
            raise UserError(f"row {label}: {key} is given twice")
        try:
            given[name] = kind(value)
        except ValueError:
            what = {int: "a whole number", float: "a number"}.get(kind, "true or false")
            raise UserError(f"row {label}: {key} is {value!r}; it must be {what}") from None
    parts = {name: given.pop(name) for name in PARTS if name in given}
    return Row(label, folder, given, **parts)


def _short(values: Iterable[float]) -> list[float]:
    """Numbers to five digits, for the file that holds them all."""
    return [float(f"{value:.5g}") for value in values]


def _once(values: tuple[Any, ...], flag: str) -> tuple[Any, ...]:
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{flag} names {value} twice")
    return values


def _shape(row: Loaded) -> tuple[int, int, int]:
    """(frames, height, width) of a clip."""
    return row.resolved.num_frames, row.resolved.height, row.resolved.width


def _config(row: Loaded) -> MMDiTConfig:
    return row.pipeline.components.transformer.network.config
