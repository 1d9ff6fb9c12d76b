"""The authors' layout, built here from a diffusers network by a renaming of its own."""

import json
import re
import shlex
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from magic141_jax.convert import hunyuan_dit, repository
from magic141_jax.convert import hunyuan_original as original
from magic141_jax.convert.engine import from_ours, to_ours
from magic141_jax.convert.tensors import refuse_pickle
from magic141_jax.errors import UserError
from magic141_jax.models.mmdit import MMDiT, MMDiTConfig
from magic141_jax.models.network import Network
from magic141_jax.pytree import flatten

VARIANTS = {
    "known on channels": {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"},
    "guidance": {"in_channels": 16, "guidance_embeds": True, "image_condition_type": None},
}
# an expression on diffusers' name, and what becomes of it; after "+" stands the part's place in a fused matrix
RENAMES = (
    (r"x_embedder\.", r"img_in."),
    (r"context_embedder\.token_refiner\.refiner_blocks", r"txt_in.individual_token_refiner.blocks"),
    (r"context_embedder\.proj_in", r"txt_in.input_embedder"),
    (r"context_embedder\.time_text_embed\.timestep_embedder\.linear_1", r"txt_in.t_embedder.mlp.0"),
    (r"context_embedder\.time_text_embed\.timestep_embedder\.linear_2", r"txt_in.t_embedder.mlp.2"),
    (r"context_embedder\.time_text_embed\.text_embedder", r"txt_in.c_embedder"),
    (r"time_text_embed\.timestep_embedder\.linear_1", r"time_in.mlp.0"),
    (r"time_text_embed\.timestep_embedder\.linear_2", r"time_in.mlp.2"),
    (r"time_text_embed\.guidance_embedder\.linear_1", r"guidance_in.mlp.0"),
    (r"time_text_embed\.guidance_embedder\.linear_2", r"guidance_in.mlp.2"),
    (r"time_text_embed\.text_embedder\.linear_1", r"vector_in.in_layer"),
    (r"time_text_embed\.text_embedder\.linear_2", r"vector_in.out_layer"),
    (r"(individual_token_refiner\.blocks\.\d+)\.attn\.to_([qkv])", r"\1.self_attn_qkv+\2"),
    (r"(individual_token_refiner\.blocks\.\d+)\.attn\.to_out\.0", r"\1.self_attn_proj"),
    (r"(individual_token_refiner\.blocks\.\d+)\.norm_out\.linear", r"\1.adaLN_modulation.1"),
    (r"(individual_token_refiner\.blocks\.\d+)\.ff\.", r"\1.mlp."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_([qkv])", r"single_blocks.\1.linear1+\2"),
    (r"^single_transformer_blocks\.(\d+)\.proj_mlp", r"single_blocks.\1.linear1+w"),
    (r"^single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"^single_transformer_blocks\.(\d+)\.norm\.", r"single_blocks.\1.modulation."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_([qk])", r"single_blocks.\1.\2_norm"),
    (r"^transformer_blocks", r"double_blocks"),
    (r"\.norm1_context\.", r".txt_mod."),
    (r"(double_blocks\.\d+)\.norm1\.", r"\1.img_mod."),
    (r"\.attn\.to_([qkv])", r".img_attn_qkv+\1"),
    (r"\.attn\.add_([qkv])_proj", r".txt_attn_qkv+\1"),
    (r"\.attn\.norm_added_([qk])", r".txt_attn_\1_norm"),
    (r"\.attn\.norm_([qk])", r".img_attn_\1_norm"),
    (r"\.attn\.to_out\.0", r".img_attn_proj"),
    (r"\.attn\.to_add_out", r".txt_attn_proj"),
    (r"\.ff_context\.", r".txt_mlp."),
    (r"\.ff\.", r".img_mlp."),
    (r"\.net\.0\.proj", r".fc1"),
    (r"\.net\.2", r".fc2"),
    (r"^norm_out\.linear", r"final_layer.adaLN_modulation.1"),
    (r"^proj_out", r"final_layer.linear"),
)


def in_original_layout(tensors):
    parts = {}
    for name, tensor in tensors.items():
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        module, kind = name.rsplit(".", 1)
        module, _, place = module.partition("+")
        if module.startswith("final_layer.adaLN"):
            scale, shift = np.split(tensor, 2)
            tensor = np.concatenate([shift, scale])
        parts.setdefault(f"{module}.{kind}", []).append((place, tensor))
    return {
        name: np.concatenate([tensor for _, tensor in sorted(group, key=lambda pair: "qkvw".find(pair[0]))])
        for name, group in parts.items()
    }


@pytest.fixture(scope="module", params=VARIANTS)
def published(request, tiny_dit):
    """(diffusers' config, its tensors, the same tensors in the authors' layout)."""
    model = tiny_dit(**VARIANTS[request.param])
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return dict(model.config), tensors, in_original_layout(tensors)


def test_both_layouts_give_the_same_parameters(published):
    config = hunyuan_dit.config_to_ours(published[0])
    abstract = Network.create(MMDiT, config).abstract_params
    ours = to_ours(published[2], original.table(config), abstract)
    back = from_ours(ours, hunyuan_dit.table(config))
    assert back.keys() == published[1].keys()
    assert all(np.array_equal(back[name], published[1][name]) for name in back)
    back = from_ours(ours, original.table(config))
    assert back.keys() == published[2].keys()
    assert all(np.array_equal(back[name], published[2][name]) for name in back)


def test_the_names_are_the_published_ones(published):
    """Spelled out for one block of each kind, from the authors' modules."""
    names = {name.removesuffix(".weight") for name in published[2] if name.endswith(".weight")}
    first = {name for name in names if ".0." in name and "blocks" in name}
    double = ["mod.linear", "attn_qkv", "attn_q_norm", "attn_k_norm", "attn_proj", "mlp.fc1", "mlp.fc2"]
    assert first == {
        *(f"double_blocks.0.{stream}_{name}" for stream in ("img", "txt") for name in double),
        *(f"single_blocks.0.{name}" for name in ("linear1", "linear2", "q_norm", "k_norm", "modulation.linear")),
        *(
            f"txt_in.individual_token_refiner.blocks.0.{name}"
            for name in (
                "norm1",
                "norm2",
                "self_attn_qkv",
                "self_attn_proj",
                "mlp.fc1",
                "mlp.fc2",
                "adaLN_modulation.1",
            )
        ),
    }
    assert {"final_layer.adaLN_modulation.1", "final_layer.linear", "img_in.proj", "vector_in.in_layer"} <= names


def test_strictness_names_everything(published):
    config = hunyuan_dit.config_to_ours(published[0])
    tensors = dict(published[2]) | {"double_blocks.0.img_attn.qkv.weight": np.zeros(1)}
    del tensors["single_blocks.1.linear1.weight"]
    with pytest.raises(UserError) as error:
        to_ours(tensors, original.table(config), Network.create(MMDiT, config).abstract_params)
    for fault in ("no rule for tensor double_blocks.0.img_attn.qkv.weight", "qkv.kernel lacks layers [1]"):
        assert fault in str(error.value)


def test_the_config_follows_from_the_shapes(published):
    shapes = {name: tensor.shape for name, tensor in published[2].items()}
    want = hunyuan_dit.config_to_ours(published[0])
    assert original.config_from_shapes(shapes, rope_axes=(4, 6, 6)) == want
    if want.known == "none":
        assert (
            original.config_from_shapes(shapes, known="replace", rope_axes=(4, 6, 6), remat="full").known == "replace"
        )
    with pytest.raises(UserError, match=r"img_in\.proj\.weight is missing"):
        original.config_from_shapes(published[1])


def test_the_published_size_follows_from_its_shapes():
    config = MMDiTConfig(double_blocks=1, single_blocks=1)
    abstract = Network.create(MMDiT, config).abstract_params
    few = {
        "img_in.proj.weight": (3072, 33, 1, 2, 2),
        "final_layer.linear.weight": (64, 3072),
        "double_blocks.0.img_attn_q_norm.weight": (128,),
        "double_blocks.0.img_mlp.fc1.weight": (12288, 3072),
        "single_blocks.0.q_norm.weight": (128,),
        "txt_in.individual_token_refiner.blocks.0.norm1.weight": (3072,),
        "txt_in.individual_token_refiner.blocks.1.norm1.weight": (3072,),
        "txt_in.input_embedder.weight": (3072, 4096),
        "vector_in.in_layer.weight": (3072, 768),
        "time_in.mlp.0.weight": (3072, 256),
    }
    assert original.config_from_shapes(few) == config
    assert abstract["patch_in"]["kernel"].shape == (4 * 33, 3072)


def test_shared_prefixes_fall_away():
    assert original.without_prefix({"module.model.a.b": 1, "module.model.c": 2}) == {"a.b": 1, "c": 2}
    assert original.without_prefix({"vae.encoder.x": 1}) == {"encoder.x": 1}
    assert original.without_prefix({"model.a": 1, "b": 2}) == {"model.a": 1, "b": 2}
    assert original.without_prefix({}) == {}


def test_a_pickle_is_refused_with_the_command_that_rewrites_it(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {"img_in.proj.bias": torch.arange(3.0), "x": torch.ones(2, 2).T}}, file)
    with pytest.raises(UserError, match="is a pickle") as error:
        refuse_pickle(file)
    _, flag, code, *arguments = shlex.split(str(error.value).split("installed: ")[1])
    assert flag == "-c"
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(code, {})
    header = file.with_suffix(".safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert json.loads(header[8 : 8 + size]).keys() - {"__metadata__"} == {"img_in.proj.bias", "x"}
    refuse_pickle(file.with_suffix(".safetensors"))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_component_folder_of_the_authors_tensors_loads(published, tmp_path, prefix):
    config, tensors, originals = published
    told = {key: config[key] for key in ("image_condition_type", "rope_axes_dim")}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": original.CLASS_NAME, **told}))
    save_file({prefix + name: tensor for name, tensor in originals.items()}, tmp_path / "model.safetensors")
    network, params = repository.load(tmp_path)
    wanted = hunyuan_dit.config_to_ours(config)
    assert network.config == wanted
    expected = to_ours(tensors, hunyuan_dit.table(wanted), network.abstract_params)
    for path, leaf in flatten(expected).items():
        np.testing.assert_array_equal(flatten(params)[path], leaf, err_msg=path)


def test_an_unknown_condition_in_a_folder_of_the_authors_tensors_is_named(published, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": original.CLASS_NAME, "image_condition_type": "token_replac"})
    )
    save_file(published[2], tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="Did you mean 'token_replace'"):
        repository.load(tmp_path)
