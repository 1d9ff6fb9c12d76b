"""The conversion engine on a toy table: both directions, stacking, joining, wildcards and complete error lists."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from magic141_jax.convert import engine
from magic141_jax.convert.engine import (
    CONV,
    IDENTITY,
    LINEAR,
    OnDevices,
    Rule,
    Transform,
    chain,
    from_ours,
    plan_in,
    plan_out,
    run_out,
    to_ours,
)
from magic141_jax.errors import UserError
from magic141_jax.pytree import flatten
from magic141_jax.sharding import MeshConfig, make_mesh

JOIN = Transform("join", lambda a: (np.concatenate(a),), lambda a: tuple(np.split(a[0], 2)))
TABLE = (
    Rule("blocks.{i}.proj.weight", "blocks.proj.kernel", LINEAR),
    Rule(("blocks.{i}.a.weight", "blocks.{i}.b.weight"), "blocks.ab.kernel", chain(JOIN, LINEAR)),
    Rule("down.{i}.{*p}.conv.weight", "down_{i}.{*p}.kernel", CONV),
    Rule("wide", ("left", "right"), Transform("split", lambda a: tuple(np.split(a[0], 2)), JOIN.to_ours)),
    Rule("{*p}.position_ids", ()),
)


def theirs(layers=11):
    rng = np.random.default_rng(0)
    tensors = {"down.1.res.0.conv.weight": rng.standard_normal((5, 4, 3, 2, 1)), "wide": rng.standard_normal(4)}
    for i in range(layers):
        tensors[f"blocks.{i}.proj.weight"] = rng.standard_normal((3, 2))
        tensors[f"blocks.{i}.a.weight"] = rng.standard_normal((3, 2))
        tensors[f"blocks.{i}.b.weight"] = rng.standard_normal((3, 2))
    return tensors


def abstract(layers=11):
    shapes = {
        "blocks": {"proj": {"kernel": (layers, 2, 3)}, "ab": {"kernel": (layers, 2, 6)}},
        "down_1": {"res": {"0": {"kernel": (3, 2, 1, 4, 5)}}},
        "left": (2,),
        "right": (2,),
    }
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))


def test_values_land_where_the_table_says():
    tensors = theirs()
    params = to_ours(tensors | {"text.embeddings.position_ids": np.arange(3)}, TABLE, abstract())
    np.testing.assert_array_equal(params["blocks"]["proj"]["kernel"][10], tensors["blocks.10.proj.weight"].T)
    np.testing.assert_array_equal(params["blocks"]["ab"]["kernel"][2, :, 3:], tensors["blocks.2.b.weight"].T)
    kernel = params["down_1"]["res"]["0"]["kernel"]
    assert kernel[2, 1, 0, 3, 4] == tensors["down.1.res.0.conv.weight"][4, 3, 2, 1, 0]
    np.testing.assert_array_equal(params["right"], tensors["wide"][2:])


def test_round_trip_is_exact():
    tensors = theirs()
    back = from_ours(to_ours(tensors, TABLE, abstract()), TABLE)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_all_faults_are_reported_at_once():
    tensors = theirs()
    for name in ("blocks.3.proj.weight", "blocks.4.a.weight", "wide"):
        del tensors[name]
    tensors |= {"stray.weight": np.zeros(1), "down.1.res.0.conv.weight": np.zeros((5, 4, 3, 2, 2))}
    with pytest.raises(UserError) as error:
        to_ours(tensors, TABLE, abstract())
    for fault in (
        "no rule for tensor stray.weight",
        "tensor blocks.4.a.weight is missing",
        "blocks.proj.kernel lacks layers [3]",
        "missing left",
        "down_1.res.0.kernel has shape",
    ):
        assert fault in str(error.value)


def test_too_few_layers_are_a_wrong_shape():
    tensors = {name: tensor for name, tensor in theirs().items() if not name.startswith("blocks.10.")}
    with pytest.raises(UserError, match=r"blocks.proj.kernel has shape \(10, 2, 3\)"):
        to_ours(tensors, TABLE, abstract())


def test_the_way_out_is_as_strict():
    params = to_ours(theirs(), TABLE, abstract())
    del params["left"]
    params["stray"] = np.zeros(1)
    with pytest.raises(UserError, match=r"no rule for parameter stray; parameter left is missing"):
        from_ours(params, TABLE)


def test_the_first_rule_that_fits_owns_a_name():
    table = (Rule("a.{i}", "first.{i}"), Rule("{*p}.{i}", "rest.{*p}.{i}", IDENTITY))
    wanted = {"first": {"1": np.zeros(1)}, "rest": {"b.c": np.zeros(1)}}
    wanted["rest"] = {"b": {"c": {"2": np.zeros(1)}}}
    params = to_ours({"a.1": np.ones(1), "b.c.2": np.ones(1)}, table, wanted)
    assert params["first"]["1"] == 1 and params["rest"]["b"]["c"]["2"] == 1


class Recorded:
    """A tensor that tells when it is read."""

    def __init__(self, array, name, reads):
        self.array, self.name, self.reads = array, name, reads
        self.shape, self.dtype = array.shape, array.dtype

    def __array__(self, dtype=None, copy=None):
        self.reads.append(self.name)
        return self.array

    def __getitem__(self, layer):
        self.reads.append((self.name, layer))
        return self.array[layer]


def recorded(arrays):
    reads = []
    return {name: Recorded(array, name, reads) for name, array in arrays.items()}, reads


def test_every_tensor_is_read_once_and_layer_by_layer():
    lazy, reads = recorded(theirs() | {"x.position_ids": np.arange(3)})
    params = to_ours(lazy, TABLE, abstract())
    jax.tree.map(np.testing.assert_array_equal, params, to_ours(theirs(), TABLE, abstract()))
    assert sorted(reads) == sorted(theirs())  # a dropped tensor is not read at all
    assert [name for name in reads if "proj" in name] == [f"blocks.{i}.proj.weight" for i in range(11)]


def test_nothing_is_read_of_tensors_that_do_not_fit():
    lazy, reads = recorded(theirs() | {"stray": np.zeros(2)})
    for tensors, wanted in ((lazy, abstract()), (lazy, {"other": np.zeros(1)})):
        with pytest.raises(UserError):
            to_ours(tensors, TABLE, wanted)
    assert not reads


MESH = {"blocks.proj.kernel": (None, "fsdp", None), "blocks.ab.kernel": ("fsdp",), "left": ("fsdp",)}


@pytest.mark.parametrize("small", [0, 2**25])
@pytest.mark.parametrize("layers", [11, 4])
def test_onto_a_mesh(small, layers):
    """Stacks split along a layer's axis or along the layers themselves, written in place or gathered first."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    tensors = {name: array.astype(np.float32) for name, array in theirs(layers).items()}
    wanted = abstract(layers)
    axes = dict(MESH) if layers % 2 == 0 else MESH | {"blocks.ab.kernel": ()}
    shardings = {path: NamedSharding(mesh, PartitionSpec(*axes.get(path, ()))) for path in flatten(wanted)}
    place = OnDevices(shardings, dtype=ml_dtypes.bfloat16, small=small)
    params, plain = to_ours(tensors, TABLE, wanted, place=place), to_ours(tensors, TABLE, wanted)
    for path, leaf in flatten(params).items():
        assert leaf.sharding == shardings[path]
        np.testing.assert_array_equal(leaf, flatten(plain)[path].astype(ml_dtypes.bfloat16))


