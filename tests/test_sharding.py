"""Eight fake devices: the specs are the table's, and the numbers those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from magic141_jax import sharding
from magic141_jax.diffusion import conditioning, flow, samplers, timesteps
from magic141_jax.errors import UserError
from magic141_jax.sharding import MeshConfig, make_mesh

RULES = (
    (r"up\.kernel", ("fsdp", "tensor")),
    (r"down\.kernel", ("tensor", "fsdp")),
    (r"up\.bias", ("tensor",)),
)


def make_params(layers=3, width=8, inner=16):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "blocks": {
            "up": {"kernel": jax.random.normal(keys[0], (layers, width, inner)), "bias": jnp.zeros((layers, inner))},
            "down": {"kernel": jax.random.normal(keys[1], (layers, inner, width))},
        },
        "head": {"kernel": jax.random.normal(keys[2], (width, 6))},
    }


def loss(params, x):
    def block(x, p):
        hidden = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"][None])
        return x + hidden @ p["down"]["kernel"], None

    x, _ = jax.lax.scan(block, x, params["blocks"])
    return jnp.mean((x @ params["head"]["kernel"]) ** 2)


def specs(tree):
    return {p: leaf.sharding.spec for p, leaf in zip(["down", "bias", "up", "head"], jax.tree.leaves(tree))}


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 2, 1)),
        (MeshConfig(data=1, fsdp=8, tensor=1), (1, 8, 1, 1)),
        (MeshConfig(data=1, fsdp=2, context=-1), (1, 2, 1, 4)),
    ],
)
def test_minus_one_takes_the_rest(config, shape):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == sharding.AXES
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (0, 1, 8), (-1, 3, 1), (4, 4, 1), (-1, 16, 1)])
def test_meshes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(MeshConfig(*sizes))


def test_rules_place_stacked_leaves_and_the_fallback_the_rest():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(make_params(), sharding.shardings(make_params(), mesh, RULES, small=1))
    assert specs(placed) == {
        "up": P(None, "fsdp", "tensor"),
        "down": P(None, "tensor", "fsdp"),
        "bias": P(None, "tensor"),
        "head": P("fsdp", None),
    }


def test_fallback_takes_the_largest_dimension_that_divides_and_copies_small_leaves():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    tree = {"a": jnp.zeros((9, 16, 24)), "b": jnp.zeros((9, 7)), "c": jnp.zeros(()), "d": jnp.zeros((8,))}
    found = {p.path: p.spec for p in sharding.placements(tree, mesh, small=9)}
    assert found == {"a": P(None, None, "fsdp"), "b": P(), "c": P(), "d": P()}


def test_an_axis_that_does_not_divide_is_dropped_and_said():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    (placed,) = sharding.placements({"up": {"kernel": jnp.zeros((6, 4))}}, mesh, RULES)
    assert placed.spec == P(None, "tensor") and "fsdp does not divide 6" in placed.reason


@pytest.mark.parametrize("axes", [("model",), ("fsdp", None, None)])
def test_wrong_rules_are_refused(axes):
    with pytest.raises(ValueError, match="rule"):
        sharding.placements({"w": jnp.zeros((4, 4))}, make_mesh(), ((r"w", axes),))


def test_a_training_step_gives_the_numbers_of_one_device_and_keeps_the_specs():
    optimizer = optax.adam(1e-2)
    x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)

    def step(params, state, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state = make_params(), optimizer.init(make_params())
    expected, _, expected_value = jax.jit(step)(params, state, x)

    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    where = [sharding.shardings(tree, mesh, RULES, small=1) for tree in (params, state)]
    sharded_step = jax.jit(step, out_shardings=(*where, sharding.replicated(mesh)))
    batch = sharding.shard_batch(x, mesh)
    assert batch.sharding.spec == P(("data", "fsdp"))
    params, state = jax.device_put((params, state), tuple(where))
    new, new_state, value = sharded_step(params, state, batch)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), new, expected)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert specs(new) == specs(params)
    assert specs(new_state[0].mu) == specs(params), "the same table places the moments"


def test_sampling_gives_the_videos_of_one_device():
    shape = (8, 2, 2, 2, 4)
    weight = jax.random.normal(jax.random.key(1), (9, 4))

    def velocity(x, t, cond):
        return jnp.tanh(conditioning.model_input(x, cond) @ weight)

    def run(key):
        known, mask = conditioning.known_latents(jnp.ones(shape), 1, 2)
        cond = conditioning.Conditioning(jnp.zeros((8, 1, 2)), jnp.ones((8, 1), bool), jnp.zeros((8, 2)), known, mask)
        noise = flow.draw_noise(key, shape)
        return samplers.sample(velocity, cond, noise, timesteps.grid(3, 5.0), sampler="renoise", key=key)

    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    many = jax.jit(run, out_shardings=sharding.batch_sharding(mesh))(jax.random.key(0))
    assert many.sharding.spec == P(("data", "fsdp"))
    np.testing.assert_allclose(many, jax.jit(run)(jax.random.key(0)), atol=1e-5)


def test_batches_of_mappings_with_scalars():
    mesh = make_mesh()
    batch = sharding.shard_batch({"x": np.arange(16).reshape(8, 2), "count": np.float32(3)}, mesh)
    np.testing.assert_array_equal(batch["x"], np.arange(16).reshape(8, 2))
    assert batch["x"].addressable_shards[0].data.shape == (1, 2) and batch["count"].sharding.spec == P()


def test_activations_stay_split_where_there_is_a_mesh():
    mesh, x = make_mesh(MeshConfig(data=2, fsdp=4)), jnp.ones((8, 3))
    assert sharding.keep_split(x) is x and sharding.local_batch(8) == 8

    def function(x, odd):
        assert sharding.keep_split(odd) is odd and sharding.local_batch(6) == 6 and sharding.local_batch(16) == 2
        return sharding.keep_split(x) * 2

    y = jax.jit(sharding.over(mesh, function))(jax.device_put(x, sharding.replicated(mesh)), jnp.ones((6, 3)))
    assert y.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)
    np.testing.assert_array_equal(y, 2 * x)


@pytest.mark.parametrize(
    ("mesh", "shape", "spec"),
    [
        ({"context": 8}, (1, 21, 68, 120, 16), P(None, None, None, "context", None)),
        ({"context": 8}, (1, 21, 120, 68, 16), P(None, None, "context", None, None)),
        ({"data": 8}, (1, 21, 68, 120, 16), P(None, None, None, "data", None)),
        ({"data": 8}, (8, 21, 68, 120, 16), P(("data", "fsdp"), None, None, None, None)),
        ({"context": 2, "tensor": 2, "fsdp": 2}, (1, 3, 4, 4, 4), P(None, None, "tensor", ("fsdp", "context"), None)),
        ({"context": 2, "tensor": 2, "fsdp": 2}, (2, 3, 4, 4, 4), P(("data", "fsdp"), None, "tensor", "context", None)),
        ({"context": 8}, (1, 3, 4, 4, 4), P(None, None, None, None, None)),
    ],
)
def test_pictures_are_split_over_the_axes_that_the_batch_leaves(mesh, shape, spec):
    def function(x):
        assert sharding.space_spec(x.shape) == spec
        return sharding.split_space(x)

    mesh = make_mesh(MeshConfig(**{"data": 1, **mesh}))
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert jax.eval_shape(sharding.over(mesh, function), x).shape == shape


def test_no_axis_changes_sides_between_a_picture_and_its_latents():
    mesh = make_mesh(MeshConfig(data=1, context=4, tensor=2)).abstract_mesh
    for h, w in ((68, 120), (120, 68), (90, 160), (60, 104), (17, 30), (8, 8), (3, 5)):
        with jax.sharding.use_abstract_mesh(mesh):
            specs = [sharding.space_spec((1, 1, h << level, w << level, 3)) for level in range(4)]
        sides = {axis: {i for spec in specs for i in (2, 3) if axis in str(spec[i])} for axis in ("context", "tensor")}
        assert all(len(side) <= 1 for side in sides.values()), (h, w, specs)


def test_without_a_mesh_pictures_are_left_alone():
    x = jnp.ones((1, 1, 8, 8, 3))
    assert sharding.split_space(x) is x and sharding.keep_whole(x) is x
    assert not any(sharding.space_spec(x.shape))


def test_what_is_kept_whole_is_on_every_device_but_for_its_batch():
    mesh = make_mesh(MeshConfig(data=2, context=4))
    for batch, part in ((1, (1, 8)), (2, (1, 8))):
        x = jax.device_put(np.ones((batch, 8), np.float32), jax.NamedSharding(mesh, P(None, "context")))
        y = jax.jit(sharding.over(mesh, sharding.keep_whole))(x)
        assert y.addressable_shards[0].data.shape == part


def test_a_mesh_from_text():
    assert sharding.parse_mesh("fsdp=2, context=4") == MeshConfig(data=-1, fsdp=2, context=4)
    assert sharding.parse_mesh("fsdp=-1") == MeshConfig(data=1, fsdp=-1)
    assert sharding.parse_mesh("data=2,tensor=4") == MeshConfig(data=2, tensor=4)
    for text, message in (
        ("contxt=2", "'contxt'.*Did you mean 'context'"),
        ("", "names the axis ''"),
        ("fsdp=2,fsdp=4", "'fsdp' twice"),
        ("fsdp", "fsdp the size ''.*write fsdp=2"),
        ("fsdp=two", "size 'two'"),
        ("fsdp=--2", "size '--2'"),
    ):
        with pytest.raises(UserError, match=message):
            sharding.parse_mesh(text)
    with pytest.raises(UserError, match="does not fit 8 devices; 3 does not divide that"):
        make_mesh(sharding.parse_mesh("fsdp=3"))
    with pytest.raises(UserError, match="sizes are positive"):
        make_mesh(sharding.parse_mesh("fsdp=0"))


def test_arrays_come_and_go():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    params = {"a": np.arange(16.0).reshape(2, 8), "b": np.float32(3)}
    assert sharding.lay(params, None) is params and sharding.mesh_of(params) is None
    assert sharding.mesh_of(jax.tree.map(jnp.asarray, params)) is None
    laid = sharding.lay(params, mesh, ((r"a", (None, "fsdp")),))
    assert sharding.mesh_of(laid) == mesh and laid["a"].sharding.spec == P(None, "fsdp")
    back = sharding.to_host(laid)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(back))
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_batch_sizes_that_do_not_split_name_the_nearest():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    sharding.require_split(16, mesh)
    with pytest.raises(UserError, match="take 16 or 24"):
        sharding.require_split(20, mesh)
    with pytest.raises(UserError, match="take 8"):
        sharding.batch_rows(3, mesh)


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ({"data": 8}, [0, 1, 4, 5]),
        ({"data": 2, "fsdp": 2, "tensor": 2}, [0, 1, 4, 5]),
        ({"data": 1, "fsdp": 2, "context": 4}, list(range(8))),
    ],
)
def test_rows_follow_from_the_devices(sizes, rows):
    """Of a 2 x 4 torus a host has the first two of each row; with a batch of 8."""
    mesh = make_mesh(MeshConfig(**sizes))
    host = [device for device in jax.devices() if device.id in (0, 1, 4, 5)]
    np.testing.assert_array_equal(sharding.batch_rows(8, mesh, devices=host), rows)
    np.testing.assert_array_equal(sharding.batch_rows(8, mesh), np.arange(8))


def test_the_table_says_what_went_where():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    lines = sharding.table(make_params(), mesh, RULES, small=1).splitlines()
    assert len(lines) == 5
    assert "blocks.up.kernel" in lines[2] and "3x8x16" in lines[2] and "(-, fsdp, tensor)" in lines[2]
    assert "largest dimension" in lines[3] and "data=2 fsdp=2 tensor=2" in lines[4]


def test_bytes_per_device():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = make_params()
    where = sharding.shardings(params, mesh, RULES, small=1)
    placed = jax.device_put(params, where)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    assert sharding.bytes_per_device(params, where) == held < sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_arrays_go_onto_a_mesh_and_come_back():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    tree = {"host": np.arange(16.0).reshape(8, 2), "device": jnp.arange(8, dtype=jnp.bfloat16), "scalar": 3}
    where = {"host": P("fsdp", "tensor"), "device": P("fsdp"), "scalar": P()}
    where = {name: jax.sharding.NamedSharding(mesh, spec) for name, spec in where.items()}
    placed = sharding.place(tree, where)
    assert {name: leaf.sharding for name, leaf in placed.items()} == where
    assert placed["host"].addressable_shards[0].data.shape == (2, 1) and placed["device"].dtype == jnp.bfloat16
    back = sharding.to_host(placed)
    assert all(isinstance(leaf, np.ndarray) for leaf in back.values())
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    with sharding.on_host():
        assert jnp.zeros(2).devices() == {jax.devices("cpu")[0]}


def test_whole_arrays_are_split_where_the_mesh_divides_them():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = sharding.spread({"a": np.arange(8), "b": np.arange(6), "c": np.float32(1)}, mesh)
    assert {name: x.sharding.spec for name, x in placed.items()} == {"a": P(("data", "fsdp")), "b": P(), "c": P()}
    np.testing.assert_array_equal(placed["a"], np.arange(8))
