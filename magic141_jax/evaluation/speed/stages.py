"""What is timed: the stages of a clip one by one, a clip and a long video through the pipeline, and fresh starts.

    text, image tokens, decode                a network alone
    re-encode                                 what the next window starts from, which is looked for if it is a picture
    evaluation                                the transformer alone, once, for a picture and for a clip; with the
                                              adapter of later windows too, where there is one
    denoise                                   all steps of a clip, as the pipeline takes them
    picture, clip, video                      from the prompt to frames in memory

A start is a process of `sample.py`: until its first frame is on disk, and until it has ended. Cold it finds no compiled
program, warm those of the run before.
"""

from __future__ import annotations

import collections
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from magic141_jax import embedded, flops
from magic141_jax.diffusion.conditioning import Conditioning
from magic141_jax.errors import UserError
from magic141_jax.models.network import Network
from magic141_jax.models.seam import velocity_fn
from magic141_jax.pipelines import registration
from magic141_jax.pipelines.components import CACHE_VARIABLE, Model
from magic141_jax.pipelines.engine import Stage
from magic141_jax.pipelines.image_to_video import FIRST_WINDOW
from magic141_jax.pipelines.long_video import overlap_frames, stream_video
from magic141_jax.pipelines.options import SamplingOptions, resolve
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline
from magic141_jax.pytree import Params
from magic141_jax.shapes import Frames, Latents, Times

SAMPLE = embedded.ROOT / "sample.py"
POLL = 0.005  # seconds between looks at the folder that a start writes into


class Piece(NamedTuple):
    """Something to time: pixel frames that it makes or reads, steps, and operations of its matrix products if known."""

    run: Callable[[], Any]
    frames: int = 0
    steps: int = 0
    operations: float | None = None


def pieces(pipeline: TextToVideoPipeline, prompt: str, given: Mapping[str, Any]) -> dict[str, Piece]:
    """The stages of one clip for options as a pipeline call takes them, by name.

    Raises:
      UserError: an illegal option; weights that make clips from text alone.
    """
    components, engine = pipeline.components, pipeline.engine
    options = resolve(given, components)
    if components.transformer.network.config.known == "none":
        raise UserError("these weights make clips from text alone; the speed of a window needs image-to-video weights")
    picture = first_picture(pipeline, options)
    prompts = engine.encode_text([prompt], options, images=list(picture))
    cond, negative = engine.condition(prompts, options, images=picture)
    latents = engine.denoise(cond, negative, options, purpose=FIRST_WINDOW)
    seen = engine.decode(latents)[:, -overlap_frames(options, components.vae.network.config.temporal_factor) :]
    seen, follow = seen[:, : None if options.carry == "pixels" else 1], jax.jit(registration.followed)

    def known() -> Any:
        start = follow(picture, seen[:, 0])[:, None] if options.carry == "picture" else seen
        return engine.encode_known(start, options, label="video")

    found = {"text": Piece(lambda: engine.encode_text([prompt], options, images=list(picture)))}
    if components.image_encoder is not None:
        found["image tokens"] = Piece(_alone(pipeline, _tokens, components.image_encoder, picture), 1)
    if not components.text_encoder.image_tokens:
        still = resolve(still_options(given), components, frames=1)
        alone, _ = engine.condition(engine.encode_text([prompt], still), still)
        found["evaluation, picture"] = _evaluation(pipeline, components.transformer, alone, still)
        found["picture"] = Piece(lambda: pipeline.text_to_image(prompt, **still_options(given)), 1, _steps(still))
    if options.carry == "sink" and components.continuation is not None:
        found["evaluation, later window"] = _evaluation(pipeline, components.continuation, cond, options)
    return found | {
        "evaluation, clip": _evaluation(pipeline, components.transformer, cond, options),
        "denoise": Piece(
            lambda: engine.denoise(cond, negative, options, purpose=FIRST_WINDOW), options.num_frames, _steps(options)
        ),
        "decode": Piece(lambda: engine.decode(latents), options.num_frames),
        "re-encode": Piece(known, seen.shape[1]),
        "clip": video(pipeline, prompt, given, options.num_frames),
    }


