"""Kernels in fewer bytes: against unpacking in NumPy, in their dtypes everywhere, a layer at a time, over a mesh."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from magic141_jax import sharding, weights
from magic141_jax.errors import UserError
from magic141_jax.models import lora, mmdit, stored
from magic141_jax.models.encoder import Encoder, EncoderConfig
from magic141_jax.models.hunyuan_vae import SHARDING_RULES as VAE_RULES
from magic141_jax.models.hunyuan_vae import CausalConv3d
from magic141_jax.models.kl_vae import ImageConv
from magic141_jax.models.layers import Linear
from magic141_jax.models.mmdit import MMDiT
from magic141_jax.models.network import Network
from magic141_jax.models.stored import QUANTIZED, Form
from magic141_jax.pytree import flatten, unflatten
from magic141_jax.sharding import MeshConfig, make_mesh

ROWS, COLUMNS, LAYERS = 64, 3, 2
DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "int8": np.int8,
    "int4": np.uint8,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}
KEEPS = (None, (2, 4), (4, 8), (32, 64), (26, 0))
FORMS = [
    Form(values, keep, group)
    for values in DTYPES
    for keep in KEEPS
    for group in ((0, 16) if values in QUANTIZED else (0,))
]


class Maps(nnx.Module):
    """Linear maps of one shape, or stacks of them."""

    def __init__(self, config, *, rngs):
        rows, columns, layers, count = config
        self.maps = nnx.List([Linear(rows, columns, layers=layers, rngs=rngs) for _ in range(count)])

    def __call__(self, x):
        return [each(x) for each in self.maps]


class Chain(nnx.Module):
    """Stacked square maps, scanned; the dtypes that the scan hands out are kept in `seen` when it is traced."""

    seen: tuple = ()

    def __init__(self, config, *, rngs):
        width, layers = config
        self.maps = Linear(width, width, layers=layers, rngs=rngs, bias=False)

    def __call__(self, x):
        graphdef, state = nnx.split(self.maps)

        def step(x, own):
            layer = nnx.merge(graphdef, own)
            Chain.seen = tuple(leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer.kernel)))
            return jnp.tanh(layer(x)), None

        return jax.lax.scan(step, x, state)[0]


class Convolutions(nnx.Module):
    """Of pictures and of clips."""

    def __init__(self, config, *, rngs):
        self.image, self.video = ImageConv(*config, rngs=rngs), CausalConv3d(*config, rngs=rngs)

    def __call__(self, x):
        return self.image(x), self.video(x)


def regular_mask(rng, keep, shape):
    """A random mask (..., rows, out) that keeps n of every m rows of each column."""
    n, m = keep
    *stack, rows, columns = shape
    order = rng.random((*stack, rows // (m or rows), m or rows, columns)).argsort(-2)
    return (order < n).reshape(shape)


def random_parts(form, rows=ROWS, columns=COLUMNS, layers=(LAYERS,), seed=0):
    """Random parts of a kernel, as the docstring of `models.stored` says that they look."""
    rng = np.random.default_rng(seed)
    kept = rows if form.keep is None else form.keep[0] * (rows // form.keep[1] if form.keep[1] else 1)
    draws = {"int8": lambda s: rng.integers(-128, 128, s), "int4": lambda s: rng.integers(0, 256, s)}
    shape = (*layers, kept // (2 if form.values == "int4" else 1), columns)
    parts = {"values": draws.get(form.values, lambda s: rng.normal(0, 0.2, s))(shape).astype(DTYPES[form.values])}
    if form.keep:
        mask = regular_mask(rng, form.keep, (*layers, rows, columns))
        parts["mask"] = np.packbits(mask, axis=-2, bitorder="little")
    if form.values in QUANTIZED:
        scale = rng.uniform(0.01, 0.1, (*layers, rows // (form.group or rows), columns))
        parts["scale"] = scale.astype(ml_dtypes.bfloat16 if form.group else np.float32)
    return parts


def unpack(parts, form, rows=ROWS):
    """The dense kernel (..., rows, out) in float64, value by value."""
    values = parts["values"]
    if form.values == "int4":
        halves = np.stack([values & 15, values >> 4], axis=-2).reshape(*values.shape[:-2], -1, values.shape[-1])
        values = (halves.astype(int) ^ 8) - 8
    dense = np.zeros((*values.shape[:-2], rows, values.shape[-1]))
    for *stack, column in np.ndindex(*values.shape[:-2], values.shape[-1]):
        there = range(rows)
        if form.keep:
            bits = parts["mask"][(*stack, slice(None), column)]
            there = [row for row in range(rows) if bits[row // 8] >> (row % 8) & 1]
        dense[(*stack, there, column)] = values[(*stack, slice(None), column)].astype(float)
    if "scale" in parts:
        dense *= np.repeat(parts["scale"].astype(float), form.group or rows, axis=-2)
    return dense


def name_of(form):
    return f"{form.values}-{form.keep}-{form.group}"


def mapped(forms, rows=ROWS, columns=COLUMNS, layers=LAYERS):
    """A network with a map in each form, its random parameters, and the dense kernels."""
    network = Network.create(Maps, (rows, columns, layers, len(forms)))
    small = stored.stored(network, {f"maps.{i}.kernel": form for i, form in enumerate(forms)})
    stack = () if layers is None else (layers,)
    parts = [random_parts(form, rows, columns, stack, seed=i) for i, form in enumerate(forms)]
    bias = np.zeros((*stack, columns), np.float32)
    params = {"maps": {str(i): {"kernel": part, "bias": bias} for i, part in enumerate(parts)}}
    return small, params, [unpack(part, form, rows) for part, form in zip(parts, forms)]


def dtypes(tree):
    return {path: leaf.dtype for path, leaf in flatten(tree).items()}


@pytest.mark.parametrize("values", DTYPES)
def test_every_form_is_what_numpy_unpacks(values):
    forms = [form for form in FORMS if form.values == values]
    network, params, wanted = mapped(forms)
    assert dtypes(network.abstract_params) == dtypes(params), "the network expects what was drawn"
    expanded = flatten(jax.jit(lambda params: stored.dense(network, params))(params))
    assert len(expanded) == 2 * len(forms)
    for i, (form, want) in enumerate(zip(forms, wanted)):
        have = expanded[f"maps.{i}.kernel"]
        assert have.dtype == jnp.float32
        np.testing.assert_allclose(have, want, rtol=1e-6, err_msg=name_of(form))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_of_the_unpacked_kernel(dtype):
    forms = [form for form in FORMS if form.keep in (None, (2, 4), (26, 0))]
    network, params, wanted = mapped(forms, layers=None)
    x = np.random.default_rng(1).normal(size=(2, 5, ROWS)).astype(dtype)
    made = jax.jit(network.__call__)(params, x)
    for form, have, want in zip(forms, made, wanted, strict=True):
        assert have.dtype == dtype
        want = x.astype(np.float32) @ want
        bound = (1e-5 if dtype == jnp.float32 else 0.02) * np.abs(want).max()
        np.testing.assert_allclose(have.astype(jnp.float32), want, atol=bound, err_msg=name_of(form))


@pytest.mark.parametrize("keep", [None, (2, 4)])
def test_integer_products(keep):
    """Each token is scaled by its own largest value, and integers are multiplied, not what they stand for."""
    form = Form("int8", keep, activations="int8")
    network, params, _ = mapped([form], layers=None)
    x = np.random.default_rng(1).normal(size=(5, ROWS)).astype(np.float32)
    x[:, 0] = 4  # the largest, which is clipped to 127; a negative one would be at a tie of -127 and -128
    x *= np.float32([[1], [10], [0.1], [1], [0]])
    step = np.maximum(np.abs(x).max(1, keepdims=True), 1e-30) / 127.5
    rounded = np.clip(np.round(x / step), -128, 127)
    parts = params["maps"]["0"]["kernel"]
    want = rounded @ unpack({**parts, "scale": np.ones((1, COLUMNS))}, form) * step * parts["scale"]
    lowered = jax.jit(network.__call__).lower(params, x)
    np.testing.assert_allclose(lowered.compile()(params, x)[0], want, rtol=1e-5, atol=1e-6)
    assert re.search(r"dot_general.*tensor<\w+xi8>, tensor<\w+xi8>\) -> tensor<\w+xi32>", lowered.as_text())


@pytest.mark.parametrize("values", DTYPES)
def test_dtypes_last(values, tmp_path):
    """Under jit, inside a scan, on disk, and where the rest of the network is cast: nothing is widened in silence."""
    form = Form(values, (2, 4), 16 if values in QUANTIZED else 0)
    network = stored.stored(Network.create(Chain, (32, 3)), {"maps.kernel": form})
    params = {"maps": {"kernel": random_parts(form, 32, 32, (3,))}}
    want = dtypes(params)
    assert want["maps.kernel.values"] == DTYPES[values]
    assert dtypes(network.abstract_params) == want
    assert dtypes(jax.jit(lambda tree: tree)(params)) == want
    x = np.ones((2, 32), np.float32)
    made = jax.jit(network.__call__)(params, x)
    assert set(Chain.seen) == set(want.values()), "what the scan hands to a layer"
    looped = x
    for layer in unpack(params["maps"]["kernel"], form, 32):
        looped = np.tanh(looped @ layer)
    np.testing.assert_allclose(made, looped, atol=1e-5)
    weights.save(tmp_path / "net", {"model": "test"}, params)
    read = weights.load(tmp_path / "net")[1]
    assert dtypes(read) == want
    jax.tree.map(np.testing.assert_array_equal, read, params)
    beside = {**jax.tree.map(jnp.asarray, params), "norm": {"scale": jnp.ones(3)}, "count": jnp.arange(3)}
    assert dtypes(stored.cast(beside, jnp.bfloat16)) == {**want, "norm.scale": jnp.bfloat16, "count": jnp.int32}


def test_a_fresh_network_is_stored_too():
    network, params, _ = mapped([Form("int4", (2, 4), 16)])
    assert dtypes(network.init(jax.random.key(0))) == dtypes(params)


def test_bytes_are_those_of_the_docstring():
    network, _, _ = mapped(FORMS, rows=128, columns=8)
    for form, each in zip(FORMS, (network.abstract_params["maps"][str(i)] for i in range(len(FORMS)))):
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(each["kernel"]))
        width = {"float32": 2, "bfloat16": 1, "int8": 1 / 2, "int4": 1 / 4, "float8_e4m3fn": 1 / 2}[form.values]
        n, m = form.keep or (1, 1)
        share = width * n / (m or 128) + (1 / 16 if form.keep else 0)
        if form.values in QUANTIZED:
            share += 1 / form.group if form.group else 2 / 128
        assert held / (2 * LAYERS * 128 * 8) == pytest.approx(share), name_of(form)


@pytest.mark.parametrize("form", [Form("int4", (2, 4)), Form("bfloat16", (36, 0)), Form("int8")], ids=name_of)
def test_convolutions(form):
    """The taps of a kernel count as rows, of pictures (rank 4) and of clips (rank 5)."""
    network = Network.create(Convolutions, (8, 3))
    small = stored.stored(network, {"image.kernel": form, "video.kernel": form})
    params, whole = small.init(jax.random.key(0)), {}
    for name, taps in (("image", (3, 3)), ("video", (3, 3, 3))):
        rows = 8 * np.prod(taps)
        params[name]["kernel"] = random_parts(form, rows, 3, ())
        whole[name] = {**params[name], "kernel": np.float32(unpack(params[name]["kernel"], form, rows))}
        whole[name]["kernel"] = whole[name]["kernel"].reshape(*taps, 8, 3)
    expanded = stored.dense(small, params)
    jax.tree.map(np.testing.assert_array_equal, expanded, whole)
    x = np.random.default_rng(1).normal(size=(1, 2, 4, 4, 8)).astype(np.float32)
    for have, want in zip(jax.jit(small.__call__)(params, x), jax.jit(network.__call__)(whole, x), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-4)


def small_encoder(layers, form, paths=r"kernel$", **sizes):
    network = Network.create(Encoder, EncoderConfig(layers=layers, **sizes))
    kernels = {path: leaf.shape for path, leaf in flatten(network.abstract_params).items() if re.search(paths, path)}
    small = stored.stored(network, dict.fromkeys(kernels, form))
    rng = np.random.default_rng(0)
    flat = {k: np.float32(rng.normal(1, 0.1, v.shape)) for k, v in flatten(small.abstract_params).items()}
    for path, (stack, rows, columns) in kernels.items():
        flat |= {f"{path}.{k}": v for k, v in random_parts(form, rows, columns, (stack,), seed=len(path)).items()}
    return network, small, unflatten(flat)


@pytest.mark.parametrize("form", [Form("int4", (2, 4), 8), Form("bfloat16", (5, 0))], ids=name_of)
def test_a_stack_of_encoder_layers(form):
    network, small, params = small_encoder(3, form, width=16, heads=2, mlp=24)
    assert flatten(params)["layers.mlp_in.kernel.values"].shape[0] == 3
    x, mask = jax.random.normal(jax.random.key(1), (2, 5, 16)), np.ones((2, 5), bool)
    whole = stored.dense(small, params)
    have, want = jax.jit(small.__call__)(params, x, mask), jax.jit(network.__call__)(whole, x, mask)
    np.testing.assert_allclose(have, want, atol=1e-4)


@pytest.mark.parametrize("form", [Form("int4", (4, 8), 32), Form("int8", (48, 0)), Form("int8")], ids=name_of)
def test_one_layer_is_dense_at_a_time(form):
    """Temporary memory hardly grows with depth; where the whole stack is expanded, it does.

    Not so of bfloat16 values on a CPU, which slices them as float32 and so widens all layers before the scan.
    """
    x, mask = jnp.ones((1, 2, 96)), np.ones((1, 2), bool)
    layer = 4 * (4 * 96 * 96 + 2 * 96 * 384)

    def temporary(layers, whole):
        network, small, _ = small_encoder(layers, form, width=96, heads=2, mlp=384)
        run = (lambda p, x: network(stored.dense(small, p), x, mask)) if whole else (lambda p, x: small(p, x, mask))
        return jax.jit(run).lower(small.abstract_params, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(12, False) - temporary(2, False) < 2 * layer
    if form.keep is None:
        assert temporary(12, True) - temporary(2, True) > 5 * layer, "else the comparison means nothing"


def test_nibbles_and_bits_come_back():
    rng = np.random.default_rng(0)
    values = rng.integers(-8, 8, (3, 6, 5)).astype(np.int8)
    packed = stored.to_nibbles(jnp.asarray(values))
    assert packed.shape == (3, 3, 5) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed[0, 0] & 15, values[0, 0] & 15, err_msg="the even row in the low half")
    np.testing.assert_array_equal(stored.from_nibbles(packed), values)
    assert stored.from_nibbles(packed).dtype == jnp.int8
    mask = rng.random((2, 16, 3)) < 0.5
    packed = stored.pack_bits(jnp.asarray(mask))
    np.testing.assert_array_equal(packed, np.packbits(mask, axis=-2, bitorder="little"))
    assert packed[0, 0, 0] & 1 == mask[0, 0, 0]


@pytest.mark.parametrize(
    ("form", "rows", "message"),
    [
        ({"keep": (2, 4)}, 66, "66 rows can't keep 2 of every 4"),
        ({"keep": (0, 4)}, 64, "64 rows can't keep 0 of every 4"),
        ({"keep": (5, 4)}, 64, "64 rows can't keep 5 of every 4"),
        ({"keep": (65, 0)}, 64, "64 rows can't keep 65 of every 64"),
        ({"keep": (2, 4)}, 12, "a mask of 12 rows: packed kernels have a multiple of 8 rows"),
        ({"values": "int8", "group": 24}, 64, "64 rows don't divide into groups of 24"),
        ({"values": "int4"}, 63, "int4 values stand two in a byte, and 63 rows are kept"),
        ({"values": "int4", "keep": (3, 0)}, 64, "int4 values stand two in a byte, and 3 rows are kept"),
    ],
)
def test_what_does_not_suit_a_kernel_is_told(form, rows, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Form(**form).check(rows)
    with pytest.raises(UserError, match=re.escape(f"maps.0.kernel: {message}")):
        stored.stored(Network.create(Maps, (rows, 2, None, 1)), {"maps.0.kernel": Form(**form)})


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"values": "bfloat16", "group": 8}, "bfloat16 values have no scales"),
        ({"values": "int8", "group": -8}, "groups of -8 rows that share"),
        ({"values": "bfloat16", "activations": "int8"}, "need quantized weights"),
        ({"values": "int8", "group": 8, "activations": "int8"}, "need quantized weights with a scale a column"),
    ],
)
def test_forms_that_make_no_sense(form, message):
    with pytest.raises(UserError, match=message):
        Form(**form)


def test_forms_are_read_from_json():
    found = stored.read_forms({"a.kernel": {"values": "int8", "keep": [2, 4]}}, "x/config.json")
    assert found == {"a.kernel": Form("int8", (2, 4))}
    for wrong, message in (
        ({"a.kernel": {"value": "int8"}}, "x/config.json a.kernel.value.*'values'"),
        ({"a.kernel": {"values": "int9"}}, "'int8'"),
        ({"a.kernel": 3}, r"x/config.json: 'kernels'"),
        ([1], r"x/config.json: 'kernels'"),
    ):
        with pytest.raises(UserError, match=message):
            stored.read_forms(wrong, "x/config.json")


@pytest.mark.parametrize("path", ["maps.0", "maps.0.bias", "maps.1.kernel", ".kernel", "maps.0.kernel.values"])
def test_an_unknown_path_is_refused(path):
    network = Network.create(Maps, (ROWS, COLUMNS, None, 1))
    with pytest.raises(UserError, match="has no kernel"):
        stored.stored(network, {"maps.0.kernel": Form(), path: Form()})


def test_parts_are_told_by_their_path():
    assert all(stored.is_part(f"a.b.kernel.{part}") for part in ("values", "mask", "scale"))
    assert not any(map(stored.is_part, ("a.kernel", "a.norm.scale", "kernel.values.x", "a.mask")))


def test_adapters_stand_beside_a_stored_stack():
    """A kernel's shape is that of the dense one, its layers included, so that a LoRA finds its sides."""
    form = Form("int8")
    network = stored.stored(Network.create(Chain, (32, 3)), {"maps.kernel": form})
    assert network.bind(network.init(jax.random.key(0))).maps.kernel.shape == (3, 32, 32)
    adapted = lora.adapted(network, 2)
    shapes = {path: leaf.shape for path, leaf in flatten(adapted.abstract_params).items() if lora.is_adapter(path)}
    assert shapes == {"maps.a": (3, 32, 2), "maps.b": (3, 2, 32)}
    params = {"maps": {"kernel": random_parts(form, 32, 32, (3,))}}
    fresh = lora.join(params, lora.fresh(adapted, jax.random.key(0)))
    x = np.ones((2, 32), np.float32)
    np.testing.assert_allclose(adapted(fresh, x), network(params, x), atol=1e-6)


