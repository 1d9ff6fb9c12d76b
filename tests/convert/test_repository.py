"""Published folders onto one device and onto a mesh; what can't be read is refused before any data is."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import save_file

from magic141_jax.convert import bert, memory, repository, tensors
from magic141_jax.convert.engine import from_ours
from magic141_jax.errors import UserError
from magic141_jax.models.network import Network
from magic141_jax.models.text import Bert, BertConfig
from magic141_jax.pipelines.components import load_model
from magic141_jax.pytree import flatten
from magic141_jax.sharding import MeshConfig, make_mesh


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_loaded_values_are_the_published_ones(repo, published_tensors, part):
    network, params = repository.load(repo / part)
    component = repository.open_component(repo / part)
    assert component.written_by == "diffusers 0.33.0.dev0"
    assert component.network.config == network.config
    back = from_ours(params, component.table)
    theirs = published_tensors(part)
    assert back.keys() == theirs.keys()
    assert all(np.array_equal(back[name], theirs[name].astype(np.float32)) for name in theirs)


def test_dtypes(repo):
    """Parameters take the dtype that is asked for, else that of the computation; bfloat16 is not rounded twice."""
    float32 = flatten(repository.load(repo / "transformer")[1])
    network, params = repository.load(repo / "transformer", compute_dtype="bfloat16")
    assert network.config.compute_dtype == "bfloat16"
    for path, leaf in flatten(params).items():
        assert leaf.dtype == ml_dtypes.bfloat16 and float32[path].dtype == np.float32
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), float32[path])
    given = repository.load(repo / "vae", dtype="bfloat16")[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(given)} == {np.dtype(ml_dtypes.bfloat16)}


def test_a_mesh(repo):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    _, one = repository.load(repo / "transformer")
    _, params = repository.load(repo / "transformer", mesh=mesh)
    kernel = params["double_blocks"]["video"]["qkv"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (2, 4, 24)
    jax.tree.map(np.testing.assert_array_equal, params, one)


def test_the_pipelines_read_published_folders_too(repo):
    model = load_model(repo / "transformer", overrides={"compute_dtype": "bfloat16"})
    assert model.network.config.compute_dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "HunyuanVideoTransformer3DModell"}, "Did you mean 'HunyuanVideoTransformer3DModel'"),
        ({"_class_name": None, "architectures": ["QwenModel"]}, "is of a QwenModel, which is not known here"),
        ({"_class_name": None, "architectures": []}, "neither _class_name nor architectures"),
        ({"num_layers": 3}, r"has shape \(2, .*, the config wants \(3, "),
        ({"text_embed_dim": 13}, r"text_in\.project\.kernel has shape \(12, 16\), the config wants \(13, 16\)"),
        ({"guidance_embeds": True}, r"missing guidance_in\.up\.kernel"),
        ({"num_layers": "two"}, "transformer"),
        ({"num_attention_heads": 4}, "attn.to_q"),
        ({"rope_axes_dim": 3}, "config.json is malformed"),
        ({"patch_size": None}, "transformer"),
    ],
)
def test_configs_that_are_not_ours_or_contradict_the_weights(write_published, tmp_path, monkeypatch, change, message):
    folder = write_published(tmp_path / "transformer", "transformer", **change)
    monkeypatch.setattr(np, "fromfile", None)  # no value is read
    with pytest.raises(UserError, match=message) as error:
        repository.load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_version_is_only_noted(write_published, tmp_path):
    folder = write_published(tmp_path / "vae", "vae", _diffusers_version="99.1")
    assert repository.open_component(folder).written_by == "diffusers 99.1"


def test_tensors_without_a_place(write_published, published_tensors, tmp_path):
    theirs = published_tensors("vae") | {f"stray.{i}": np.zeros(1, np.float32) for i in range(50)}
    del theirs["decoder.conv_in.conv.bias"]
    folder = write_published(tmp_path / "vae", "vae", theirs)
    with pytest.raises(UserError, match=r"no rule for tensor stray\.0") as error:
        repository.load(folder)
    assert "and 11 more" in str(error.value) and len(str(error.value)) < 3000


def test_overrides_are_checked(repo):
    with pytest.raises(UserError, match="settings remta are wrong"):
        repository.load(repo / "transformer", remta="full")


def test_memory_is_checked_before_any_is_taken(repo, monkeypatch):
    monkeypatch.setattr(memory, "memory_free", lambda device: 1000)
    monkeypatch.setattr(tensors.np, "fromfile", None)
    with pytest.raises(UserError, match=r"need .* in float32 on each of 1 devices, which have 1\.0 kB free"):
        repository.load(repo / "transformer")


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        repository.open_component(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="not a JSON object"):
        repository.open_component(tmp_path)


def test_sharded_folders_of_diffusers(tmp_path):
    """What diffusers saves, in shards and in bfloat16."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(4, 4, 8, 8), norm_num_groups=2, layers_per_block=1, latent_channels=4
    ).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "vae", max_shard_size="50KB")
    assert len(list((tmp_path / "vae").glob("*-of-*.safetensors"))) > 1
    component = repository.open_component(tmp_path / "vae")
    back = from_ours(repository.load(tmp_path / "vae", dtype="bfloat16")[1], component.table)
    theirs = model.state_dict()
    assert back.keys() == theirs.keys()
    assert all(np.array_equal(back[k].view(np.int16), theirs[k].view(torch.int16).numpy()) for k in theirs)


def test_a_bert(tmp_path):
    config = BertConfig(vocabulary=20, positions=12, width=8, layers=2, heads=2, mlp=16, length=8)
    params = Network.create(Bert, config).init(jax.random.key(0))
    theirs = {name: getattr(config, field) for name, field in bert.CONFIG_FIELDS.items()} | bert.SUPPORTED
    (tmp_path / "config.json").write_text(json.dumps(theirs | {"architectures": ["BertModel"]}))
    save_file(from_ours(params, bert.TABLE), tmp_path / "model.safetensors")
    network, read = repository.load(tmp_path, length=8)
    assert network.config == config
    jax.tree.map(np.testing.assert_array_equal, read, params)
