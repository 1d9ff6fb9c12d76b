"""The conversion engine on a toy table: both directions, stacking, joining, wildcards and complete error lists."""

import jax
import numpy as np
import pytest

from magic141_jax.convert.engine import CONV, IDENTITY, LINEAR, Rule, Transform, chain, from_ours, to_ours
from magic141_jax.errors import UserError

JOIN = Transform("join", lambda a: (np.concatenate(a),), lambda a: tuple(np.split(a[0], 2)))
TABLE = (
    Rule("blocks.{i}.proj.weight", "blocks.proj.kernel", LINEAR),
    Rule(("blocks.{i}.a.weight", "blocks.{i}.b.weight"), "blocks.ab.kernel", chain(JOIN, LINEAR)),
    Rule("down.{i}.{*p}.conv.weight", "down_{i}.{*p}.kernel", CONV),
    Rule("wide", ("left", "right"), Transform("split", lambda a: tuple(np.split(a[0], 2)), JOIN.to_ours)),
    Rule("{*p}.position_ids", ()),
)


def theirs():
    rng = np.random.default_rng(0)
    tensors = {"down.1.res.0.conv.weight": rng.standard_normal((5, 4, 3, 2, 1)), "wide": rng.standard_normal(4)}
    for i in range(11):
        tensors[f"blocks.{i}.proj.weight"] = rng.standard_normal((3, 2))
        tensors[f"blocks.{i}.a.weight"] = rng.standard_normal((3, 2))
        tensors[f"blocks.{i}.b.weight"] = rng.standard_normal((3, 2))
    return tensors


def abstract():
    shapes = {
        "blocks": {"proj": {"kernel": (11, 2, 3)}, "ab": {"kernel": (11, 2, 6)}},
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