def test_columns_of_stored_convolutions_are_split():
    """The rules of a VAE, whose kernels have five axes, also lay their parts, which have two."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    form = Form("int8", (2, 4))
    tree = {"decoder": {"conv1": {"kernel": random_parts(form, 27 * 8, 4, ())}}}
    laid = flatten(sharding.lay(tree, mesh, VAE_RULES))
    assert {leaf.sharding.shard_shape(leaf.shape)[-1] for leaf in laid.values()} == {2}
    whole = {"decoder": {"conv1": {"kernel": np.zeros((3, 3, 3, 8, 4), np.float32)}}}
    kernel = sharding.lay(whole, mesh, VAE_RULES)["decoder"]["conv1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 3, 3, 8, 2)


def test_parts_are_split_over_a_mesh():
    """Eight devices give the outputs of one, each with its part of the bytes."""
    config = dataclasses.replace(
        mmdit.debug(), width=32, heads=4, head_width=8, double_blocks=2, single_blocks=2, refiner_blocks=0
    )
    network = Network.create(MMDiT, config)
    paths = [path for path in flatten(network.abstract_params) if re.search(r"blocks\..*kernel$", path)]
    forms = {
        path: Form("int4", (2, 4), 8) if "qkv" in path else Form("int8", (10, 0)) if "out" in path else Form("int8")
        for path in paths
    }
    small = stored.stored(network, forms)
    flat = flatten(jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), small.abstract_params))
    rng = np.random.default_rng(3)
    flat = {k: v if stored.is_part(k) else np.float32(rng.normal(0, 0.2, v.shape)) for k, v in flat.items()}
    for path, form in forms.items():
        stack, rows, columns = flatten(network.abstract_params)[path].shape
        parts = random_parts(form, rows, columns, (stack,), seed=len(path))
        parts["scale"] = (parts["scale"] / (10 if form.values == "int4" else 100)).astype(parts["scale"].dtype)
        flat |= {f"{path}.{name}": value for name, value in parts.items()}
    params = unflatten(flat)
    keys = jax.random.split(jax.random.key(7), 3)
    x, text = jax.random.normal(keys[0], (2, 2, 4, 4, 9)), jax.random.normal(keys[1], (2, 6, 12))
    args = [x, jnp.array([0.3, 0.8]), text, jnp.ones((2, 6), bool), text[:, 0]]
    want = jax.jit(small.__call__)(params, *args)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, context=2))
    laid = sharding.lay(params, mesh, mmdit.SHARDING_RULES)
    qkv = laid["double_blocks"]["video"]["qkv"]["kernel"]
    shards = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in qkv.items()}
    # (2, 32, 96): rows over fsdp x context, columns over tensor
    assert {name: leaf.shape for name, leaf in qkv.items()} == {
        "values": (2, 8, 96),
        "mask": (2, 4, 96),
        "scale": (2, 4, 96),
    }
    assert shards == {"values": (2, 2, 48), "mask": (2, 1, 48), "scale": (2, 1, 48)}
    have = jax.jit(sharding.over(mesh, small.__call__))(laid, *sharding.spread(args, mesh))
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(have, want, atol=2e-5 * float(np.abs(want).max()))
