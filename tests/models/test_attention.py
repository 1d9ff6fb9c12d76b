"""Attention against its definition: kernels, exchanges and rings over eight fake devices, windows of tiles."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from magic141_jax import sharding
from magic141_jax.aot import topology
from magic141_jax.errors import UserError
from magic141_jax.models import attention, mmdit, sequence
from magic141_jax.models.network import Network
from magic141_jax.sharding import MeshConfig

SPELLED_OUT = ("xla", "chunked", "jax")


@pytest.mark.parametrize("backend", SPELLED_OUT)
def test_attention_is_the_masked_softmax_average(backend, monkeypatch):
    monkeypatch.setattr(attention, "MAX_SCORES", 80)  # 4 queries at a time, the last time 1
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 5, 2, 8)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], bool)
    got = attention.attention(q, k, v, mask, backend=backend)
    for b in range(2):
        for n in range(2):
            scores = np.exp(q[b, :, n] @ k[b, mask[b], n].T / np.sqrt(8))
            want = scores / scores.sum(-1, keepdims=True) @ v[b, mask[b], n]
            np.testing.assert_allclose(got[b, :, n * 8 : n * 8 + 8], want, atol=1e-5)


@pytest.mark.parametrize("backend", SPELLED_OUT)
def test_each_query_sees_what_its_own_mask_says_and_heads_in_a_row_share_keys(backend, monkeypatch):
    monkeypatch.setattr(attention, "MAX_SCORES", 80)  # 2 queries at a time, the last time 1
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 5, 4, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, 5, 2, 8)).astype(np.float32)
    valid = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], bool)
    mask = attention.causal_mask(valid)
    got = attention.attention(q, k, v, mask, backend=backend)
    for b, i, n in np.ndindex(2, 5, 4):
        seen = [j for j in range(i + 1) if valid[b, j]]
        assert np.flatnonzero(mask[b, i]).tolist() == seen
        scores = np.exp(q[b, i, n] @ k[b, seen, n // 2].T / np.sqrt(8))
        np.testing.assert_allclose(got[b, i, 8 * n : 8 * n + 8], scores / scores.sum() @ v[b, seen, n // 2], atol=1e-5)


def gradients(function):
    """The backward pass of an attention."""
    return jax.grad(lambda q, k, v, mask: function(q, k, v, mask).sum(), (0, 1, 2))


@pytest.mark.parametrize("program", [lambda function: function, gradients], ids=["forward", "backward"])
def test_chunks_bound_the_memory_of_attention(program):
    q = jax.ShapeDtypeStruct((1, 4096, 8, 16), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 1, 4096), jnp.bool_)

    def temporary(backend, scores):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "MAX_SCORES", scores)
            compiled = (
                jax.jit(program(lambda *inputs: attention.BACKENDS[backend](*inputs, None)))
                .lower(q, q, q, mask)
                .compile()
            )
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 8 * 4096**2 * 4
    assert temporary("xla", 0) >= whole
    assert temporary("chunked", 8 * 4096 * 64) < whole / 8


@pytest.mark.parametrize("seen", ["keys", "causal", "window"])
def test_on_a_cpu_heads_take_turns(seen, monkeypatch):
    """Float32, forward and backward, within 2e-6 of all heads at once; never more than `CACHED_SCORES` scores."""
    layout = sequence.make((2, 4, 4), 8, tile=(1, 2, 4), window=(1, 3, 1))
    pattern = layout.pattern if seen == "window" else None
    (q, k, v, mask), cotangent = draw(40, 4)
    k, v = k[:, :, :2], v[:, :, :2]  # shared by two query heads each
    mask = np.asarray(attention.causal_mask(mask)) if seen == "causal" else mask[:, None]

    def program(backend):
        def call(q, k, v, mask):
            out = attention.BACKENDS[backend](q, k, v, mask, pattern)
            return out.reshape(*out.shape[:2], -1)

        return call

    want = value_and_gradients(program("xla"), (q, k, v, mask), cotangent)
    monkeypatch.setattr(attention, "CACHED_SCORES", 7 * 40)  # 7 queries at a time, in 6 groups: the last has 5
    compare(value_and_gradients(program("chunked"), (q, k, v, mask), cotangent), want)
    inside = str(jax.make_jaxpr(program("chunked"))(q, k, v, mask))
    assert "f32[7,40]" in inside and not re.search(r"f32\[[\d,]*40,40\]", inside)


def draw(tokens, heads, *, batch=2, width=16, dtype=np.float32):
    """q, k, v, a mask that hides a third of the keys, with a long run of them, and a cotangent."""
    rng = np.random.default_rng(tokens)
    q, k, v = rng.standard_normal((3, batch, tokens, heads, width)).astype(dtype)
    mask = rng.random((batch, tokens)) < 0.7
    mask[:, tokens // 2 : 3 * tokens // 4] = False
    return (q, k, v, mask), rng.standard_normal((batch, tokens, heads * width)).astype(dtype)


def value_and_gradients(function, inputs, cotangent):
    """A jitted attention's output and the gradients of q, k, v."""

    def program(q, k, v, mask, cotangent):
        out, back = jax.vjp(lambda q, k, v: function(q, k, v, mask), q, k, v)
        return (out, *back(cotangent))

    return jax.jit(program)(*inputs, cotangent)


