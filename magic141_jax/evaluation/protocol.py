"""What is generated and measured: three sets of captions of the emoji set, four ways of making their frames.

    train      captions that training may see         triples    (subject, colour, motion) left out of training
    subjects   emoji that training never sees: a first frame is given, so only image to video and the VAE

    truth      the rendered clip: the scorers' own ceiling        vae   the rendered clip through the autoencoder
    image, t2v text to image, and text to video on it             i2v   from the rendered clip's first frame

A rendered clip starts at a place, size and moment that are drawn independently of its motion, so a first frame says
nothing about the direction (unleaky starts), and sizes leave room to grow and to shrink. Text to video is free to
place the subject where its motion has room, so its motion is the easier number.

Every value of the result is the mean over a set's captions; those of `truth` and `vae` stand beside each model's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from magic141_jax.data.emoji import CANVAS, COLOURS, MOTIONS, EmojiPack, Scene, caption, is_held_out_triple, poster
from magic141_jax.errors import UserError
from magic141_jax.evaluation import metrics, scorers
from magic141_jax.evaluation.templates import Search
from magic141_jax.pipelines.options import PipelineOutput
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline

SPLITS = ("train", "triples", "subjects")
START_SIZES = (32, 42)  # from here a subject may grow and shrink visibly within the set's sizes
BATCH = 16
MAX_SEED = 2**31

Values = dict[str, float]
Each = dict[str, list[float]]  # a value a clip
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Clips:
    """The clips of one split: scenes, captions, and frames (n, t, y, x, 3) by the way of making them."""

    scenes: tuple[Scene, ...]
    captions: tuple[str, ...]
    made: dict[str, np.ndarray]


def draw_scenes(pack: EmojiPack, split: str, count: int, *, seed: int = 0) -> tuple[Scene, ...]:
    """Draws `count` scenes of a split with unleaky starts; every subject comes once before one comes twice."""
    rng = np.random.default_rng((seed, SPLITS.index(split)))
    subjects = pack.held_out if split == "subjects" else pack.trained
    scenes: list[Scene] = []
    for i in range(count):
        if i % len(subjects) == 0:
            order = rng.permutation(subjects)
        while True:
            scene = Scene(
                subject=int(order[i % len(subjects)]),
                colour=str(rng.choice(list(COLOURS))),
                motion=str(rng.choice(list(MOTIONS))),
                centre=(float(rng.integers(CANVAS)), float(rng.integers(CANVAS))),
                size=float(rng.integers(START_SIZES[0], START_SIZES[1] + 1)),
                phase=int(rng.integers(24)),
            )
            if split == "subjects" or is_held_out_triple(pack, scene) == (split == "triples"):
                break
        scenes.append(scene)
    return tuple(scenes)


def make_clips(
    pipeline: TextToVideoPipeline,
    pack: EmojiPack,
    split: str,
    count: int,
    *,
    options: dict[str, Any],
    seed: int = 0,
    progress: Progress = lambda text: None,
) -> Clips:
    """Renders and generates all clips of a split, in batches of one size so that little is compiled.

    Args:
      pipeline: what is evaluated.
      pack: the emoji.
      split: one of `SPLITS`.
      count: number of captions.
      options: of the pipelines' calls (steps, guidance).
      seed: draws the scenes; clip i is made with the seed `seed` + i.
      progress: is told what has been made.
    """
    side, frames = frame_side(pipeline), pipeline.components.sampling.num_frames
    clips = true_clips(pack, split, count, side=side, num_frames=frames, seed=seed)
    captions, made, truth = clips.captions, clips.made, clips.made["truth"]
    made["vae"] = _in_batches(round_trip(pipeline), truth)
    progress(f"{split}: truth")
    seeds = np.arange(seed, seed + count) % MAX_SEED
    made["i2v"], _ = generate(pipeline.image_to_video, captions, seeds, options=options, images=truth[:, 0])
    progress(f"{split}: image to video")
    if split != "subjects":
        made["t2v"], made["image"] = generate(pipeline, captions, seeds, options=options)
        progress(f"{split}: text to video")
    return clips


def true_clips(pack: EmojiPack, split: str, count: int, *, side: int, num_frames: int, seed: int = 0) -> Clips:
    """The scenes of a split and their rendered clips.

    `truth` has the unleaky starts; `posters`, unless the subjects are held out, start as a caption's image does.
    """
    scenes = draw_scenes(pack, split, count, seed=seed)
    shown = {"truth": scenes}
    if split != "subjects":
        shown["posters"] = tuple(poster(s.subject, s.colour, s.motion) for s in scenes)
    made = {way: render_clips(pack, of, side=side, num_frames=num_frames) for way, of in shown.items()}
    return Clips(scenes, tuple(caption(pack, s) for s in scenes), made)


def render_clips(pack: EmojiPack, scenes: Sequence[Scene], *, side: int, num_frames: int) -> np.ndarray:
    """Scenes as float32 frames (n, t, side, side, 3) in [0, 1]."""
    return np.stack([pack.render(s, size=side, num_frames=num_frames) for s in scenes]).astype(np.float32) / 255


def generate(
    pipeline: Callable[..., PipelineOutput],
    captions: Sequence[str],
    seeds: np.ndarray,
    *,
    options: Mapping[str, Any],
    images: np.ndarray | None = None,
) -> tuple[np.ndarray | None, np.ndarray]:
    """Calls a pipeline in batches of one size; returns its frames (n, t, y, x, 3) and images (n, y, x, 3).

    Args:
      pipeline: text to image (whose frames are None), image to video or text to video.
      captions: n prompts.
      seeds: (n,) of the noise.
      options: of the pipeline's calls (steps, guidance).
      images: (n, y, x, 3), the first frames that image to video takes.
    """

    def call(which: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        first = {} if images is None else {"image": images[which]}
        made = pipeline([captions[i] for i in which], seed=tuple(int(seeds[i]) for i in which), **options, **first)
        return made.frames, made.images

    return _in_batches(call, np.arange(len(captions)))


def evaluate_clips(clips: Clips, search: Search, *, progress: Progress = lambda text: None) -> dict[str, Values]:
    """The measures of one split by the way of making: see `clip_values`, `frame_values` and `vae_values`."""
    truth = clips.made["truth"]
    values: dict[str, Values] = {}
    for way in ("truth", "vae", "i2v", "t2v"):
        if way not in clips.made:
            continue
        frames = clips.made[way]
        reference = clips.made["posters"] if way == "t2v" else truth
        values[way] = clip_values(frames, clips.scenes, reference) | frame_values(frames[:, -1], clips.scenes, search)
        progress(f"{way} scored")
    values["vae"] |= vae_values(clips.made["vae"], truth, clips.scenes)
    values["i2v"]["first_frame_psnr"] = mean(metrics.psnr(a, b) for a, b in zip(clips.made["i2v"][:, 0], truth[:, 0]))
    firsts = {"image": clips.made.get("image"), "truth_first": truth[:, 0], "vae_first": clips.made["vae"][:, 0]}
    for way, images in firsts.items():
        if images is not None:
            values[way] = frame_values(images, clips.scenes, search)
            progress(f"{way} scored")
    return values


def frame_values(images: np.ndarray, scenes: Sequence[Scene], search: Search) -> Values:
    """Identity and colour of frames (n, y, x, 3): the means of `each_frame`."""
    return {name: mean(values) for name, values in each_frame(images, scenes, search).items()}


def each_frame(images: np.ndarray, scenes: Sequence[Scene], search: Search) -> Each:
    """Identity and colour of each of the frames (n, y, x, 3).

    identity: nearest to the right subject and really drawn (`scorers.Identity.shows`); nearest, top5: by distance
    only, which a blob may pass; subject_psnr and outline: of the frame against its nearest template.
    """
    found = [scorers.identify(search, image) for image in images]
    return {
        "identity": [float(f.shows(s.subject)) for f, s in zip(found, scenes, strict=True)],
        "nearest": [float(f.near(s.subject, 1)) for f, s in zip(found, scenes, strict=True)],
        "top5": [float(f.near(s.subject, 5)) for f, s in zip(found, scenes, strict=True)],
        "drawn": [float(f.drawn) for f in found],
        "subject_psnr": [f.psnr for f in found],
        "outline": [f.outline for f in found],
        "colour": [
            float(metrics.colour_name(metrics.background(image)) == s.colour)
            for image, s in zip(images, scenes, strict=True)
        ],
    }


def clip_values(clips: np.ndarray, scenes: Sequence[Scene], reference: np.ndarray) -> Values:
    """Motion of clips (n, t, y, x, 3): the means of `each_clip`."""
    return {name: mean(values) for name, values in each_clip(clips, scenes, reference).items()}


def each_clip(clips: np.ndarray, scenes: Sequence[Scene], reference: np.ndarray) -> Each:
    """Whether each of the clips (n, t, y, x, 3) moves as its caption says, and how much, to the data's mean."""
    unit = max(mean(metrics.motion_amount(c) for c in reference), 1e-9)
    return {
        "motion": [float(scorers.read_motion(c) == s.motion) for c, s in zip(clips, scenes, strict=True)],
        "motion_amount": [metrics.motion_amount(c) / unit for c in clips],
    }