def test_onto_one_device_dtypes_stay():
    one = SingleDeviceSharding(jax.devices()[1])
    tensors = {name: array.astype(np.float16) for name, array in theirs().items()}
    params = to_ours(tensors, TABLE, abstract(), place=OnDevices(dict.fromkeys(flatten(abstract()), one), small=0))
    assert all(leaf.dtype == np.float16 and leaf.devices() == {jax.devices()[1]} for leaf in jax.tree.leaves(params))
    plain = to_ours(tensors, TABLE, abstract())
    jax.tree.map(np.testing.assert_array_equal, params, plain)


def test_layers_of_several_dtypes_lose_nothing():
    tensors = theirs()
    tensors["blocks.0.proj.weight"] = tensors["blocks.0.proj.weight"].astype(np.float16)
    _, leaves = plan_in(tensors, TABLE, abstract())
    assert leaves["blocks.proj.kernel"].dtype == np.float64
    kernel = to_ours(tensors, TABLE, abstract())["blocks"]["proj"]["kernel"]
    np.testing.assert_array_equal(kernel[1], tensors["blocks.1.proj.weight"].T)


def test_the_way_out_reads_layer_by_layer():
    leaves = flatten(to_ours(theirs(), TABLE, abstract()))
    lazy, reads = recorded(leaves)
    jobs, made = plan_out(lazy, TABLE)
    assert not reads
    tensors = {name: array for job in jobs for name, array in run_out(job, lazy)}
    assert {name: (array.shape, array.dtype) for name, array in theirs().items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in made.items()
    }
    assert all(np.array_equal(tensors[name], array) for name, array in theirs().items())
    assert ("blocks.ab.kernel", 10) in reads and "blocks.ab.kernel" not in reads


def test_a_parameter_is_filled_once():
    table = (Rule("a", "x"), Rule("b", "x"), Rule("old.{i}", "y"), Rule("new.{i}", "y"))
    tensors = {"a": np.ones(1), "b": np.ones(1), "old.0": np.ones(1), "new.0": np.ones(1)}
    wanted = {"x": np.ones(1), "y": np.ones((1, 1))}
    with pytest.raises(UserError, match=r"x is filled twice, the second time by b; y is filled twice.* by new\.0"):
        to_ours(tensors, table, wanted)


def test_a_shape_that_its_transform_can_not_take_is_named():
    with pytest.raises(UserError, match=r"blocks\.0\.a\.weight, blocks\.0\.b\.weight: join > linear.* fails"):
        to_ours(theirs() | {"blocks.0.a.weight": np.zeros((3, 5))}, TABLE, abstract())


def test_long_lists_are_cut():
    strays = {f"stray.{i}": np.zeros(1) for i in range(engine.SHOWN + 3)}
    with pytest.raises(UserError, match=r"; and 3 more$"):
        to_ours(theirs() | strays, TABLE, abstract())