def over(mesh, **options):
    return sharding.over(mesh, functools.partial(attention.joint_attention, **options))


def compare(got, want, atol=2e-6):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("sizes", "heads", "ulysses"),
    [
        ({"data": 1, "context": 8}, 8, 0),  # exchange alone
        ({"data": 1, "context": 8}, 3, 0),  # a ring alone: three heads can't be shared out
        ({"data": 1, "context": 8}, 8, 2),  # pairs exchange, four of them form a ring
        ({"data": 2, "context": 4}, 4, 1),
        ({"data": 1, "fsdp": 2, "tensor": 2, "context": 2}, 4, 0),
        ({"data": 1, "tensor": 4, "context": 2}, 4, 0),  # one head on a device: a ring of two
        ({"data": 1, "tensor": 4, "context": 2}, 6, 0),  # heads that tensor doesn't divide are held by all
    ],
)
def test_a_split_sequence_gives_the_numbers_of_one_device(sizes, heads, ulysses, monkeypatch):
    """Float32, forward and backward, within 2e-6; whole parts of the sequence are masked."""
    monkeypatch.setattr(attention, "MAX_SCORES", 200)  # and in chunks
    inputs, cotangent = draw(24, heads)
    want = value_and_gradients(attention.joint_attention, inputs, cotangent)
    mesh = sharding.make_mesh(MeshConfig(**sizes))
    placed = jax.device_put(inputs, NamedSharding(mesh, P(None, "context")))
    compare(value_and_gradients(over(mesh, ulysses=ulysses), placed, cotangent), want)


def test_tokens_travel_by_exchange_or_round_the_ring():
    inputs, _ = draw(24, 8)
    mesh = sharding.make_mesh(MeshConfig(data=1, context=8))
    placed = jax.device_put(inputs, NamedSharding(mesh, P(None, "context")))

    def collectives(ulysses):
        program = jax.jit(over(mesh, ulysses=ulysses)).lower(*placed).compile().as_text()
        return {kind for kind in ("all-to-all", "collective-permute") if f" {kind}" in program}

    assert collectives(8) == {"all-to-all"}
    assert collectives(1) == {"collective-permute"}
    assert collectives(4) == {"all-to-all", "collective-permute"}


@pytest.mark.parametrize("ulysses", [3, 16])
def test_groups_that_do_not_divide_are_refused(ulysses):
    inputs, _ = draw(24, 6)
    mesh = sharding.make_mesh(MeshConfig(data=1, context=8))
    with pytest.raises(UserError, match=f"ulysses is {ulysses}"):
        jax.jit(over(mesh, ulysses=ulysses)).lower(*inputs)


@pytest.mark.parametrize(("tokens", "heads"), [(100, 2), (200, 1)])
def test_the_splash_kernel_gives_the_same(tokens, heads):
    """In interpretation: lengths that no block divides, masked keys, forward and backward."""
    inputs, cotangent = draw(tokens, heads, batch=1, width=64)
    want = value_and_gradients(functools.partial(attention.joint_attention, backend="xla"), inputs, cotangent)
    compare(value_and_gradients(over(None, backend="splash"), inputs, cotangent), want, atol=5e-6)


