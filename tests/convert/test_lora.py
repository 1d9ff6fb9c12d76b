"""Adapters against W + scale B A by hand in torch, exact round trips, and adapters made here on the way out."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from magic141_jax.convert import hunyuan_dit, hunyuan_original, lora
from magic141_jax.convert.engine import Rule, Transform, from_ours, to_ours
from magic141_jax.errors import UserError
from magic141_jax.models.mmdit import MMDiT
from magic141_jax.models.network import Network
from magic141_jax.pytree import flatten, unflatten

STRENGTH = 0.7
# which modules are adapted, and at what rank
RANKS = {
    r"transformer_blocks\.\d\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)": 4,
    r"transformer_blocks\.1\.ff_context\.net\.2": 4,
    r"single_transformer_blocks\.\d\.attn\.to_[qv]": 4,
    r"single_transformer_blocks\.[02]\.proj_mlp": 2,
    r"single_transformer_blocks\.\d\.(proj_out|norm\.linear)": 3,
    r"context_embedder\.token_refiner\.refiner_blocks\.\d\.attn\.to_k": 1,
    r"norm_out\.linear|proj_out|x_embedder\.proj|time_text_embed\.guidance_embedder\.linear_2": 4,
}
PEFT = {"transformer.lora_alpha": 6, "transformer.alpha_pattern": {"norm_out.linear": 1, r"1\.attn\.to_q": 0.3}}


def alpha(module):
    special = {
        "norm_out.linear": 1,
        "transformer_blocks.1.attn.to_q": 0.3,
        "single_transformer_blocks.1.attn.to_q": 0.3,
    }
    return special.get(module, 6)


def drawn(weights, dtype=np.float32):
    """Adapters of the modules in `RANKS`, in PEFT's names."""
    rng, tensors = np.random.default_rng(0), {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        rank = next((rank for pattern, rank in RANKS.items() if re.fullmatch(pattern, module)), None)
        if rank and name.endswith(".weight"):
            a = rng.standard_normal((rank, *weight.shape[1:]))
            b = rng.standard_normal((weight.shape[0], rank, *(1,) * (weight.ndim - 2)))
            tensors[f"transformer.{module}.lora_A.weight"] = (a / weight[0].size ** 0.5).astype(dtype)
            tensors[f"transformer.{module}.lora_B.weight"] = (b / rank).astype(dtype)
    return tensors


@pytest.fixture(scope="module")
def published(tiny_dit):
    """(the model of theirs, its weights, our network, its parameters, its table)."""
    model = tiny_dit(in_channels=16, guidance_embeds=True, image_condition_type=None)
    weights = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    network = Network.create(MMDiT, hunyuan_dit.config_to_ours(model.config))
    table = hunyuan_dit.table(network.config)
    return model, weights, network, to_ours(weights, table, network.abstract_params), table


def test_merged_network_equals_the_published_one_with_the_adapter(published, dit_case):
    torch = pytest.importorskip("torch")
    model, weights, network, params, table = published
    tensors, state = drawn(weights), model.state_dict()
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        module = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
        a, b = (torch.tensor(tensors[f"transformer.{module}.lora_{x}.weight"]).flatten(1) for x in "AB")
        added = STRENGTH * alpha(module) / len(a) * b @ a
        state[f"{module}.weight"] = state[f"{module}.weight"] + added.reshape(state[f"{module}.weight"].shape)
    plain = dit_case(model)
    model.load_state_dict(state)
    case = dit_case(model)
    model.load_state_dict({name: torch.tensor(weight) for name, weight in weights.items()})
    adapter = lora.to_ours(tensors, table, network.abstract_params, peft=PEFT)
    got = np.asarray(network(lora.merge(params, adapter, STRENGTH), *case.args, **case.kwargs))
    largest = np.abs(case.output).max()
    assert np.abs(got - case.output).max() / largest < 2e-5
    assert np.abs(plain.output - case.output).max() / largest > 0.1


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_files_round_trip_bit_for_bit(published, tmp_path, dtype):
    _, weights, network, _, table = published
    tensors = drawn(weights, dtype)
    first, second = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file(tensors, first)
    adapter = lora.load(first, table, network.abstract_params)
    lora.save(second, adapter, table, network.abstract_params)
    again = lora.load(second, table, network.abstract_params)
    jax.tree.map(np.testing.assert_array_equal, adapter, again)
    back, _ = lora.from_ours(adapter, table, network.abstract_params)
    assert back.keys() == tensors.keys()
    assert all(back[k].dtype == dtype and np.array_equal(back[k], tensors[k]) for k in tensors)


def test_alphas_come_back_as_they_were(published):
    _, weights, network, _, table = published
    tensors = drawn(weights)
    _, peft = lora.from_ours(
        lora.to_ours(tensors, table, network.abstract_params, peft=PEFT), table, network.abstract_params
    )
    modules = peft["transformer.target_modules"]
    found = {m: peft["transformer.alpha_pattern"].get(m, peft["transformer.lora_alpha"]) for m in modules}
    assert found == pytest.approx({m: alpha(m) for m in modules}, rel=1e-6)
    ranks = {m: peft["transformer.rank_pattern"].get(m, peft["transformer.r"]) for m in modules}
    assert ranks == {m: len(tensors[f"transformer.{m}.lora_A.weight"]) for m in modules}
    with_scalars = tensors | {f"transformer.{m}.alpha": np.float32(alpha(m)) for m in modules}
    for other in (
        with_scalars,
        {f"base_model.model.{k.removeprefix('transformer.')}": v for k, v in with_scalars.items()},
    ):
        _, again = lora.from_ours(lora.to_ours(other, table, network.abstract_params), table, network.abstract_params)
        assert again == peft


def test_an_adapter_that_starts_at_zero_survives(published):
    """A fresh adapter has B = 0: which ranks are whose can't be told from its values."""
    _, weights, network, _, table = published
    tensors = {k: v if "lora_A" in k else np.zeros_like(v) for k, v in drawn(weights).items()}
    back, _ = lora.from_ours(lora.to_ours(tensors, table, network.abstract_params), table, network.abstract_params)
    assert back.keys() == tensors.keys() and all(np.array_equal(back[k], tensors[k]) for k in tensors)


def test_the_fused_matrix_has_a_slot_of_ranks_for_each_part(published):
    _, weights, network, _, table = published
    tensors = drawn(weights)
    part = lora.to_ours(tensors, table, network.abstract_params)["single_blocks"]["joint"]["qkv"]
    b = part["b"].reshape(3, 3, 4, 2, 3, 16)  # layers, slots, ranks, heads, parts, head
    outside = [b[:, slot, :, :, other] for slot in range(3) for other in range(3) if slot != other]
    assert not np.any(outside) and b[:, 0, :, :, 0].any() and not b[:, 1].any()
    assert part["scale"].reshape(3, 3, 4).any(-1).tolist() == [[True, False, True]] * 3
    np.testing.assert_array_equal(
        part["a"][2, :, :4].T, tensors["transformer.single_transformer_blocks.2.attn.to_q.lora_A.weight"]
    )


@pytest.mark.parametrize("layout", [hunyuan_dit, hunyuan_original])
def test_an_adapter_trained_here_means_the_same_there(published, layout):
    """Without slots, and with unequal parts of a split matrix: every module gets all ranks that touch it."""
    _, _, network, params, _ = published
    table, rng, rank = layout.table(network.config), np.random.default_rng(1), 2
    adapter = {}
    for path, leaf in flatten(network.abstract_params).items():
        if path.endswith(".kernel"):
            *stack, inputs, outputs = leaf.shape
            for kind, shape in {"a": (inputs, rank), "b": (rank, outputs)}.items():
                adapter[path.replace("kernel", kind)] = rng.standard_normal((*stack, *shape)).astype(np.float32)
    adapter["single_blocks.joint.mlp_down.scale"] = np.tile(np.float32([2, 0.5]), (3, 1))
    adapter = unflatten(adapter)
    tensors, peft = lora.from_ours(adapter, table, network.abstract_params)
    again = lora.merge(params, lora.to_ours(tensors, table, network.abstract_params, peft=peft))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), again, lora.merge(params, adapter))
    one = {"single_blocks": {"joint": {"attention_out": adapter["single_blocks"]["joint"]["attention_out"]}}}
    tensors, peft = lora.from_ours(one, table, network.abstract_params)
    assert len(tensors) == 6
    again = lora.merge(params, lora.to_ours(tensors, table, network.abstract_params, peft=peft))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), again, lora.merge(params, one))


