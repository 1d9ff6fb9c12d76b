"""The parts of a diffusion transformer: linear maps, norms, time features, three-axis RoPE, patches.

Every `Linear` may hold a stack of layers: its kernel is then (layers, in, out) and a scan hands it out slice by
slice. Kernels are kept in the dtype they were given in and cast to the dtype of the activations when used; norms run in
float32.

Two layouts are chosen for speed and meshes; `convert/` accounts for both:
  - the fused q, k, v columns are ordered (n, 3, k), head first, so a tensor-parallel shard holds whole heads;
  - RoPE pairs dim i with i + k/2 (not 2i with 2i + 1), which needs no strided access. A permutation that is common
    to q and k leaves q.k unchanged, so this equals the interleaved form of the published weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from magic141_jax.errors import UserError
from magic141_jax.models.stored import Stored
from magic141_jax.shapes import Latents, Times
from magic141_jax.sharding import platform

EPSILON = 1e-6

Initializer = Callable[..., jax.Array]
LECUN: Initializer = jax.nn.initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=()
)
LECUN_STACKED: Initializer = jax.nn.initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=(0,)
)
ZEROS: Initializer = jax.nn.initializers.zeros

# what the backward pass recomputes of a block: nothing, all of it, or all but matrix products
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda body: body,
    "full": functools.partial(jax.checkpoint, prevent_cse=False),
    "dots": functools.partial(
        jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


@jax.custom_vjp
def observe(x: Array, probe: Array) -> Array:
    """x (..., in) as it is; the "gradient" of `probe` is a sum over all but the last axis.

    Of x^2 for a probe (in,), of x x^T for one that is (in, in). So statistics of what enters a map come out of any
    number of scanned layers, stacked as the layers are. What `x` was made from gets no gradient.
    """
    del probe
    return x


def _observe_forward(x: Array, probe: Array) -> tuple[Array, tuple[Array, Array]]:
    return x, (x, probe)


def _observe_backward(saved: tuple[Array, Array], _: Array) -> tuple[Array, Array]:
    x, probe = saved
    rows = x.astype(probe.dtype).reshape(-1, x.shape[-1])
    return jnp.zeros_like(x), jnp.square(rows).sum(0) if probe.ndim == 1 else rows.T @ rows


observe.defvjp(_observe_forward, _observe_backward)


def expand_like(vector: Array, x: Array) -> Array:
    """Gives a vector (e,) leading axes of size 1 until it has the rank of x (..., e)."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def product(x: Array, w: Array) -> Array:
    """x (..., in) times w (in, out), taken to the dtype of x -> (..., out) in that dtype."""
    w = w.astype(x.dtype)
    return _widened(x, w) if x.dtype == jnp.bfloat16 and platform() == "cpu" else jnp.dot(x, w)


@jax.custom_vjp
def _widened(x: Array, w: Array) -> Array:
    # A CPU's bfloat16 units are used by XLA where both factors are bfloat16 and the product is float32, and only there:
    # six times faster than a bfloat16 product (AMX, jax 0.10). In reverse the cotangent has to be bfloat16 too.
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def _widened_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _widened(x, w), (x, w)


def _widened_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    rows, drows = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
    return _widened(dy, w.T), _widened(rows.T, drows)


_widened.defvjp(_widened_forward, _widened_backward)