@pytest.mark.parametrize("ulysses", [2, 1])
def test_the_splash_kernel_exchanges_and_goes_round(ulysses):
    inputs, cotangent = draw(96, 2, batch=1, width=64)
    want = value_and_gradients(functools.partial(attention.joint_attention, backend="xla"), inputs, cotangent)
    mesh = sharding.make_mesh(MeshConfig(data=1, context=2), devices=jax.devices()[:2])
    placed = jax.device_put(inputs, NamedSharding(mesh, P(None, "context")))
    compare(value_and_gradients(over(mesh, backend="splash", ulysses=ulysses), placed, cotangent), want, atol=5e-6)


def test_auto_chooses_by_platform(monkeypatch):
    long, short = (jnp.zeros((1, tokens, 1, 8), jnp.bfloat16) for tokens in (2048, 64))
    for platform, choice in {"tpu": "splash", "gpu": "cudnn", "cpu": "chunked"}.items():
        monkeypatch.setattr(attention, "platform", lambda platform=platform: platform)
        assert attention.resolve("auto", long) == choice and attention.resolve("xla", long) == "xla"
        assert attention.resolve("auto", short) == "chunked"
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    assert attention.resolve("auto", long.astype(jnp.float32)) == "chunked"  # cuDNN has none in 32 bits


@pytest.mark.parametrize("backend", attention.KERNELS)
def test_kernels_refuse_causal_masks(backend):
    (q, k, v, mask), _ = draw(8, 1)
    with pytest.raises(UserError, match="mask of keys alone"):
        attention.attention(q, k, v, attention.causal_mask(mask), backend=backend)


GRID, TEXT = (3, 5, 4), 6


def windowed(backend, mesh=None, *, tile=(2, 2, 2), window=(1, 3, 1), heads=2, width=16, ulysses=0):
    """Output and gradients of windowed attention for tokens in grid order, through a layout, on a mesh."""
    inputs, cotangent = draw(int(np.prod(GRID)) + TEXT, heads, width=width, batch=1)

    def attend(*inputs):
        layout = sequence.make(GRID, TEXT, tile=tile, window=window)
        count = int(np.prod(GRID))

        def place(x):
            return layout.join(layout.video(x[:, :count]), layout.words(x[:, count:]))

        options = {"backend": backend, "pattern": layout.pattern, "ulysses": ulysses}
        video, words = layout.part(attention.joint_attention(*map(place, inputs), **options))
        return jnp.concatenate([layout.grid(video), words[:, :TEXT]], axis=1)

    placed = inputs if mesh is None else jax.device_put(inputs, sharding.replicated(mesh))
    return value_and_gradients(sharding.over(mesh, attend), placed, cotangent), inputs, cotangent