def first_picture(pipeline: TextToVideoPipeline, options: SamplingOptions) -> np.ndarray:
    """Noise (1, y, x, 3) in the place of a first image: speed doesn't depend on what it shows."""
    return np.random.default_rng(0).random((1, options.height, options.width, 3), np.float32)  # pyright: ignore[reportCallIssue]


def still_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that an image takes as well."""
    return {name: value for name, value in given.items() if name != "num_frames"}


def video(pipeline: TextToVideoPipeline, prompt: str, given: Mapping[str, Any], frames: int) -> Piece:
    """A video of so many frames, let go of window by window; from a picture where the weights need one."""
    options = resolve(given, pipeline.components)
    needs_picture = bool(pipeline.components.text_encoder.image_tokens)
    picture = first_picture(pipeline, options)[0] if needs_picture else None

    def run() -> None:
        made = sum(len(part) for part in stream_video(pipeline, prompt, total_frames=frames, image=picture, **given))
        if made != frames:
            raise RuntimeError(f"{made} frames in place of {frames}")

    return Piece(run, frames, _steps(options))


def _steps(options: SamplingOptions) -> int:
    return options.num_inference_steps


def _alone(pipeline: TextToVideoPipeline, function: Callable[..., Any], model: Model, *arrays: Any) -> Callable:
    """One network of a pipeline as a program of its own, on the same devices."""
    stage = Stage(
        functools.partial(function, model.network), model.params, collections.Counter(), mesh=pipeline.components.mesh
    )
    return lambda: stage("alone", *arrays)


def _tokens(network: Network, params: Params, images: Frames) -> jax.Array:
    return network(params, images)


def _evaluation(pipeline: TextToVideoPipeline, model: Model, cond: Conditioning, options: SamplingOptions) -> Piece:
    """A transformer once, for the latents of a conditioning; with guidance a step takes two of them."""
    arrays = np.zeros(cond.known.shape, np.float32), np.full(len(cond.known), 0.5, np.float32), cond
    function = functools.partial(_velocity, model.network)
    operations = flops.count(jax.jit(function).trace(model.network.abstract_params, *arrays).jaxpr)
    return Piece(_alone(pipeline, _velocity, model, *arrays), options.num_frames, 1, operations)


def _velocity(network: Network, params: Params, x: Latents, t: Times, cond: Conditioning) -> Latents:
    guidance = 1.0 if network.config.guidance_embedding else None
    return velocity_fn(network, params, guidance=guidance)(x, t, cond)


def starts(arguments: list[str]) -> dict[str, dict[str, float]]:
    """Seconds of a cold and then a warm start of `sample.py` with these arguments.

    Returns:
      cold, warm -> "first frame", "finished", and "cpu", the seconds of cores until then.

    Raises:
      UserError: there is no sample.py beside the package, or it fails.
    """
    if not SAMPLE.exists():
        raise UserError(f"no {SAMPLE.name} beside the package: starts are measured in a checkout; leave them out")
    with tempfile.TemporaryDirectory() as cache:
        return {state: _start(arguments, Path(cache)) for state in ("cold", "warm")}


def _start(arguments: list[str], cache: Path) -> dict[str, float]:
    environment = os.environ | {CACHE_VARIABLE: str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryFile() as errors:
        command = [sys.executable, str(SAMPLE), *arguments, "--output", str(Path(made) / "out.mp4")]
        began, cpu, first = time.perf_counter(), _children(), None
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while process.poll() is None:
                if first is None and any(file.stat().st_size for file in Path(made).glob("*.png")):
                    first = time.perf_counter() - began
                time.sleep(POLL)
        finally:
            process.kill()
            process.wait()
        finished = time.perf_counter() - began
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise UserError(f"{SAMPLE.name} failed: {lines[-1] if lines else process.returncode}")
    return {"first frame": finished if first is None else first, "finished": finished, "cpu": _children() - cpu}


def _children() -> float:
    """Seconds of cores of all processes that this one has started and seen end."""
    times = os.times()
    return times.children_user + times.children_system
