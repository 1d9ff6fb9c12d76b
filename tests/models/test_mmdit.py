"""Invariants of the transformer: batch, padding, depth, recomputation, sharding rules, initial output."""

import dataclasses
import functools
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax import sharding
from magic141_jax.diffusion import conditioning
from magic141_jax.errors import UserError
from magic141_jax.models.mmdit import SHARDING_RULES, SIZES, MMDiT, debug
from magic141_jax.models.network import Network, apart
from magic141_jax.models.seam import velocity_fn
from magic141_jax.pytree import count, flatten

CONFIG = dataclasses.replace(debug(), double_blocks=2, single_blocks=3)


def random_params(network):
    """Every parameter random, so that nothing hides behind the zero initialisation."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), network.abstract_params
    )


@pytest.fixture(scope="module")
def network():
    return Network.create(MMDiT, CONFIG)


@pytest.fixture(scope="module")
def params(network):
    return random_params(network)


@pytest.fixture(scope="module")
def apply(network):
    """The compiled forward pass, compiled once for all tests with the same shapes."""
    return jax.jit(lambda params, *args: network(params, *args))


def inputs(batch=2, channels=9):
    keys = jax.random.split(jax.random.key(7), 4)
    x = jax.random.normal(keys[0], (batch, 2, 4, 4, channels))
    t = jnp.linspace(0.2, 0.9, batch)
    text = jax.random.normal(keys[1], (batch, 6, 12))
    mask = jnp.arange(6)[None] < jnp.array([6, 3, 0, 4])[:batch, None]
    return [x, t, text, mask, jax.random.normal(keys[2], (batch, 12))]


def test_a_fresh_network_predicts_zero(network, apply):
    params = network.init(jax.random.key(0))
    assert jnp.abs(params["double_blocks"]["text"]["qkv"]["kernel"]).min() > 0
    out = apply(params, *inputs())
    assert out.shape == (2, 2, 4, 4, 4) and out.dtype == jnp.float32
    assert not out.any()


def test_batch_composition_does_not_matter(apply, params):
    args = inputs(4)  # the third row has no text at all
    together = apply(params, *args)
    alone = jnp.concatenate([apply(params, *(a[i : i + 1] for a in args)) for i in range(4)])
    assert jnp.isfinite(together).all()
    np.testing.assert_allclose(together, alone, atol=2e-5)


def test_padded_text_changes_nothing(apply, params):
    x, t, text, mask, pooled = inputs()
    out = apply(params, x, t, text, mask, pooled)
    garbage = jnp.where(mask[:, :, None], text, 1e3)
    np.testing.assert_allclose(apply(params, x, t, garbage, mask, pooled), out, atol=1e-5)
    short = apply(params, *(a[1:, :3] if a.shape[:2] == (2, 6) else a[1:] for a in (x, t, text, mask, pooled)))
    np.testing.assert_allclose(short, out[1:], atol=2e-5)


@pytest.mark.parametrize("which", range(5))
def test_every_input_matters(apply, params, which):
    args = inputs()
    out = apply(params, *args)
    changed = args.copy()
    changed[which] = ~args[3] if which == 3 else args[which] * 0.5
    assert jnp.abs(apply(params, *changed) - out).max() > 1e-3


def test_positions_matter_to_video_tokens(apply, params):
    x, *rest = inputs()
    flipped = apply(params, x[:, :, ::-1], *rest)[:, :, ::-1]
    assert jnp.abs(flipped - apply(params, x, *rest)).max() > 1e-3


def test_absolute_positions_tell_equal_tokens_apart(params):
    """Without them tokens of equal content in a frame without text see the same everywhere."""
    x, t, text, mask, pooled = inputs()
    flat = jnp.broadcast_to(x[:, :1, :1, :1], x.shape)
    spread = []
    for absolute in (False, True):
        network = Network.create(MMDiT, dataclasses.replace(CONFIG, absolute_positions=absolute))
        out = network(params, flat, t, text, jnp.zeros_like(mask), pooled)
        spread.append(float(jnp.abs(out - jnp.tile(out[:, :1, :2, :2], (1, 2, 2, 2, 1))).max()))
    assert spread[1] > 1e-2 > spread[0]


def test_scan_applies_the_blocks_in_order(network, params):
    """A network cut after two of three single blocks gives the outputs of the first two."""
    _, names = jax.jit(lambda p: network(p, *inputs(), intermediates=True))(params)
    assert names["double_blocks.video"].shape == (2, 2, 8, 16)
    assert names["double_blocks.text"].shape == (2, 2, 6, 16)
    assert names["single_blocks"].shape == (3, 2, 14, 16)
    depth = 2
    shallow = Network.create(MMDiT, dataclasses.replace(CONFIG, single_blocks=depth))
    cut = params | {"single_blocks": jax.tree.map(lambda a: a[:depth], params["single_blocks"])}
    _, cut_names = jax.jit(lambda p: shallow(p, *inputs(), intermediates=True))(cut)
    np.testing.assert_allclose(cut_names["single_blocks"], names["single_blocks"][:depth], atol=1e-5)
    assert jnp.abs(names["single_blocks"][2] - names["single_blocks"][1]).max() > 1e-3


@pytest.mark.parametrize("chosen", [(0, 2, 4), (3, 1)])
def test_features_are_the_video_tokens_after_the_chosen_blocks(network, params, chosen):
    out, names = jax.jit(lambda p: network(p, *inputs(), intermediates=True))(params)
    every = jnp.concatenate([names["double_blocks.video"], names["single_blocks"][:, :, :8]])
    again, features = jax.jit(lambda p: network(p, *inputs(), intermediates=chosen))(params)
    np.testing.assert_allclose(features, every[np.array(chosen)], atol=1e-5)
    np.testing.assert_allclose(again, out, atol=1e-5)


@pytest.mark.parametrize("chosen", [(), (5,), (-1,), (1, 2, 1)])
def test_features_of_blocks_that_are_not_there_are_refused(network, params, chosen):
    with pytest.raises(UserError, match="different ones from 0 to 4"):
        network(params, *inputs(), intermediates=chosen)


def scan_outputs(jaxpr):
    """The shapes of all that the scans of a program, nested ones too, put out."""
    shapes = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            shapes += [variable.aval.shape for variable in equation.outvars]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            shapes += scan_outputs(inner)
    return shapes


@pytest.mark.parametrize("remat", ["none", "full"])
def test_features_take_no_memory_beyond_their_own(remat):
    """No scan stacks its k = 2 features over the 5 blocks, and none stacks the blocks' outputs in the forward pass."""
    net = Network.create(MMDiT, dataclasses.replace(CONFIG, double_blocks=5, single_blocks=5, remat=remat))
    x, *rest = inputs()

    def shapes(value, intermediates):
        def run(params, x):
            out = net(params, x, *rest, intermediates=intermediates)
            return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(out))

        function = jax.grad(run, 1) if value == "gradient" else run
        return scan_outputs(jax.make_jaxpr(function)(net.abstract_params, x).jaxpr)

    stacked = (5, 2, 8, 16)
    assert stacked in shapes("value", True) and stacked not in shapes("value", (1, 7))
    assert (2, 2, 8, 16) in shapes("value", (1, 7)), "the buffer is where it is looked for"
    saved, plain = ([s for s in shapes("gradient", i) if s[:1] == (5,) and len(s) > 2] for i in ((1, 7), False))
    assert sorted(saved) == sorted(plain), "the backward pass keeps what it keeps without features"


