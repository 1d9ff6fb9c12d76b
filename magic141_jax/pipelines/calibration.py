"""What a transformer sees when it samples: inputs to measure activations and errors on, without any data set.

Prompts are sampled as a user would, picture first, and the pictures and clips noised again to the times of the walk:

    x_t = (1 - t) x0 + t eps        for each t of the walk but 0

on which `norms` and `grams` tell what enters every linear map, and `Measured` how far another network is off where
latents are not known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magic141_jax import sharding
from magic141_jax.diffusion import flow, timesteps
from magic141_jax.diffusion.conditioning import Conditioning
from magic141_jax.errors import UserError
from magic141_jax.models.network import Network
from magic141_jax.models.probes import square_sums
from magic141_jax.models.seam import velocity_fn
from magic141_jax.pipelines.engine import IMAGE_PURPOSE
from magic141_jax.pipelines.image_to_video import FIRST_WINDOW
from magic141_jax.pipelines.options import as_prompts, resolve
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline
from magic141_jax.pytree import Params, flatten, unflatten
from magic141_jax.shapes import Latents, Times

# Captions of the emoji set, for the embedded default; other weights want prompts of their own
PROMPTS = (
    "a shark moves left on a yellow background",
    "a star moves right on a blue background",
    "a bee grows on a green background",
    "a bus moves up on a red background",
    "a rocket moves down on a purple background",
    "a cat shrinks on an orange background",
    "an apple moves left on a white background",
    "a moon grows on a black background",
)


class Example(NamedTuple):
    """A batch of inputs: x (b, f, h, w, c), t (b,), their conditioning, and the scale of an embedded guidance."""

    x: Latents
    t: Times
    cond: Conditioning
    guidance: jax.Array | None


def read_prompts(file: Path | None) -> Sequence[str]:
    """The prompts of a text file, one a line; those of the embedded default where no file is given.

    Raises:
      UserError: a file that can't be read, or without a prompt.
    """
    if file is None:
        return PROMPTS
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read prompts from {file}: {error}") from None
    found = [line for line in lines if line]
    if not found:
        raise UserError(f"{file} has no prompt; write one a line")
    return found


def examples(pipeline: TextToVideoPipeline, prompts: Sequence[str] = PROMPTS, *, seed: int = 0) -> list[Example]:
    """Pictures and clips of the prompts at every time of the walk, one example a time and kind.

    Weights that know of no first image, or that take theirs from elsewhere, make clips from the text alone.
    """
    engine, components = pipeline.engine, pipeline.components
    options = resolve({"seed": seed}, components)
    prompts = as_prompts(list(prompts))
    made = []
    if components.transformer.network.config.known != "none" and not components.text_encoder.image_tokens:
        still = dataclasses.replace(options, num_frames=1)
        encoded = engine.encode_text(prompts, still)
        cond, negative = engine.condition(encoded, still)
        latents = engine.denoise(cond, negative, still, purpose=IMAGE_PURPOSE)
        images = engine.decode(latents)[:, 0]
        made.append((cond, latents))
        cond, negative = engine.condition(encoded, options, images=images)
    else:
        shown = None
        if components.text_encoder.image_tokens:
            shown = [np.full((options.height, options.width, 3), 0.5, np.float32)] * len(prompts)  # pyright: ignore[reportCallIssue]
        encoded = engine.encode_text(prompts, options, images=shown)
        cond, negative = engine.condition(encoded, options, images=None if shown is None else np.stack(shown))
    made.append((cond, engine.denoise(cond, negative, options, purpose=FIRST_WINDOW)))
    times = timesteps.grid(options.num_inference_steps, options.shift)[:-1]
    scale = jnp.float32(options.guidance_scale) if components.transformer.network.config.guidance_embedding else None
    found = []
    for number, (cond, x) in enumerate(made):
        noise = flow.draw_noise(jax.random.key(seed + number), x.shape)
        for t in (jnp.full(len(x), t) for t in times):
            found.append(Example(flow.interpolate(x, noise, t), t, cond, scale))
    return found


def norms(network: Network, params: Params, found: Sequence[Example]) -> dict[str, jax.Array]:
    """{path of a kernel: (in,) or (layers, in)}: the Euclidean norm of each input over all tokens of the examples."""
    return {path: jnp.sqrt(value) for path, value in _sums(network, params, found).items()}


def grams(network: Network, params: Params, found: Sequence[Example], paths: str) -> dict[str, jax.Array]:
    """{path of a kernel: (in, in) or (layers, in, in)}: sums of x x^T over all tokens of the examples.

    `paths` is a regex over the dotted paths of the maps, without "kernel".
    """
    return _sums(network, params, found, products=paths)


def _sums(network: Network, params: Params, found: Sequence[Example], *, products: str = "") -> dict[str, jax.Array]:
    def one(params: Params, example: Example) -> dict[str, jax.Array]:
        return square_sums(network, params, lambda network, own: _velocity(network, own, example), products=products)

    sums = _compiled(one, params)
    total = None
    for example in found:
        made = sums(params, example)
        total = made if total is None else jax.tree.map(jnp.add, total, made)
    return total


class Measured:
    """The velocities of a network under many parameters, compiled once for each shape of an example."""

    def __init__(self, network: Network, params: Params) -> None:
        self._run = _compiled(lambda params, example: _velocity(network, params, example), params)

    def __call__(
        self, params: Params, found: Sequence[Example], truth: Sequence[jax.Array] | None = None
    ) -> tuple[float, list[jax.Array]]:
        """The relative error ||v - truth|| / ||truth|| over the examples, 0 without a truth, and the velocities v."""
        made = [self._run(params, example) for example in found]
        pairs = zip(made, truth or made, strict=True)
        sums = np.sum([[jnp.sum((a - b) ** 2), jnp.sum(b**2)] for a, b in pairs], axis=0)
        return float(np.sqrt(sums[0] / sums[1])), made


def sensitivity(
    network: Network,
    params: Params,
    found: Sequence[Example],
    changed: Mapping[str, jax.Array],
) -> dict[str, list[float]]:
    """How much the velocities suffer from each changed kernel alone: {path: relative errors, one a layer}.

    Args:
      network, params: dense.
      found: inputs.
      changed: {path: kernel of the same shape}, such as quantized or pruned ones.
    """
    measured = Measured(network, params)
    _, truth = measured(params, found)
    made, flat = {}, flatten(params)
    for path, kernel in changed.items():
        made[path], own = [], flat[path]
        for layer in range(len(kernel)) if kernel.ndim == 3 else (slice(None),):
            tried = unflatten({**flat, path: own.at[layer].set(kernel[layer].astype(own.dtype))})
            made[path].append(measured(tried, found, truth)[0])
    return made


def _velocity(network: Network, params: Params, example: Example) -> jax.Array:
    made = velocity_fn(network, params, guidance=example.guidance)(example.x, example.t, example.cond)
    return made.astype(jnp.float32) * (1 - example.cond.mask)


def _compiled(function: Callable[..., Any], params: Params) -> Callable[..., Any]:
    """A jitted (params, example) -> ..., traced for the mesh that the parameters lie on."""
    return jax.jit(sharding.over(sharding.mesh_of(params), function))
