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


def write_weights(folder, parts=("transformer", "vae", "text_encoder"), **index):
    """A weights folder whose components have other files as well, and the values 0, 1, 2..."""
    for number, name in enumerate(parts):
        weights.save(folder / name, {"model": name}, {"a": {"kernel": jnp.full((2, 3), number)}})
    if "text_encoder" in parts:
        (folder / "text_encoder" / "tokenizer.json").write_text("{}")
        (folder / "text_encoder" / "more").mkdir()
        (folder / "text_encoder" / "more" / "words.txt").write_text("a b")
    (folder / "model_index.json").write_text(json.dumps({"format": 1, **index}))
    return folder


def seen(folder):
    """All files below a folder: their bytes, mode and time."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {file: (file.read_bytes(), file.stat().st_mode, file.stat().st_mtime_ns) for file in files}


def names(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


NEW = {"model": "new"}, {"b": {"kernel": {"values": jnp.ones((2, 2), jnp.int8)}}}


def test_a_derived_folder_links_what_stays_and_holds_what_is_new(tmp_path):
    source = write_weights(tmp_path / "source", sampling={"fps": 8})
    (source / "text_encoder" / "model.safetensors.index.json").write_text("{}")
    (source / "text_encoder" / "model-00001-of-00002.safetensors").write_text("stale")
    before = seen(source)
    weights.derive(source, tmp_path / "runs" / "new", {"text_encoder": NEW})
    target = tmp_path / "runs" / "new"
    assert seen(source) == before
    assert names(target) == names(source) - {
        f"text_encoder/{name}" for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    }
    same = names(target) - {"text_encoder/config.json", "text_encoder/model.safetensors", "model_index.json"}
    assert "text_encoder/more/words.txt" in same and "vae/model.safetensors" in same
    assert all((target / name).samefile(source / name) for name in same), "links take no space"
    config, params = weights.load(target / "text_encoder")
    assert config == NEW[0]
    np.testing.assert_array_equal(params["b"]["kernel"]["values"], 1)
    assert params["b"]["kernel"]["values"].dtype == jnp.int8
    assert weights.read_json(target / "model_index.json") == {"format": 1, "sampling": {"fps": 8}}
    assert [path.name for path in target.parent.iterdir()] == ["new"]


def test_a_derived_folder_is_copied_where_the_disk_has_no_links(tmp_path, monkeypatch):
    source = write_weights(tmp_path / "source")

    def refuse(self, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
    weights.derive(source, tmp_path / "new", {"vae": NEW})
    assert names(tmp_path / "new") == names(source)
    held = tmp_path / "new" / "transformer" / "model.safetensors"
    assert held.read_bytes() == (source / "transformer" / "model.safetensors").read_bytes()
    assert not held.samefile(source / "transformer" / "model.safetensors")


def test_a_component_of_none_is_left_out(tmp_path):
    source = write_weights(tmp_path / "source")
    weights.derive(source, tmp_path / "new", {"vae": None})
    assert names(tmp_path / "new") == {name for name in names(source) if not name.startswith("vae/")}


def test_what_a_base_lends_is_derived_too(tmp_path):
    """The new folder stands alone, wherever it lies."""
    write_weights(tmp_path / "whole")
    part = write_weights(tmp_path / "part", ("transformer",), base="whole")
    before = seen(tmp_path)
    weights.derive(part, tmp_path / "elsewhere" / "new", {"vae": NEW})
    assert {file: kept for file, kept in seen(tmp_path).items() if file in before} == before
    target = tmp_path / "elsewhere" / "new"
    assert names(target) == names(tmp_path / "whole")
    assert "base" not in weights.read_json(target / "model_index.json")
    assert weights.load(target / "vae")[0] == NEW[0]
    assert (target / "transformer/model.safetensors").samefile(part / "transformer/model.safetensors")
    assert (target / "text_encoder/tokenizer.json").samefile(tmp_path / "whole" / "text_encoder/tokenizer.json")


def test_a_derived_folder_replaces_weights_alone(tmp_path):
    source, other = write_weights(tmp_path / "source"), write_weights(tmp_path / "other")
    (other / "stale").write_text("")
    weights.derive(source, other, {"vae": NEW})
    assert names(other) == names(source)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    (tmp_path / "link").symlink_to(source)
    before = seen(tmp_path)
    for target, message in (
        ("source", "is the folder that is read"),
        ("link", "is the folder that is read"),
        ("source/new", "lies in or around it"),
        (".", "lies in or around it"),
        ("thesis", "no weights folder"),
        ("thesis/chapter.tex", "no weights folder"),
    ):
        with pytest.raises(UserError, match=message):
            weights.derive(source, tmp_path / target, {"vae": NEW})
    assert seen(tmp_path) == before


def test_an_interrupted_derivation_leaves_nothing(tmp_path, monkeypatch):
    source = write_weights(tmp_path / "source")
    target = write_weights(tmp_path / "target", ("vae",))
    before = seen(tmp_path)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        weights.derive(source, target, {"vae": NEW})
    assert seen(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_float8_comes_back(tmp_path):
    values = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float8_e4m3fn)
    params = {"a": values, "b": jnp.ones(2, jnp.bfloat16), "count": jnp.arange(3), "one": jnp.float32(2)}
    weights.save(tmp_path / "net", {"model": "x"}, params)
    _, read = weights.load(tmp_path / "net")
    assert {name: leaf.dtype for name, leaf in read.items()} == {name: leaf.dtype for name, leaf in params.items()}
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_files_say_their_format_and_come_back_without_it(tmp_path):
    weights.save(tmp_path / "net", CONFIG, make_params())
    file = tmp_path / "net" / "config.json"
    assert weights.read_json(file) == {"format": weights.FORMAT, **CONFIG}
    assert weights.read_config(file) == weights.load(tmp_path / "net")[0] == CONFIG


@pytest.mark.parametrize(("channels", "known"), [((16, 16), "none"), ((33, 16), "channels")])
def test_a_transformer_without_a_number_says_how_known_frames_enter(tmp_path, channels, known):
    old = {"model": "mmdit", "in_channels": channels[0], "out_channels": channels[1]}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(old))
    assert weights.read_config(file) == {**old, "known": known}
    file.write_text(json.dumps({**old, "known": "replace"}))
    assert weights.read_config(file)["known"] == "replace"
    file.write_text(json.dumps({"format": 1, **old}))
    assert weights.read_config(file) == old


def test_migrations_are_walked_from_the_format_of_the_file_to_todays(tmp_path, monkeypatch):
    def renamed(old, new):
        return lambda config: {new if key == old else key: value for key, value in config.items()}

    table = {0: renamed("a", "b"), 1: renamed("b", "c"), 2: renamed("c", "d")}
    monkeypatch.setattr(weights, "MIGRATIONS", table)
    monkeypatch.setattr(weights, "FORMAT", 3)
    file = tmp_path / "config.json"
    for written in ({"a": 5}, {"format": 1, "b": 5}, {"format": 2, "c": 5}, {"format": 3, "d": 5}):
        file.write_text(json.dumps(written))
        assert weights.read_config(file) == {"d": 5}
    weights.write_config(file, {"d": 5})
    assert weights.read_json(file) == {"format": 3, "d": 5}


def test_every_format_before_todays_has_a_migration():
    assert sorted(weights.MIGRATIONS) == list(range(weights.FORMAT))


@pytest.mark.parametrize("number", [weights.FORMAT + 1, -1, "1", 0.5, None, [1]])
def test_a_format_from_the_future_is_refused_in_one_line(tmp_path, number):
    (tmp_path / "config.json").write_text(json.dumps({"format": number, **CONFIG}))
    with pytest.raises(UserError, match=f"reads up to {weights.FORMAT}: take a newer") as caught:
        weights.load(tmp_path)
    assert "\n" not in str(caught.value) and repr(number) in str(caught.value)


def test_published_files_are_left_alone(tmp_path):
    for theirs in ({"_class_name": "X", "in_channels": 16}, {"architectures": ["Y"], "model_type": "bert"}):
        (tmp_path / "config.json").write_text(json.dumps(theirs))
        assert weights.read_config(tmp_path / "config.json") == theirs