class Linear(nnx.Module):
    """y = x W + b with W (in, out), or a stack (layers, in, out) that a scan slices; + (x A) B with an adapter."""

    a: nnx.Param | None = None  # (in, r) and (r, out), or stacks; see models/lora.py
    b: nnx.Param | None = None
    probe: nnx.Param | None = None  # (in,) or (in, in), or a stack; see models/probes.py

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        rngs: nnx.Rngs,
        layers: int | None = None,
        init: Initializer | None = None,
        bias: bool = True,
    ):
        stack = () if layers is None else (layers,)
        init = init or (LECUN_STACKED if stack else LECUN)
        self.kernel = nnx.Param(init(rngs.params(), (*stack, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((*stack, outputs))) if bias else None

    def __call__(self, x: Array) -> Array:
        """x (..., in) -> (..., out) in the dtype of x."""
        if self.probe is not None:
            x = observe(x, self.probe[...])
        y = self.kernel.dot(x) if isinstance(self.kernel, Stored) else product(x, self.kernel[...])
        if self.a is not None:
            y += product(product(x, self.a[...]), self.b[...])
        if self.bias is None:
            return y
        return y + expand_like(self.bias[...].astype(x.dtype), y)


class Embedder(nnx.Module):
    """A two-layer MLP with SiLU between: times, pooled text and guidance enter through one each."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs, outputs: int | None = None):
        self.up = Linear(inputs, width, rngs=rngs)
        self.down = Linear(width, width if outputs is None else outputs, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """x (b, in) -> (b, d), or (b, outputs)."""
        return self.down(jax.nn.silu(self.up(x)))


class AffineNorm(nnx.Module):
    """LayerNorm with a learned scale and bias, possibly a stack of layers."""

    def __init__(self, width: int, *, layers: int):
        self.scale = nnx.Param(jnp.ones((layers, width)))
        self.bias = nnx.Param(jnp.zeros((layers, width)))

    def __call__(self, x: Array) -> Array:
        """x (..., d) -> (..., d)."""
        y = layer_norm(x) * expand_like(self.scale[...].astype(x.dtype), x)
        return y + expand_like(self.bias[...].astype(x.dtype), x)


def layer_norm(x: Array) -> Array:
    """LayerNorm over the last axis without learned parameters, computed in float32."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON)
    return y.astype(x.dtype)


def rms_norm(x: Array, scale: Array, epsilon: float = EPSILON) -> Array:
    """RMS norm over the last axis, computed in float32; `scale` has the rank of x."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """GELU in its tanh form, y = x (1 + tanh u) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3) (arXiv 1606.08415).

    Its slope is written down, so that the backward pass keeps that one array of a hidden layer instead of five.
    """
    return jax.nn.gelu(x, approximate=True)


@gelu.defjvp
def _gelu_slope(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    half = 0.5 * (1 + jnp.tanh(scale * (x + cubic * x**3)))
    slope = half * (1 + 2 * x * (1 - half) * scale * (1 + 3 * cubic * x**2))
    return x * half, slope * dx


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """x (b, j, d) * (1 + scale) + shift with shift and scale (b, 1, d), or (b, j, d) where tokens differ in them."""
    return x * (1 + scale) + shift


def time_features(values: Times, width: int) -> Float[Array, "b width"]:
    """Sinusoids of `values` (b,): cosines first, then sines, at periods from 2 pi to 20000 pi."""
    half = width // 2
    # exponents rounded to float32 as in the published network: at 1000 guidance = 6000 it shows
    exponents = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = values.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def rope_tables(
    grid: tuple[int, int, int], axes: tuple[int, int, int], theta: float, *, text: int
) -> tuple[Float[Array, "j k"], Float[Array, "j k"]]:
    """Cosine and signed sine tables for a grid of video tokens followed by `text` tokens that are not rotated.

    Args:
      grid: patches along frames, height and width; token order is row-major.
      axes: head dims given to each axis (their sum is the head width); each must be even.
      theta: RoPE base; pair p of an axis with a dims turns by position * theta^(-2p / a).
      text: the number of tokens after the video tokens.
    """
    angles = []
    for axis, (size, dims) in enumerate(zip(grid, axes)):
        turns = np.outer(np.arange(size), theta ** (-np.arange(0, dims, 2) / dims))  # (size, dims / 2)
        shape = [1, 1, 1, dims // 2]
        shape[axis] = size
        angles.append(turns.reshape(shape))

    def table(function: Callable[[np.ndarray], np.ndarray], rest: float) -> Array:
        # only the small per-axis tables are constants of the program; the grid is spread inside it
        parts = [jnp.broadcast_to(function(a).astype(np.float32), (*grid, a.shape[-1])) for a in angles]
        video = jnp.concatenate(parts, -1).reshape(math.prod(grid), -1)
        return jnp.concatenate([video, jnp.full((text, video.shape[1]), rest)])

    cos, sin = table(np.cos, 1.0), table(np.sin, 0.0)
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


def sine_positions(grid: tuple[int, int, int], width: int, theta: float) -> Float[Array, "l width"]:
    """Cosines, then sines, of the positions in a grid of tokens: a quarter for the frame, the rest for row and column.

    Raises:
      UserError: `width` is not a multiple of 16.
    """
    if width % 16:
        raise UserError(f"absolute positions need a width that is a multiple of 16, not {width}")
    cos, sin = rope_tables(grid, (width // 4, 3 * width // 8, 3 * width // 8), theta, text=0)
    return jnp.concatenate([cos[:, : width // 2], sin[:, width // 2 :]], -1)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (i, i + k/2) of x (..., k); `cos` and the signed `sin` broadcast against x."""
    y = x.astype(jnp.float32)
    half = x.shape[-1] // 2
    swapped = jnp.concatenate([y[..., half:], y[..., :half]], -1)
    return (y * cos + swapped * sin).astype(x.dtype)


def patchify(x: Latents, patch: tuple[int, int, int]) -> Float[Array, "b l patch_values"]:
    """Latents (b, f, h, w, c) -> tokens (b, l, pt * ph * pw * c), row-major over frames, height, width.

    Raises:
      UserError: a side is not a multiple of the patch.
    """
    b, *sides, c = x.shape
    if any(side % p for side, p in zip(sides, patch)):
        raise UserError(f"latents of {tuple(sides)} frames, rows, columns don't divide into patches of {tuple(patch)}")
    (f, h, w), (pt, ph, pw) = (tuple(side // p for side, p in zip(sides, patch)), patch)
    x = x.reshape(b, f, pt, h, ph, w, pw, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, f * h * w, pt * ph * pw * c)


def unpatchify(tokens: Array, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Latents:
    """The inverse of `patchify` for a grid of (frames, height, width) patches."""
    b = tokens.shape[0]
    (f, h, w), (pt, ph, pw) = grid, patch
    x = tokens.reshape(b, f, h, w, pt, ph, pw, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(b, f * pt, h * ph, w * pw, -1)
