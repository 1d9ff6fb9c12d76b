"""Llama against transformers: states two layers before the end and normed ones, padding on both sides, shared heads."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from magic141_jax import sharding
from magic141_jax.convert import llama as convert
from magic141_jax.convert.engine import to_ours
from magic141_jax.errors import UserError
from magic141_jax.models.llama import SHARDING_RULES, Llama, LlamaConfig, positions
from magic141_jax.models.network import Network
from magic141_jax.pytree import cast, flatten
from tests.published_text import draw, llama_sizes, randomise, relative, tensors

CONFIG = LlamaConfig(vocabulary=40, width=16, mlp=24, layers=3, heads=4, key_value_heads=2, head_width=4)
IDS = np.random.default_rng(0).integers(0, 40, (4, 19)).astype(np.int32)
PLACES = np.arange(19)[None]
RIGHT = np.array([[19], [12], [5], [1]]) > PLACES
LEFT = RIGHT[:, ::-1].copy()


@pytest.fixture(scope="module")
def small():
    network = Network.create(Llama, CONFIG)
    return jax.jit(network.__call__), draw(network)


@pytest.fixture(scope="module")
def published():
    """Their model, and a function that gives all its hidden states."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**llama_sizes(), attn_implementation="eager")
    model = randomise(torch, transformers.LlamaModel(config))

    def states(ids, mask):
        places = np.where(mask, mask.cumsum(1) - 1, 1)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        with torch.no_grad():
            out = model(**{k: torch.tensor(v).long() for k, v in inputs.items()}, output_hidden_states=True)
        return [state.numpy() for state in out.hidden_states]

    return tensors(model), states


def ours(published, *, skip_last=2, **run_time):
    config = convert.config_to_ours(llama_sizes(), skip_last=skip_last, **run_time)
    network = Network.create(Llama, config)
    params = to_ours(published[0], convert.table(config), network.abstract_params)
    return jax.jit(network.__call__), cast(params, config.compute_dtype)


@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
def test_states_two_layers_before_the_end(published, mask):
    apply, params = ours(published)
    states = np.asarray(apply(params, IDS, mask))
    assert relative(states[mask], published[1](IDS, mask)[-3][mask]) < 1e-5


def test_the_whole_network_with_its_final_norm(published):
    apply, params = ours(published, skip_last=0)
    assert relative(np.asarray(apply(params, IDS, RIGHT))[RIGHT], published[1](IDS, RIGHT)[-1][RIGHT]) < 1e-5


def test_bfloat16_is_near(published):
    apply, params = ours(published, compute_dtype="bfloat16")
    states, wanted = np.asarray(apply(params, IDS, RIGHT)), published[1](IDS, RIGHT)[-3]
    assert states.dtype == np.float32
    error = np.sqrt(np.mean((states - wanted)[RIGHT] ** 2) / np.mean(wanted[RIGHT] ** 2))
    assert 1e-5 < error < 0.02


def test_later_tokens_and_padding_are_never_seen(small):
    apply, params = small
    other = np.where(RIGHT & (PLACES < 9), IDS, (IDS + 7) % 40)
    a, b = (np.asarray(apply(params, ids, RIGHT)) for ids in (IDS, other))
    np.testing.assert_allclose(a[:, :9][RIGHT[:, :9]], b[:, :9][RIGHT[:, :9]], rtol=1e-5, atol=1e-6)
    assert np.abs(a - b)[0, 9:].min(-1).max() > 1e-3
    assert np.isfinite(a).all()


def test_positions_count_the_tokens_that_count():
    mask = np.array([[True, True, True, False], [False, False, True, True]])
    assert positions(mask).tolist() == [[0, 1, 2, 1], [1, 1, 0, 1]]


def test_the_program_does_not_grow_with_depth():
    def size(layers):
        network = Network.create(Llama, dataclasses.replace(CONFIG, layers=layers))
        return len(str(jax.make_jaxpr(network.__call__)(network.abstract_params, IDS, RIGHT)).splitlines())

    assert size(2) == size(12)


def test_eight_devices_give_the_numbers_of_one(small):
    apply, params = small
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, sharding.shardings(params, mesh, SHARDING_RULES))
    assert placed["layers"]["gate"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
    assert placed["layers"]["out"]["kernel"].sharding.spec == P(None, "tensor", "fsdp")
    ids, mask = sharding.shard_batch((IDS, RIGHT), mesh)
    np.testing.assert_allclose(apply(placed, ids, mask), apply(params, IDS, RIGHT), rtol=1e-4, atol=1e-5)


def test_every_parameter_has_a_rule():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    shapes = Network.create(Llama, dataclasses.replace(CONFIG, final_norm=True)).abstract_params
    for placed in sharding.placements(shapes, mesh, SHARDING_RULES):
        assert placed.reason.startswith("rule"), placed
        assert ("fsdp" in placed.spec) == placed.path.endswith(("kernel", "embedding")), placed


def test_what_is_not_used_is_not_built():
    paths = flatten(Network.create(Llama, CONFIG).abstract_params)
    assert "final_scale" not in paths and paths["layers.q.kernel"].shape == (3, 16, 16)
    assert paths["layers.k.kernel"].shape == (3, 16, 8)


@pytest.mark.parametrize("change", [{"layers": 0}, {"key_value_heads": 3}, {"head_width": 5}])
def test_sizes_that_do_not_work_are_refused(change):
    with pytest.raises(UserError, match="even head width"):
        dataclasses.replace(CONFIG, **change)
