"""Where weights are found, how they are placed, and where compiled programs are kept."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax import settings, weights
from magic141_jax.convert import hub, memory
from magic141_jax.errors import UserError
from magic141_jax.models import mmdit
from magic141_jax.models.network import Network
from magic141_jax.models.resident import at_once
from magic141_jax.pipelines import components
from magic141_jax.pipelines.components import enable_compilation_cache, find_folder, load_components, load_model
from magic141_jax.sharding import MeshConfig, make_mesh


def test_the_compute_dtype(weights_folder):
    for dtype, name in ((None, "float32"), ("bfloat16", "bfloat16")):
        made = load_components(weights_folder, dtype=dtype)
        assert {x.dtype for x in jax.tree.leaves(made.transformer.params)} == {jnp.dtype(name)}
        assert {x.dtype for x in jax.tree.leaves(made.vae.params)} == {jnp.dtype("float32")}
        assert made.transformer.network.config.compute_dtype == name
    with pytest.raises(UserError, match="float16"):
        load_components(weights_folder, dtype="float16")


def test_digests_follow_the_files(weights_folder, tmp_path):
    first = load_components(weights_folder)
    folder = tmp_path / "copy"
    shutil.copytree(weights_folder, folder)
    assert load_components(folder).digest == first.digest
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"fps": 8', '"fps": 12'))
    second = load_components(folder)
    assert second.sampling.fps == 12
    assert second.digest == first.digest
    assert second.config_digest != first.config_digest


def test_a_folder_may_borrow_components_from_a_sibling(weights_folder, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    shutil.copytree(weights_folder, whole)
    shutil.copytree(weights_folder / "transformer", part / "transformer")
    index = json.loads((whole / "model_index.json").read_text())
    index["sampling"]["num_inference_steps"] = 3
    (part / "model_index.json").write_text(json.dumps(index | {"base": "whole"}))
    made, plain = load_components(part), load_components(whole)
    assert made.sampling.num_inference_steps == 3 != plain.sampling.num_inference_steps
    jax.tree.map(np.testing.assert_array_equal, made.vae.params, plain.vae.params)
    assert made.digest == plain.digest
    for base, message in (("../../etc", "folder beside"), (3, "folder beside"), ("none", "copy that one too")):
        (part / "model_index.json").write_text(json.dumps(index | {"base": base}))
        with pytest.raises(UserError, match=message):
            load_components(part)


def test_bad_index(weights_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(weights_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    for change, message in (({"format": 2}, "format 2"), ({"sampling": {"heigth": 3}}, "'height'")):
        (folder / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(UserError, match=message):
            load_components(folder)


def test_a_folder_without_numbers_is_read_as_before(weights_folder, tmp_path):
    """Also one of text to video alone, whose transformer did not say yet that it knows no frames."""
    folder = tmp_path / "old"
    shutil.copytree(weights_folder, folder)
    for file in (folder / "model_index.json", *folder.glob("*/config.json")):
        file.write_text(json.dumps(weights.read_config(file)))
    made, new = load_components(folder), load_components(weights_folder)
    assert made.sampling == new.sampling
    jax.tree.map(np.testing.assert_array_equal, made.transformer.params, new.transformer.params)
    network = Network.create(mmdit.MMDiT, dataclasses.replace(mmdit.debug(), known="none", in_channels=4))
    config = {"model": "mmdit", **settings.to_dict(network.config)}
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), network.abstract_params)
    weights.save(tmp_path / "t2v", config, params)
    (tmp_path / "t2v" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "known"}))
    assert load_model(tmp_path / "t2v").network.config.known == "none"


def test_find_folder(weights_folder, tmp_path, monkeypatch):
    asked = []

    def fetch(name, revision):
        asked.append((name, revision))
        return weights_folder

    monkeypatch.setattr(hub, "fetch", fetch)
    assert find_folder(weights_folder) == weights_folder
    assert find_folder("owner/name", "v1") == weights_folder
    assert asked == [("owner/name", "v1")]
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    for name in ("./missing", "/missing/folder", "missing", "file", "weights/emoji65"):
        with pytest.raises(UserError, match="weights folder"):
            find_folder(name)
    monkeypatch.setattr(components, "DEFAULT_FOLDER", tmp_path / "none")
    with pytest.raises(UserError, match="no embedded weights"):
        find_folder("default")
    assert len(asked) == 1


def test_compilation_cache(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("MAGIC141_JAX_CACHE", "")
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MAGIC141_JAX_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.warns(UserWarning, match="compiled anew"):
            enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
        monkeypatch.delenv("MAGIC141_JAX_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "magic141_jax")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_parameters_are_laid_over_a_mesh(weights_folder):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    made = load_components(weights_folder, mesh=mesh)
    assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(made.transformer.params))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(made.transformer.params))


def test_memory_is_checked_before_weights_are_read(weights_folder, monkeypatch):
    monkeypatch.setattr(memory, "memory_free", lambda device: 1000)
    monkeypatch.setattr(components.weights, "load", None)
    with pytest.raises(
        UserError, match=r"transformer need .* in float32 on each of 1 devices, which have 1\.0 kB free"
    ):
        load_components(weights_folder)


def test_another_transformer_takes_the_place_of_the_folders_own(weights_folder, tmp_path):
    config, params = weights.load(weights_folder / "transformer")
    changed = jax.tree.map(lambda x: np.asarray(x, np.float32) + 1, params)
    weights.save(tmp_path / "other", config, changed)
    made = load_components(weights_folder, transformer=tmp_path / "other", dtype="bfloat16")
    assert made.transformer.network.config.compute_dtype == "bfloat16"
    for want, got in zip(jax.tree.leaves(changed), jax.tree.leaves(made.transformer.params), strict=True):
        np.testing.assert_array_equal(want.astype(got.dtype), got)
    weights.save(tmp_path / "wide", {**config, "out_channels": 5, "text_width": 13}, params)
    with pytest.raises(UserError, match=r"does not fit .*out_channels 5 in place of 4, text_width 13 in place of 12"):
        load_components(weights_folder, transformer=tmp_path / "wide")


def test_published_components_are_told_by_their_config(tmp_path, monkeypatch):
    monkeypatch.setattr(components.repository, "load", lambda folder, **options: (folder, options))
    for theirs in ({"_class_name": "X"}, {"architectures": ["X"], "model_type": "x"}):
        (tmp_path / "config.json").write_text(json.dumps(theirs))
        expected = (tmp_path, {"mesh": None, "lend": at_once, "length": 3})
        assert load_model(tmp_path, overrides={"length": 3}) == expected
    (tmp_path / "config.json").write_text(json.dumps({"model": "y", "_class_name": "X"}))
    with pytest.raises(UserError, match="names the model 'y'"):
        load_model(tmp_path)