def test_the_authors_layout_shares_one_a_between_fused_parts(published):
    _, _, network, params, _ = published
    table, rng = hunyuan_original.table(network.config), np.random.default_rng(2)
    tensors = {}
    for name, weight in from_ours(params, table).items():
        if name.endswith(".weight") and weight.ndim == 2 and "norm" not in name:
            tensors[name.replace("weight", "lora_A.weight")] = rng.standard_normal((3, weight.shape[1]))
            tensors[name.replace("weight", "lora_B.weight")] = rng.standard_normal((weight.shape[0], 3))
    prefixed = {f"diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    adapter = lora.to_ours(prefixed, table, network.abstract_params)
    back, _ = lora.from_ours(adapter, table, network.abstract_params)
    assert {name.removeprefix("transformer.") for name in back} == tensors.keys()
    assert all(np.array_equal(back[f"transformer.{name}"], tensors[name]) for name in tensors)


def test_merging_keeps_dtypes_and_may_be_traced(published):
    _, weights, network, params, table = published
    half = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
    adapter = lora.to_ours(drawn(weights), table, network.abstract_params)
    merged = jax.jit(lora.merge)(half, adapter, jnp.float32(0.25))
    assert jax.tree.map(lambda p: (p.shape, p.dtype), merged) == jax.tree.map(lambda p: (p.shape, p.dtype), half)
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, adapter, 0.0), params)
    untouched = merged["single_blocks"]["joint"]["qk_scale"], half["single_blocks"]["joint"]["qk_scale"]
    np.testing.assert_array_equal(*untouched)