def test_features_pass_the_gradients_of_all_outputs_to_the_latents(network, params):
    x, *rest = inputs()

    def total(x):
        return jnp.square(network(params, x, *rest, intermediates=(1, 3))[1]).sum()

    def reference(x):
        names = network(params, x, *rest, intermediates=True)[1]
        return jnp.square(names["double_blocks.video"][1]).sum() + jnp.square(names["single_blocks"][1][:, :8]).sum()

    got, want = (jax.jit(jax.grad(f))(x) for f in (total, reference))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert jnp.abs(got).max() > 1e-2


@pytest.mark.parametrize("intermediates", [False, (1, 2)])
def test_program_size_does_not_grow_with_depth(intermediates):
    def size(depth):
        config = dataclasses.replace(debug(), double_blocks=depth, single_blocks=depth, refiner_blocks=depth)
        net = Network.create(MMDiT, config)
        jaxpr = jax.make_jaxpr(lambda p: net(p, *inputs(), intermediates=intermediates))(net.abstract_params)
        return len(re.sub(r"array\([^)]*\)", "", str(jaxpr)).splitlines())

    assert size(8) == size(2)


@pytest.mark.parametrize("intermediates", [False, True, (1, 3)])
def test_layers_that_lie_apart_give_the_same_numbers(network, params, intermediates):
    def forward(params):
        return network(params, *inputs(), intermediates=intermediates)

    laid = apart(jax.device_put(params, jax.devices()[0]))
    stacks = [len(leaf) for leaf in flatten(laid).values() if isinstance(leaf, tuple)]
    assert set(stacks) == {CONFIG.double_blocks, CONFIG.single_blocks, CONFIG.refiner_blocks}
    close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4)
    jax.tree.map(close, *(jax.jit(forward)(p) for p in (laid, params)))


