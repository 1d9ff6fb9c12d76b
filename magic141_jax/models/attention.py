"""Attention: one function over several kernels, and the same over sequences that a mesh splits.

    softmax(q k^T / sqrt(k)) v over the keys that count

    xla      spelled out; the scores of all heads are held at once
    chunked  the same for one group of queries after another; on a CPU for one head after another as well
    jax      `jax.nn.dot_product_attention`, whatever XLA makes of it
    cudnn    flash attention of cuDNN, on GPUs, in 16 bits
    splash   flash attention as a Pallas kernel, on TPUs; interpreted elsewhere, which is for tests
    auto     splash on a TPU, cudnn on a GPU, chunked elsewhere and for what those can't do

`joint_attention` is for sequences whose tokens the mesh axis "context" splits. Its w devices form w / u groups of u:

    within a group  Ulysses (arXiv 2309.14509): all-to-all gives each device all of the group's tokens of 1/u heads
    between groups  a ring (arXiv 2310.01889): keys and values go round, and the results of each part are joined by
                    their log-sum-exp, lse = log sum exp(q k^T / sqrt(k)):
                    o = sum_r exp(lse_r - lse) o_r,  lse = log sum_r exp(lse_r)

The order of tokens is of no matter to attention, as long as queries, keys, masks and positions agree.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from magic141_jax.errors import UserError
from magic141_jax.models.sequence import LANES, Pattern, fill_up, join, part
from magic141_jax.sharding import BATCH_AXES, batch_axes, local_batch, platform, ways

MAX_SCORES = 2**28  # of the chunked attention at a time, on one device: 1 GB in float32
CACHED_SCORES = 2**20  # of one head at a time on a CPU, 4 MB in float32: about what its cores' own caches hold
MASKED = -1e30  # finite, so a row of masked keys gives a mean instead of NaN
BLOCK = 1024  # queries and keys of the splash kernel at a time; 2048 don't fit the scratch memory of a v6e core
SHORT = 1024  # sequences for which "auto" leaves the kernel alone


def attention(
    q: Float[Array, "b i n k"],
    k: Float[Array, "b j g k"],
    v: Float[Array, "b j g k"],
    mask: Bool[Array, "b j"] | Bool[Array, "b i j"],
    *,
    backend: str = "xla",
) -> Float[Array, "b i n*k"]:
    """Attention over the keys where `mask` is true; heads joined on the last axis.

    The mask is one for all queries, or says for each query which keys it sees. With fewer key than query heads,
    n / g query heads in a row share one.
    """
    out = BACKENDS[backend](q, k, v, mask if mask.ndim == 3 else mask[:, None], None)
    return out.reshape(*out.shape[:2], -1)


def joint_attention(
    q: Float[Array, "b j n k"],
    k: Float[Array, "b j n k"],
    v: Float[Array, "b j n k"],
    mask: Bool[Array, "b j"],
    *,
    backend: str = "auto",
    ulysses: int = 0,
    pattern: Pattern | None = None,
) -> Float[Array, "b j n*k"]:
    """Attention among the tokens of a sequence, which the mesh that is traced for may split over "context".

    Args:
      q, k, v: whose token axis lies over "context", heads over "tensor" and batch over data x fsdp.
      mask: which keys count.
      backend: a name of the table at the top of the module.
      ulysses: how many neighbours along "context" exchange heads; the others are joined by a ring. 0: as many as can.
      pattern: restricts what tokens see; with it all of "context" has to exchange heads.

    Raises:
      UserError: `ulysses` divides neither the context axis nor the heads; a pattern over a ring.
    """
    backend = resolve(backend, q, pattern)
    context, tensor = ways("context"), ways("tensor")
    split_heads = q.shape[2] % tensor == 0
    group = _group_size(q.shape[2] // (tensor if split_heads else 1), context, ulysses)
    if pattern is not None and group < context:
        raise UserError(
            f"a window of tiles can't be cut up by a ring: {context} ways of context exchange {group} heads"
        )
    if context == 1 and (backend not in KERNELS or math.prod(map(ways, (*BATCH_AXES, "tensor"))) == 1):
        out = BACKENDS[backend](q, k, v, mask[:, None], pattern)
    else:
        # A kernel is opaque to the partitioner, and so is an exchange: both are written for one device.
        batch = batch_axes(q.shape[0])
        tokens = PartitionSpec(batch, "context", "tensor" if split_heads else None)
        out = jax.shard_map(
            functools.partial(_exchanged, backend=backend, group=group, context=context, pattern=pattern),
            in_specs=(tokens, tokens, tokens, PartitionSpec(batch, "context")),
            out_specs=tokens,
            check_vma=False,
        )(q, k, v, mask)
    return out.reshape(*out.shape[:2], -1)


def resolve(backend: str, q: Array, pattern: Pattern | None = None) -> str:
    """The name of a backend, "auto" replaced by the choice for the platform that is traced for and queries q."""
    if backend != "auto":
        return backend
    where = platform()
    if where == "tpu" and q.shape[1] >= SHORT:
        return "splash"
    if where == "gpu" and pattern is None and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[1] >= SHORT:
        return "cudnn"
    return "chunked"


def causal_mask(mask: Bool[Array, "b j"]) -> Bool[Array, "b j j"]:
    """Which keys each query sees where it may look at itself and before, and only at what `mask` holds valid."""
    order = jnp.arange(mask.shape[1])
    return (order[:, None] >= order[None])[None] & mask[:, None]


def _group_size(heads: int, context: int, ulysses: int) -> int:
    group = ulysses or math.gcd(heads, context)
    if context % group or heads % group:
        raise UserError(f"ulysses is {group}; it must divide both the {context} ways of context and {heads} heads")
    return group


# One device's part of a sequence


def _exchanged(
    q: Array, k: Array, v: Array, mask: Array, *, backend: str, group: int, context: int, pattern: Pattern | None
) -> Array:
    """Attention of one device's tokens and heads to all tokens, by exchange within its group and a ring of groups."""
    if group > 1:
        groups = [[start + i for i in range(group)] for start in range(0, context, group)]
        swap = functools.partial(jax.lax.all_to_all, axis_name="context", axis_index_groups=groups, tiled=True)
        q, k, v = (swap(x, split_axis=2, concat_axis=1) for x in (q, k, v))
        mask = jax.lax.all_gather(mask, "context", axis=1, axis_index_groups=groups, tiled=True)
    if group < context:
        shift = tuple((i, (i + group) % context) for i in range(context))
        out = _ring(q, k, v, mask, Ring("splash" if backend == "splash" else "chunked", shift, context // group))
    else:
        if pattern is not None:  # which is told in the order of one device
            q, k, v, mask = (jnp.concatenate(part(x, pattern.text, group), axis=1) for x in (q, k, v, mask))
        out = BACKENDS[backend](q, k, v, mask[:, None], pattern)
        if pattern is not None:
            out = join(*jnp.split(out, [out.shape[1] - pattern.text], axis=1), group)  # pyright: ignore[reportCallIssue]
    return swap(out, split_axis=1, concat_axis=2) if group > 1 else out


# Kernels of whole sequences: (q, k, v, mask (b, 1 or i, j), pattern) -> (b, i, n, k)


def _xla(q: Array, k: Array, v: Array, mask: Array, pattern: Pattern | None) -> Array:
    """Spelled out: on CPU this is faster than the fused call, and small sequences need no flash attention."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    heads = jax.vmap(_head, in_axes=(1, 1, 1, None), out_axes=1)
    mask = _seen(mask, pattern)
    return jax.vmap(heads)(q, k, v, jnp.broadcast_to(mask, (q.shape[0], *mask.shape[1:])))


def _head(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """One head of one sample: queries (i, k), keys and values (j, k), mask (1 or i, j) -> (i, k).

    The division comes last, where there is less to divide.
    """
    scores = jnp.dot(q * (q.shape[-1] ** -0.5), k.T, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype)


def _scores(q: Array, k: Array, mask: Array) -> Float[Array, "b n i j"]:
    scores = jnp.einsum("binx,bjnx->bnij", q * (q.shape[-1] ** -0.5), k, preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None], scores, MASKED)


def _seen(mask: Array, pattern: Pattern | None, queries: Array | None = None) -> Array:
    """The mask and what a pattern leaves of it, for queries of the given groups; all of the sequence's unless given."""
    if pattern is None:
        return mask
    sees = jnp.asarray(pattern.sees)[pattern.group if queries is None else queries]
    return mask & sees[:, pattern.group][None]


def _jax(q: Array, k: Array, v: Array, mask: Array, pattern: Pattern | None) -> Array:
    return jax.nn.dot_product_attention(q, k, v, mask=_seen(mask, pattern)[:, None])


def _chunked(q: Array, k: Array, v: Array, mask: Array, pattern: Pattern | None) -> Array:
    """One group of queries after another, as many as `MAX_SCORES` allows: exact, in bounded memory.

    XLA writes all scores of a group out. On a CPU that is three times as fast where they stay in its caches (4,352
    tokens, 8 heads of 64), so samples and heads then take turns, too.
    """
    b, i, n, _ = q.shape
    alone = math.prod(map(ways, (*BATCH_AXES, "tensor"))) == 1
    if platform() == "cpu" and alone and b * n * i * k.shape[1] > CACHED_SCORES:
        return _by_heads(q, k, v, mask, pattern)
    return _by_queries(lambda q, mask: _xla(q, k, v, mask, None), _chunk_size(q, k), q, mask, pattern)


def _by_heads(q: Array, k: Array, v: Array, mask: Array, pattern: Pattern | None) -> Array:
    """One sample after another, one of its heads after another, and of a head some queries after others."""
    size = max(1, min(CACHED_SCORES, MAX_SCORES) // k.shape[1])
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))

    def sample(parts: tuple[Array, ...]) -> Array:
        *heads, mask = parts

        def head(parts: tuple[Array, ...]) -> Array:
            q, k, v = parts
            return _by_queries(lambda q, mask: _head(q[0], k, v, mask[0])[None], size, q[None], mask[None], pattern)[0]

        return jax.lax.map(head, tuple(x.swapaxes(0, 1) for x in heads)).swapaxes(0, 1)

    return jax.lax.map(sample, (q, k, v, jnp.broadcast_to(mask, (q.shape[0], *mask.shape[1:]))))


def _by_queries(
    attend: Callable[[Array, Array], Array], size: int, q: Array, mask: Array, pattern: Pattern | None
) -> Array:
    """attend(queries, mask) of at most `size` queries (b, i, ...) at a time, in groups of equal size."""
    i = q.shape[1]
    if size >= i:
        return attend(q, _seen(mask, pattern))
    size = -(-i // -(-i // size))
    mask = jnp.broadcast_to(mask, (q.shape[0], mask.shape[1] if mask.shape[1] == 1 else i, mask.shape[2]))
    queries = (q, mask) if pattern is None else (q, mask, jnp.asarray(pattern.group)[None])

    # The backward pass makes a group's scores anew: those of all groups at once are what there is no room for.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(q: Array, mask: Array, group: Array | None = None) -> Array:
        return attend(q, mask if group is None else _seen(mask, pattern, group[0]))

    return _by_chunks(one, size, *queries)


def _chunk_size(q: Array, k: Array) -> int:
    """How many queries make at most `MAX_SCORES` scores on one device; no more than there are."""
    return min(max(1, MAX_SCORES // (local_batch(q.shape[0]) * q.shape[2] * k.shape[1])), q.shape[1])


def _by_chunks(function: Callable[..., Any], size: int, *arrays: Array) -> Any:
    """`function` of `size` positions of axis 1 after another, of all arrays at once; results joined on axis 1.

    An array with one position there is given whole every time. What fills up the last chunk is zero.
    """
    total = arrays[0].shape[1]

    def chunks(x: Array) -> Array:
        return jnp.broadcast_to(x[None], (-(-total // size), *x.shape)) if x.shape[1] == 1 else _cut(x, size)

    out = jax.lax.map(lambda parts: function(*parts), tuple(map(chunks, arrays)))
    return jax.tree.map(lambda x: _joined(x, total), out)


def _cut(x: Array, size: int) -> Array:
    """(b, n, ...) -> (chunks, b, size, ...), filled up with zeros."""
    count = -(-x.shape[1] // size)
    return fill_up(x, count * size).reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)


def _joined(x: Array, total: int) -> Array:
    """The inverse of `_cut`: (chunks, b, size, ...) -> (b, total, ...)."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :total]


def _cudnn(q: Array, k: Array, v: Array, mask: Array, pattern: Pattern | None) -> Array:
    """cuDNN takes how many keys count, not which: those that do are put in front, which attention doesn't mind."""
    if pattern is not None or mask.shape[1] > 1:
        raise UserError('attention "cudnn" takes a mask of keys alone; use "chunked" with windows and causal masks')
    order = jnp.argsort(~mask[:, 0], axis=1, stable=True)[:, :, None, None]
    k, v = (jnp.take_along_axis(x, order, axis=1) for x in (k, v))
    lengths = {
        "query_seq_lengths": jnp.full(q.shape[0], q.shape[1], jnp.int32),
        "key_value_seq_lengths": mask[:, 0].sum(1, dtype=jnp.int32),
    }
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **lengths)  # pyright: ignore[reportCallIssue]


def _splash(q: Array, k: Array, v: Array, mask: Array, pattern: Pattern | None) -> Array:
    if mask.shape[1] > 1:
        raise UserError('attention "splash" takes a mask of keys alone; use "chunked" with causal masks')
    kernel, inputs = _splash_call(q, k, v, mask[:, 0], pattern=pattern)
    return jax.vmap(kernel)(*inputs).swapaxes(1, 2)[:, : q.shape[1]]


def _splash_call(
    q: Array, k: Array, v: Array, mask: Array, *, pattern: Pattern | None = None, residuals: bool = False
) -> tuple[Any, tuple]:
    """The kernel for these shapes, and its inputs: (b, n, i, k) filled up to whole blocks, and which keys count."""
    heads, sizes = q.shape[2], [q.shape[1], k.shape[1]]
    block = _block(sizes, pattern)
    filled = [-(-size // block) * block for size in sizes]
    compute = next(size for size in (512, 256, LANES) if block % size == 0)
    blocks = splash.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), block),
        block_kv_compute=compute,
        block_kv_dkv_compute=compute,
    )
    seen = splash_mask.FullMask(tuple(filled)) if pattern is None else _SplashPattern(pattern, tuple(filled))
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            splash_mask.MultiHeadMask([seen] * heads),
            block_sizes=blocks,
            save_residuals=residuals,
            head_shards=1,
            q_seq_shards=1,
            interpret=platform() != "tpu",
        )
    padded = fill_up(q * (q.shape[-1] ** -0.5), filled[0]), fill_up(k, filled[1]), fill_up(v, filled[1])
    q, k, v = (x.swapaxes(1, 2) for x in padded)
    keys = fill_up(mask, filled[1]).astype(jnp.int32)
    return kernel, (q, k, v, splash.SegmentIds(jnp.ones((q.shape[0], filled[0]), jnp.int32), keys))


def _block(sizes: list[int], pattern: Pattern | None) -> int:
    """The kernel's block, within a tile where a pattern has tiles of whole vectors: so it skips what isn't seen."""
    if pattern is not None:
        tile = int(np.argmax(pattern.group != pattern.group[0]))
        if tile and tile % LANES == 0:
            return max(size for size in range(LANES, BLOCK + 1, LANES) if tile % size == 0)
    return min(BLOCK, -(-min(sizes) // LANES) * LANES)


class _SplashPattern(splash_mask.Mask):
    """A pattern as the kernel asks for it: block by block. What fills up the sequence sees and is seen like text."""

    def __init__(self, pattern: Pattern, shape: tuple[int, int]) -> None:
        self._pattern, self._shape = pattern, shape
        fill = pattern.group[-1]
        self._groups = [np.pad(pattern.group, (0, n - len(pattern.group)), constant_values=fill) for n in shape]

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (groups[one] for groups, one in zip(self._groups, index))
        return self._pattern.sees[rows][:, columns]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


Backend = Callable[[Array, Array, Array, Array, Pattern | None], Array]
BACKENDS: dict[str, Backend] = {"xla": _xla, "chunked": _chunked, "jax": _jax, "cudnn": _cudnn, "splash": _splash}
KERNELS = ("cudnn", "splash")  # opaque to the partitioner


# The ring. A part is the work of one kernel on the keys that are there: forward (q, k, v, mask) -> o (b, i, n, k) and
# lse (b, i, n), both float32; backward ((q, k, v, mask), o, lse, do) -> dq, dk, dv, o and lse being those of all keys.


class Ring(NamedTuple):
    """The kernel of its parts, one move as pairs (from, to) along "context", and how many parts there are."""

    kernel: str
    shift: tuple[tuple[int, int], ...]
    steps: int


def _forward_chunked(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
    def one(q: Array) -> tuple[Array, Array]:
        scores = _scores(q, k, mask[:, None])
        lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        out = jnp.einsum("bnij,bjnx->binx", jnp.exp(scores - lse).astype(v.dtype), v)
        return out.astype(jnp.float32), lse[..., 0].swapaxes(1, 2)

    return _by_chunks(one, _chunk_size(q, k), q)


def _backward_chunked(inputs: tuple[Array, ...], out: Array, lse: Array, dout: Array) -> tuple[Array, Array, Array]:
    """ds = p (do v^T - rowsum(do o)), p = exp(s - lse): flash attention's backward pass (arXiv 2205.14135)."""
    q, k, v, mask = inputs
    scale, product = q.shape[-1] ** -0.5, functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def step(total: tuple[Array, Array], rows: list[Array]) -> tuple[tuple[Array, Array], Array]:
        q, out, lse, dout = rows
        p = jnp.exp(_scores(q, k, mask[:, None]) - lse.swapaxes(1, 2)[..., None])
        delta = jnp.sum(dout.astype(jnp.float32) * out, axis=-1).swapaxes(1, 2)[..., None]
        ds = (p * (product("binx,bjnx->bnij", dout, v) - delta) * scale).astype(k.dtype)
        dk, dv = product("bnij,binx->bjnx", ds, q), product("bnij,binx->bjnx", p.astype(v.dtype), dout)
        return (total[0] + dk, total[1] + dv), product("bnij,bjnx->binx", ds, k)

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (dk, dv), dq = jax.lax.scan(step, zeros, [_cut(x, _chunk_size(q, k)) for x in (q, out, lse, dout)])
    return _joined(dq, q.shape[1]), dk, dv


def _forward_splash(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
    kernel, inputs = _splash_call(q, k, v, mask, residuals=True)
    out, (lse,) = jax.vmap(kernel)(*inputs)
    out, lse = (x.swapaxes(1, 2)[:, : q.shape[1]].astype(jnp.float32) for x in (out, lse))
    # With no key that counts the kernel divides by zero; such a part has no weight in the sum.
    some = mask.any(1)[:, None, None]
    return jnp.where(some[..., None], out, 0), jnp.where(some, lse, MASKED)


def _backward_splash(inputs: tuple[Array, ...], out: Array, lse: Array, dout: Array) -> tuple[Array, Array, Array]:
    """The kernel's own backward pass, told the output and lse of all keys; jax has no public name for it."""
    q, k, v, _ = inputs
    kernel, filled = _splash_call(*inputs)
    options = ("save_residuals", "mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name", "mask_function")
    given = [kernel.kwargs[name] for name in (*options, "attn_logits_soft_cap", "interpret")]

    def one(inputs: tuple[Any, ...], out: Array, lse: Array, dout: Array) -> tuple:
        saved = (*inputs, None, out, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
        return splash._splash_attention_bwd(*given, saved, dout)[3:6]  # pyright: ignore[reportCallIssue]

    rows = [fill_up(x, filled[0].shape[2]).swapaxes(1, 2) for x in (out, lse, dout.astype(q.dtype))]
    dq, dk, dv = (x.swapaxes(1, 2).astype(jnp.float32) for x in jax.vmap(one)(filled, *rows))
    return dq[:, : q.shape[1]] * (q.shape[-1] ** -0.5), dk[:, : k.shape[1]], dv[:, : v.shape[1]]


PARTS = {"chunked": (_forward_chunked, _backward_chunked), "splash": (_forward_splash, _backward_splash)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(q: Array, k: Array, v: Array, mask: Array, ring: Ring) -> Array:
    """Attention to the keys of all devices of a ring: (b, i, n, k) in q's dtype."""
    return _ring_forward(q, k, v, mask, ring)[0]


def _ring_forward(q: Array, k: Array, v: Array, mask: Array, ring: Ring) -> tuple[Array, tuple]:
    moved, forward = (k, v, mask), PARTS[ring.kernel][0]
    out, lse = forward(q, *moved)
    for _ in range(ring.steps - 1):
        moved = jax.lax.ppermute(moved, "context", ring.shift)
        new, new_lse = forward(q, *moved)
        total = jnp.logaddexp(lse, new_lse)
        out = jnp.exp(lse - total)[..., None] * out + jnp.exp(new_lse - total)[..., None] * new
        lse = total
    return out.astype(q.dtype), (q, k, v, mask, out, lse)


def _ring_backward(ring: Ring, saved: tuple, dout: Array) -> tuple:
    """Keys and values go round once more, and their gradients with them, which so come home."""
    q, k, v, mask, out, lse = saved
    dq, moved = jnp.zeros(q.shape, jnp.float32), (k, v, mask)
    grads = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    for step in range(ring.steps):
        if step:
            moved = jax.lax.ppermute(moved, "context", ring.shift)
        own, *new = PARTS[ring.kernel][1]((q, *moved), out, lse, dout)
        dq += own
        grads = jax.lax.ppermute(tuple(a + b for a, b in zip(grads, new)), "context", ring.shift)
    return dq.astype(q.dtype), grads[0].astype(k.dtype), grads[1].astype(v.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)
