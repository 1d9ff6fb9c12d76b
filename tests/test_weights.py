"""Component folders: what is written comes back, nothing is half-written, damage is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax import weights
from magic141_jax.errors import UserError
from magic141_jax.pytree import flatten

CONFIG = {"model": "test", "width": 8, "axes": [1, 2]}


def make_params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "layers": {"kernel": jax.random.normal(keys[0], (3, 16, 8)), "bias": jax.random.normal(keys[1], (3, 8))},
        "steps": jnp.arange(3),
    }


def test_float32_comes_back_bit_for_bit(tmp_path):
    weights.save(tmp_path / "net", CONFIG, make_params())
    config, params = weights.load(tmp_path / "net")
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params, make_params())


@pytest.mark.parametrize(("storage", "bound"), [("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_smaller_storage_stays_within_its_rounding(tmp_path, storage, bound):
    weights.save(tmp_path / "net", CONFIG, make_params(), storage=storage)
    _, params = weights.load(tmp_path / "net")
    want = make_params()["layers"]["kernel"]
    error = jnp.abs(params["layers"]["kernel"].astype(jnp.float32) - want).max(axis=-2)
    assert (error <= bound * jnp.abs(want).max(axis=-2)).all() and error.max() > 0
    assert list(flatten(params)) == list(flatten(make_params()))
    np.testing.assert_array_equal(params["steps"], jnp.arange(3))


def test_int8_is_about_a_quarter_of_float32(tmp_path):
    params = {"kernel": jnp.ones((256, 256))}
    sizes = {}
    for storage in ("float32", "int8"):
        weights.save(tmp_path / storage, CONFIG, params, storage=storage)
        sizes[storage] = (tmp_path / storage / "model.safetensors").stat().st_size
    assert sizes["int8"] < 0.27 * sizes["float32"]


def test_shards_have_an_index_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 200)
    weights.save(tmp_path / "net", CONFIG, make_params())
    index = json.loads((tmp_path / "net/model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == list(flatten(make_params()))
    assert len(weights.tensor_files(tmp_path / "net")) > 1
    _, params = weights.load(tmp_path / "net")
    jax.tree.map(np.testing.assert_array_equal, params, make_params())


def test_saving_replaces_whole_folders_and_leaves_nothing_beside(tmp_path):
    weights.save(tmp_path / "net", CONFIG, make_params())
    (tmp_path / "net/stale.txt").write_text("old")
    weights.save(tmp_path / "net", {"model": "new"}, {"a": jnp.ones(2)})
    assert weights.load(tmp_path / "net")[0] == {"model": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_save_keeps_the_old_folder(tmp_path, monkeypatch):
    weights.save(tmp_path / "net", CONFIG, make_params())

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError):
        weights.save(tmp_path / "net", {"model": "new"}, make_params())
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    assert weights.load(tmp_path / "net")[0] == CONFIG


def test_damage_is_the_users_to_mend_and_named(tmp_path):
    folder = tmp_path / "net"
    with pytest.raises(UserError, match=r"config\.json"):
        weights.load(folder)
    weights.save(folder, CONFIG, make_params())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated or damaged"):
        weights.load(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        weights.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="can't read"):
        weights.load(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "model.bin"])
def test_an_index_stays_in_its_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="beside the index, nothing else"):
        weights.tensor_files(tmp_path)


def test_a_file_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list"):
        weights.load(tmp_path)


def test_digest_depends_on_the_tensors_alone(tmp_path):
    params = make_params()
    weights.save(tmp_path / "a/net", CONFIG, params)
    weights.save(tmp_path / "b/net", {"model": "other"}, params)
    first = weights.digest(tmp_path / "a")
    assert len(first) == 16 and first == weights.digest(tmp_path / "b")
    weights.save(tmp_path / "b/net", CONFIG, params | {"steps": jnp.arange(3) + 1})
    assert first != weights.digest(tmp_path / "b")
    file = tmp_path / "a/net/model.safetensors"
    assert weights.digest(file) == first, "a file alone is told by the same digits"


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    channels = np.geomspace(1e-3, 10, 6)  # output channels of very different sizes
    return {
        "blocks": {
            "q": {"kernel": rng.normal(size=(3, 8, 6)) * channels, "bias": rng.normal(size=(3, 6))},
            "norm": {"scale": rng.normal(size=(3, 8))},
            "qk_scale": rng.normal(size=(3, 2, 8)),
        },
        "word": {"embedding": rng.normal(size=(20, 6)) * channels},
    }


def as_float32(tree):
    return {path: jnp.asarray(leaf, jnp.float32) for path, leaf in flatten(tree).items()}


def test_int8_rounds_matrices_by_at_most_half_a_step_of_their_output_channel(tmp_path):
    weights.save(tmp_path / "a", {"model": "x"}, drawn(), storage="int8")
    _, params = weights.load(tmp_path / "a")
    given, read = as_float32(drawn()), flatten(params)
    assert read.keys() == given.keys()
    for path in ("blocks.q.kernel", "word.embedding"):
        step = np.abs(given[path]).max(axis=-2, keepdims=True) / 127
        error = np.abs(np.asarray(read[path]) - np.asarray(given[path]))
        assert (error <= 0.5001 * step).all()
        assert error.max() > 0


def test_int8_leaves_stacked_biases_and_norm_scales_exact(tmp_path):
    weights.save(tmp_path / "a", {"model": "x"}, drawn(), storage="int8")
    given, read = as_float32(drawn()), flatten(weights.load(tmp_path / "a")[1])
    for path in ("blocks.q.bias", "blocks.norm.scale", "blocks.qk_scale"):
        np.testing.assert_array_equal(read[path], given[path])