def vae_values(decoded: np.ndarray, truth: np.ndarray, scenes: Sequence[Scene]) -> Values:
    """PSNR and SSIM of the autoencoder, means over clips; vae_subject_psnr is over pixels unlike the background."""
    pairs = list(zip(decoded, truth, strict=True))
    masks = [metrics.foreground(t, np.float32(COLOURS[s.colour]) / 255) for t, s in zip(truth, scenes, strict=True)]
    return {
        "vae_psnr": mean(metrics.psnr(d, t) for d, t in pairs),
        "vae_first_psnr": mean(metrics.psnr(d[0], t[0]) for d, t in pairs),
        "vae_ssim": mean(metrics.ssim(d, t) for d, t in pairs),
        "vae_subject_psnr": float(np.nanmean([metrics.psnr(d, t, m) for (d, t), m in zip(pairs, masks, strict=True)])),
    }


def round_trip(pipeline: TextToVideoPipeline) -> Callable[[np.ndarray], np.ndarray]:
    """Frames (b, t, y, x, 3) in [0, 1] through the pipeline's autoencoder and back, compiled."""
    vae = pipeline.components.vae

    @jax.jit
    def run(params: Any, frames: jax.Array) -> jax.Array:
        return vae.network(params, vae.network(params, frames, method="encode_latents"), method="decode_latents")

    return lambda frames: np.asarray(run(vae.params, frames))


def frame_side(pipeline: TextToVideoPipeline) -> int:
    """The side of the frames; raises `UserError` for weights that aren't made for small even squares."""
    sampling = pipeline.components.sampling
    if sampling.height != sampling.width or sampling.height % 2 or sampling.height > 4 * CANVAS:
        raise UserError(
            f"these weights make {sampling.width}x{sampling.height}; the emoji set is measured on even squares up to "
            f"{4 * CANVAS} pixels"
        )
    return sampling.height


def mean(values: Iterable[float]) -> float:
    """The mean of numbers or truth values."""
    return float(np.mean([float(v) for v in values]))


def _in_batches(function: Callable[[np.ndarray], Any], items: np.ndarray) -> Any:
    """Applies `function` to batches of at most `BATCH`, the last one filled up by repetition, and joins the results."""
    size = min(BATCH, len(items))
    made = []
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        made.append(function(np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(items)], *made)