@pytest.mark.heavy
def test_recomputation_leaves_gradients_alone(params):
    def gradients(remat):
        net = Network.create(MMDiT, dataclasses.replace(CONFIG, remat=remat))
        return flatten(jax.jit(jax.grad(lambda p: jnp.square(net(p, *inputs()) - 1).mean()))(params))

    want = gradients("none")
    assert all(jnp.abs(leaf).max() > 0 for leaf in want.values())
    for remat in ("full", "dots"):
        for path, leaf in gradients(remat).items():
            np.testing.assert_allclose(leaf, want[path], atol=1e-4 * (1e-3 + float(jnp.abs(leaf).max())), err_msg=path)


def test_bfloat16_is_close_to_float32(apply, params):
    half = Network.create(MMDiT, dataclasses.replace(CONFIG, compute_dtype="bfloat16"))
    want, got = apply(params, *inputs()), jax.jit(lambda p: half(p, *inputs()))(params)
    assert got.dtype == jnp.float32
    assert jnp.abs(got - want).mean() < 0.05 * jnp.abs(want).mean()


def test_wrong_inputs_are_named(network, params):
    with pytest.raises(UserError, match="9 input channels"):
        network(params, *inputs(channels=4))
    with pytest.raises(UserError, match="guidance"):
        network(params, *inputs(), guidance=jnp.ones(2))
    with pytest.raises(UserError, match="known"):
        network(params, *inputs(), known=jnp.ones((2, 2, 4, 4, 1)))
    with pytest.raises(UserError, match="rope_axes"):
        dataclasses.replace(CONFIG, rope_axes=(2, 2, 2))
    with pytest.raises(UserError, match="known='replace' in_channels is 4, not 9"):
        dataclasses.replace(CONFIG, known="replace")
    with pytest.raises(UserError, match="hold_known"):
        dataclasses.replace(CONFIG, in_channels=4, known="none", hold_known=True)


def test_guidance_is_an_input_where_the_config_has_it():
    net = Network.create(MMDiT, dataclasses.replace(CONFIG, guidance_embedding=True))
    params = random_params(net)
    forward = jax.jit(lambda p, g: net(p, *inputs(), guidance=g))
    low, high = (forward(params, jnp.full(2, g)) for g in (1.0, 6.0))
    assert jnp.abs(low - high).max() > 1e-3


def test_without_refiner_blocks_text_enters_through_a_linear_map():
    net = Network.create(MMDiT, dataclasses.replace(CONFIG, refiner_blocks=0))
    params = random_params(net)
    assert params["text_in"].keys() == {"project"}
    x, t, text, mask, pooled = inputs()
    out, names = jax.jit(lambda p, text: net(p, x, t, text, mask, pooled, intermediates=True))(params, text)
    project = params["text_in"]["project"]
    np.testing.assert_allclose(names["text_in"], np.asarray(text) @ project["kernel"] + project["bias"], atol=1e-5)
    garbage = jnp.where(mask[:, :, None], text, 1e3)
    np.testing.assert_allclose(net(params, x, t, garbage, mask, pooled), out, atol=1e-5)


@pytest.fixture(scope="module")
def replacing():
    """A network that takes known latents in the place of noisy ones, its velocity, and inputs with 0 and 1 known."""
    config = dataclasses.replace(debug(), in_channels=4, known="replace", guidance_embedding=True)
    network = Network.create(MMDiT, config)
    x, t, text, mask, pooled = inputs(channels=4)
    cond = conditioning.Conditioning(text, mask, pooled, *conditioning.known_latents(x[::-1], jnp.array([0, 1]), 2))
    return network, jax.jit(lambda params, *args: velocity_fn(network, params, guidance=3.0)(*args)), (x, t, cond)


def test_replaced_latents_are_told_from_noisy_ones(replacing):
    network, velocity, (x, t, cond) = replacing
    params = random_params(network)
    out = velocity(params, x, t, cond)
    plain = Network.create(MMDiT, dataclasses.replace(network.config, known="none"))
    shown = [conditioning.keep_known(x, cond), t, cond.text, cond.text_mask, cond.pooled]
    without = jax.jit(lambda p: plain(p, *shown, guidance=jnp.full(2, 3.0)))(params)
    np.testing.assert_allclose(out[0], without[0], atol=1e-5, err_msg="nothing is known there")
    assert jnp.abs(out[1] - without[1]).max() > 1e-2, "the modulation of time 0"
    wandered = jnp.where(cond.mask > 0, 1e3, x)
    np.testing.assert_array_equal(velocity(params, wandered, t, cond), out)