def test_every_misfit_is_named(published):
    _, weights, network, params, table = published
    tensors = drawn(weights)
    del tensors["transformer.proj_out.lora_B.weight"]
    tensors["transformer.transformer_blocks.7.attn.to_q.lora_A.weight"] = np.zeros((4, 32), np.float32)
    tensors["transformer.transformer_blocks.7.attn.to_q.lora_B.weight"] = np.zeros((32, 4), np.float32)
    tensors["transformer.transformer_blocks.0.attn.to_k.lora_A.weight"] = np.zeros((4, 31), np.float32)
    tensors["transformer.transformer_blocks.0.attn.to_v.lora_A.weight"] = np.zeros((5, 32), np.float32)
    tensors["transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector"] = np.zeros(32, np.float32)
    with pytest.raises(UserError) as error:
        lora.to_ours(tensors, table, network.abstract_params, peft={"transformer.use_rslora": True})
    for fault in (
        "proj_out lacks lora_B.weight",
        "no linear layer is called transformer_blocks.7.attn.to_q",
        "transformer_blocks.0.attn.to_k has A with 31 inputs and B with 32 outputs, but the layer's weight is (32, 32)",
        "transformer_blocks.0.attn.to_v has A (5, 32) and B (32, 4), which share no rank",
        "lora_magnitude_vector is no",
        "use_rslora is not supported",
    ):
        assert fault in str(error.value)
    with pytest.raises(UserError, match="no lora_A"):
        lora.to_ours({}, table, network.abstract_params)
    stray = {"nowhere": {"a": np.zeros((4, 1)), "b": np.zeros((1, 4))}}
    with pytest.raises(UserError, match=r"no nowhere\.kernel"):
        lora.merge(params, stray)
    with pytest.raises(UserError, match=r"no nowhere\.kernel"):
        lora.from_ours(stray, table, network.abstract_params)
    with pytest.raises(UserError, match="a, b and scale at every kernel"):
        lora.merge(params, {"patch_in": {"a": np.zeros((4, 1))}})


def test_a_rule_that_factors_cannot_follow_is_a_defect(published):
    _, _, network, _, _ = published
    fold = Transform("fold", lambda a: (a[0].reshape(a[0].shape[::-1]),), lambda a: (a[0].reshape(a[0].shape[::-1]),))
    with pytest.raises(ValueError, match="mixes rows with columns"):
        lora.to_ours(
            {"x.lora_A.weight": np.ones((1, 64)), "x.lora_B.weight": np.ones((32, 1))},
            (Rule("x.weight", "patch_in.kernel", fold),),
            network.abstract_params,
        )


def test_files_that_are_none_are_refused(published, tmp_path):
    _, _, network, _, table = published
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    for name, complaint in {
        "lora.bin": "pickle",
        "broken.safetensors": "can't read",
        "no.safetensors": "can't read",
    }.items():
        with pytest.raises(UserError, match=complaint):
            lora.load(tmp_path / name, table, network.abstract_params)
