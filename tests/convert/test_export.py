"""Out to diffusers' layout: bit-equal round trips, a folder that diffusers loads, and nothing half-written."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from magic141_jax import settings, weights
from magic141_jax.convert import memory, repository, tensors
from magic141_jax.convert.engine import to_ours
from magic141_jax.convert.export import export, open_ours
from magic141_jax.convert.tensors import open_tensors
from magic141_jax.errors import UserError
from magic141_jax.models.mmdit import debug
from magic141_jax.pytree import flatten, unflatten

PARTS = ("transformer", "vae")


def import_component(src, dst, storage="float32"):
    """A published component folder as one of ours, every value as stored ("float32" casts nothing)."""
    component = repository.open_component(src)
    params = to_ours(component.tensors, component.table, component.network.abstract_params)
    config = {"model": component.kind, **settings.to_dict(component.network.config)}
    weights.save(dst, config, params, storage=storage)


@pytest.fixture(scope="module")
def published(write_published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "published"
    for part in PARTS:
        write_published(folder / part, part)
    return folder


@pytest.fixture
def ours(published, tmp_path):
    folder = tmp_path / "ours"
    for part in PARTS:
        import_component(published / part, folder / part)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text('{"architectures": ["LlavaForConditionalGeneration"]}')
    (folder / "model_index.json").write_text(json.dumps({"format": 1, "sampling": {"shift": 5.0}}))
    return folder


def same(one, two):
    one, two = open_tensors(one), open_tensors(two)
    return one.keys() == two.keys() and all(
        one[k].dtype == two[k].dtype and np.asarray(one[k]).tobytes() == np.asarray(two[k]).tobytes() for k in one
    )


def test_the_round_trip_is_bit_equal(published, ours, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "MAX_SHARD_BYTES", 40_000)
    assert open_tensors(published / "transformer")["proj_out.weight"].dtype == ml_dtypes.bfloat16
    export(ours, tmp_path / "back")
    for part in PARTS:
        assert same(published / part, tmp_path / "back" / part)
        theirs, back = (json.loads((f / part / "config.json").read_text()) for f in (published, tmp_path / "back"))
        assert back | {"_diffusers_version": theirs["_diffusers_version"]} == theirs
    assert len(list((tmp_path / "back/transformer").glob("*-of-*.safetensors"))) > 2
    index = json.loads((tmp_path / "back/model_index.json").read_text())
    assert index["_class_name"] == "HunyuanVideoImageToVideoPipeline"
    assert index["transformer"] == ["diffusers", "HunyuanVideoTransformer3DModel"]
    assert index["text_encoder"][1] == "LlavaForConditionalGeneration" and index["tokenizer_2"] == [None, None]
    assert (tmp_path / "back/tokenizer/tokenizer.json").read_text() == "{}"
    scheduler = json.loads((tmp_path / "back/scheduler/scheduler_config.json").read_text())
    assert scheduler["shift"] == 5.0 and scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"


def test_one_component(published, ours, tmp_path):
    export(ours / "vae", tmp_path / "vae", dtype="bfloat16")
    back, theirs = open_tensors(tmp_path / "vae"), open_tensors(published / "vae")
    assert {tensor.dtype for tensor in back.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert all(np.array_equal(np.asarray(back[k]), np.asarray(theirs[k]).astype(ml_dtypes.bfloat16)) for k in theirs)
    assert sorted(p.name for p in (tmp_path / "vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_int8_folders_are_expanded(published, tmp_path):
    import_component(published / "transformer", tmp_path / "small", storage="int8")
    leaves, wanted = open_ours(tmp_path / "small"), flatten(weights.load(tmp_path / "small")[1])
    assert leaves.keys() == wanted.keys()
    kernel = "double_blocks.video.qkv.kernel"
    assert leaves[kernel].dtype == np.float32
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(np.asarray(leaf), wanted[path])
    np.testing.assert_array_equal(leaves[kernel][1], wanted[kernel][1])
    export(tmp_path / "small", tmp_path / "back")
    assert repository.open_component(tmp_path / "back").kind == "mmdit"


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_pruned_weights_are_zero_there_and_back(published, ours, tmp_path, storage):
    """A mask is exact through our storage, the published layout, and the way back."""
    config, params = weights.load(ours / "transformer")
    rng, flat = np.random.default_rng(0), flatten(params)
    kept = {path: rng.random(leaf.shape) < 0.5 for path, leaf in flat.items() if path.endswith("kernel")}
    pruned = {path: np.where(kept[path], leaf, 0) if path in kept else leaf for path, leaf in flat.items()}
    weights.save(ours / "transformer", config, unflatten(pruned), storage=storage)
    export(ours / "transformer", tmp_path / "out")
    import_component(tmp_path / "out", tmp_path / "back", storage=storage)
    back = flatten(weights.load(tmp_path / "back")[1])
    for path, mask in kept.items():
        assert not np.any(np.asarray(back[path], np.float32)[~mask]), path
        assert np.any(np.asarray(back[path], np.float32)) or not np.any(np.asarray(flat[path]))


def test_kernels_in_other_forms_have_to_be_expanded_first(ours, tmp_path):
    file = ours / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "kernels": {"patch_in.kernel": {"values": "int8"}}}))
    with pytest.raises(UserError, match=r"forms of our own: write plain ones with .* --expand"):
        export(ours / "transformer", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_diffusers_loads_it(published, ours, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(tensors, "MAX_SHARD_BYTES", 60_000)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(ours / part)
    export(ours, tmp_path / "back")
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_processor"))
    pipeline = diffusers.HunyuanVideoImageToVideoPipeline.from_pretrained(tmp_path / "back", **absent)
    assert pipeline.scheduler.config.shift == 5.0 and pipeline.text_encoder is None
    for part, name in (("transformer", "HunyuanVideoTransformer3DModel"), ("vae", "AutoencoderKLHunyuanVideo")):
        loaded, stored = getattr(pipeline, part), open_tensors(published / part)
        assert type(loaded).__name__ == name
        state = loaded.state_dict()
        assert state.keys() == stored.keys()
        for key, tensor in state.items():
            wanted = np.asarray(stored[key]).astype(np.float32)
            assert torch.equal(tensor.float(), torch.from_numpy(wanted)), key


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(ours, tmp_path, monkeypatch, error):
    before = sorted(tmp_path.iterdir())

    def fail(*_):
        raise error

    monkeypatch.setattr(tensors, "_write_header", fail)
    with pytest.raises(type(error)):
        export(ours, tmp_path / "back")
    assert sorted(tmp_path.iterdir()) == before


def test_the_disk_is_checked_first(ours, tmp_path, monkeypatch):
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    for src in (ours, ours / "vae"):
        with pytest.raises(UserError, match=r"the export of .* has 1\.0 kB free"):
            export(src, tmp_path / "back")


def test_what_can_not_be_exported(ours, tmp_path):
    for arguments, message in (
        ({"src": tmp_path / "none"}, "no weights folder"),
        ({"dst": ours}, "exists already"),
        ({"format": "original"}, "format is 'original'"),
        ({"dtype": "float31"}, "Did you mean 'float32'"),
        ({"src": ours / "tokenizer"}, r"model_index\.json"),
        ({"src": ours / "text_encoder"}, "names the model None"),
    ):
        with pytest.raises(UserError, match=message):
            export(**({"src": ours, "dst": tmp_path / "back"} | arguments))
    (ours / "image_encoder").mkdir()
    with pytest.raises(UserError, match="has no image_encoder; move it out"):
        export(ours, tmp_path / "back")


def test_networks_without_a_published_layout(weights_folder, tmp_path):
    for part, message in (("vae", "no published layout holds a patch_vae"), ("transformer", "time features")):
        with pytest.raises(UserError, match=message):
            export(weights_folder / part, tmp_path / "back")
    with pytest.raises(UserError, match="can't be exported"):
        export(weights_folder, tmp_path / "back")
    assert debug().time_features != 256  # why


def test_weights_that_do_not_fit_their_config(ours, tmp_path):
    config = json.loads((ours / "vae" / "config.json").read_text())
    (ours / "vae" / "config.json").write_text(json.dumps(config | {"latent_channels": 5}))
    with pytest.raises(UserError, match="does not fit its config"):
        export(ours, tmp_path / "back")
    (ours / "vae" / "config.json").write_text(json.dumps(config | {"layers": 5}))
    with pytest.raises(UserError, match="unknown key"):
        export(ours, tmp_path / "back")