def test_replacing_works_in_bfloat16_recomputed_and_sharded(replacing):
    network, velocity, (x, t, cond) = replacing
    params = random_params(network)
    config = dataclasses.replace(network.config, remat="full", compute_dtype="bfloat16")
    half = Network.create(MMDiT, config)

    def forward(params, *args):
        return velocity_fn(half, params, guidance=3.0)(*args)

    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    spread = jax.device_put(params, sharding.shardings(params, mesh, SHARDING_RULES, small=1))
    batch = sharding.shard_batch(jax.tree.map(lambda a: jnp.concatenate([a, a]), (x, t, cond)), mesh)
    out, want = jax.jit(forward)(spread, *batch), velocity(params, x, t, cond)
    assert jnp.abs(out[:2] - want).mean() < 0.05 * jnp.abs(want).mean()
    np.testing.assert_array_equal(out[:2], out[2:])
    # tracing is enough for the backward pass: that recomputation changes nothing is shown above
    gradients = jax.eval_shape(jax.grad(lambda p: forward(p, x, t, cond).mean()), params)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("size", SIZES)
def test_sharding_rules_fit_every_size(size):
    leaves = flatten(Network.create(MMDiT, SIZES[size]()).abstract_params)
    for path, leaf in leaves.items():
        spec = next((spec for pattern, spec in SHARDING_RULES if re.search(pattern, path)), ())
        assert len(spec) <= leaf.ndim, path
        if leaf.size > 2**20:
            assert "fsdp" in spec, path


def test_published_size_and_debug_size():
    parameters = {name: count(Network.create(MMDiT, size()).abstract_params) for name, size in SIZES.items()}
    assert parameters["debug"] < 30_000
    assert parameters["hunyuan_13b"] == pytest.approx(12.8e9, rel=0.01)
    assert parameters["flux_12b"] == pytest.approx(11.9e9, rel=0.01)


MESHES = [
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 4, "tensor": 2},
    {"data": 1, "context": 8},
    {"data": 2, "fsdp": 2, "context": 2},
    {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
]


@pytest.mark.heavy
@pytest.mark.parametrize(("known", "meshes"), [("channels", MESHES[1::2]), ("replace", MESHES)])
def test_every_mesh_gives_the_numbers_of_one_device(known, meshes):
    """Prediction, features and gradients within 3e-5 of their largest value; 12 video and 5 text tokens fit no mesh."""
    channels = 9 if known == "channels" else 4
    config = dataclasses.replace(debug(), known=known, in_channels=channels, remat="full")
    network = Network.create(MMDiT, config)
    params = random_params(network)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((8, 2, 4, 6, channels)).astype(np.float32)
    text, pooled = (rng.standard_normal(size).astype(np.float32) for size in ((8, 5, 12), (8, 12)))
    mask, t = np.arange(5)[None] < rng.integers(0, 6, 8)[:, None], np.linspace(0.1, 1, 8, dtype=np.float32)
    options = {"known": (x[..., :1] > 0) & (np.arange(2)[None, :, None, None, None] == 0)} if known == "replace" else {}
    cotangent = rng.standard_normal((8, 2, 4, 6, 4)).astype(np.float32)

    def program(params, x, t, text, mask, pooled, options, cotangent):
        def loss(params):
            out, features = network(params, x, t, text, mask, pooled, intermediates=(1, 0), **options)
            return jnp.vdot(out, cotangent) + jnp.square(features).mean(), (out, features)

        return jax.value_and_grad(loss, has_aux=True)(params)

    arguments = (params, x, t, text, mask, pooled, options, cotangent)
    want = jax.jit(program)(*arguments)
    for sizes in meshes:
        mesh = sharding.make_mesh(sharding.MeshConfig(**sizes))
        placed = sharding.shardings(params, mesh, SHARDING_RULES, small=0)
        data = jax.device_put(arguments[1:], sharding.batch_sharding(mesh))
        got = jax.jit(sharding.over(mesh, program))(jax.device_put(params, placed), *data)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one, other, atol=3e-5 * max(1, np.abs(other).max()), err_msg=str(sizes))


def test_a_window_over_everything_is_full_attention(apply, params):
    windowed = Network.create(MMDiT, dataclasses.replace(CONFIG, tile=(1, 1, 2), window=(9, 9, 9)))
    want, narrow = apply(params, *inputs()), dataclasses.replace(CONFIG, tile=(1, 1, 1), window=(1, 1, 1))
    np.testing.assert_allclose(windowed(params, *inputs()), want, atol=1e-5)
    assert jnp.abs(Network.create(MMDiT, narrow)(params, *inputs()) - want).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"tile": (1, 2, 2)}, "go together"), ({"tile": (1, 2, 2), "window": (2, 1, 1)}, "windows odd ones")],
)
def test_windows_are_checked(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **fields)