def reference(inputs, cotangent, tile, window):
    """The same with a mask that is spelled out for every pair of tokens."""
    count = int(np.prod(GRID))
    places = np.stack(np.unravel_index(np.arange(count), GRID), 1)
    sees = np.ones((count + TEXT, count + TEXT), bool)
    for axis, (size, length, width) in enumerate(zip(GRID, tile, window)):
        parts = np.array_split(np.arange(size), -(-size // length))
        of = np.concatenate([np.full(len(part), i) for i, part in enumerate(parts)])[places[:, axis]]
        for i, j in np.ndindex(count, count):
            middle = of[i] if len(parts) <= width else min(max(of[i], width // 2), len(parts) - 1 - width // 2)
            sees[i, j] &= len(parts) <= width or abs(of[j] - middle) <= width // 2
    assert not sees.all() and sees[:, count:].all() and sees[count:].all()

    def attend(q, k, v, mask):
        return attention.attention(q, k, v, mask[:, None] & sees[None])

    return value_and_gradients(attend, inputs, cotangent)


@pytest.mark.parametrize("backend", ["xla", "chunked", "jax", "splash"])
def test_windows_of_tiles_are_those_of_the_definition(backend, monkeypatch):
    """Forward and backward; five rows make tiles of two and one, which are filled up."""
    monkeypatch.setattr(attention, "MAX_SCORES", 2000)
    got, inputs, cotangent = windowed(backend)
    compare(got, reference(inputs, cotangent, (2, 2, 2), (1, 3, 1)), atol=5e-6)


def test_windows_on_a_split_sequence():
    mesh = sharding.make_mesh(MeshConfig(data=4, context=2))
    got, inputs, cotangent = windowed("auto", mesh)
    compare(got, reference(inputs, cotangent, (2, 2, 2), (1, 3, 1)))
    with pytest.raises(UserError, match="can't be cut up by a ring"):
        windowed("auto", mesh, ulysses=1)


def test_the_splash_kernel_skips_tiles_that_are_not_seen():
    """Blocks are tiles where these are whole vectors: what the kernel visits is what is seen, and no more."""
    layout = sequence.make((2, 16, 16), 8, tile=(1, 16, 8), window=(1, 1, 1))
    q = jnp.zeros((1, len(layout.order) + 8, 1, 64))
    kernel, _ = attention._splash_call(q, q, q, jnp.ones(q.shape[:2], bool), pattern=layout.pattern)
    assert kernel.kwargs["block_sizes"].block_q == 128
    visited = np.asarray(kernel.fwd_mask_info.block_mask)[0]
    # A row of four tiles visits its own and the text; that of the text visits all.
    assert (visited > 0).sum(1).tolist() == [2, 2, 2, 2, 5]


def test_cudnn_serves_gpus(monkeypatch):
    """Lowered for a GPU that is not there, which is asked no more than its library's version."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(library, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda capability: False)
    inputs, _ = draw(100, 2, width=64)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs[:3])

    def loss(q, k, v, mask):
        return attention.joint_attention(q, k, v, mask, backend="cudnn").astype(jnp.float32).sum()

    program = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v, inputs[3]).lower(lowering_platforms=("cuda",))
    assert all(f"__cudnn$fmhaSoftmax{phase}" in program.as_text() for phase in ("(", "Backward"))


def test_cudnn_is_told_how_many_keys_count(monkeypatch):
    """XLA stands in for cuDNN, with the same arguments: keys that count come first, and nothing else changes."""
    given, (inputs, _) = jax.nn.dot_product_attention, draw(40, 2)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, implementation, **rest: given(*x, **rest))
    got = attention.joint_attention(*inputs, backend="cudnn")
    np.testing.assert_allclose(got, attention.joint_attention(*inputs, backend="xla"), atol=1e-5)


@pytest.mark.heavy
def test_kernel_and_ring_are_in_the_program_of_a_tpu_slice():
    """A whole network, forward and backward: eight chips as two pairs that exchange heads, in a ring."""
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is in requirements-dev.txt")
    mesh = sharding.make_mesh(MeshConfig(data=2, context=4), devices=topology.make("v6e:2x4").devices)
    config = dataclasses.replace(
        mmdit.debug(),
        width=256,
        heads=2,
        head_width=128,
        rope_axes=(16, 56, 56),
        remat="full",
        compute_dtype="bfloat16",
    )
    network = Network.create(mmdit.MMDiT, config)
    where = sharding.shardings(network.abstract_params, mesh, mmdit.SHARDING_RULES)
    params = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), network.abstract_params, where
    )
    shapes = [(2, 5, 32, 32, 9), (2,), (2, 30, 12), (2, 30), (2, 12)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.batch_sharding(mesh)) for shape in shapes]

    def loss(params, *inputs):
        return jnp.square(network(params, *inputs)).mean()

    program = jax.jit(sharding.over(mesh, jax.grad(loss))).lower(params, *inputs).compile().as_text()
    kernels = set(re.findall(r"%splash_mha_(fwd|dq|dkv)_\S+ = .*custom-call.*tpu_custom_call", program))
    assert kernels == {"fwd", "dq", "dkv"}
    moved = re.findall(r"collective-permute-start\(.*?source_target_pairs=\{([\d,{}]*)\}", program)
    assert any("{0,2}" in pairs for pairs in moved), "the ring, from one pair of chips to the next"
    assert " all-to-all(" in program, "the exchange within a pair"
