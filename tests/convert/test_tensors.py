"""Lazy safetensors against the safetensors library, both ways, and every kind of damage named."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from magic141_jax.convert import tensors
from magic141_jax.convert.tensors import open_file, open_tensors, write
from magic141_jax.errors import UserError

STEM = "model"


def values():
    generator = np.random.default_rng(0)
    dtypes = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?")
    made = {dtype: generator.integers(0, 100, (3, 5)).astype(dtype) for dtype in dtypes}
    return made | {
        "bfloat16": generator.normal(size=(3, 4, 5)).astype(ml_dtypes.bfloat16),
        "scalar": np.float32(3),
        "none": np.zeros((0, 4), np.float32),
    }


def header_of(file):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(file, header, data):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_reads_what_the_library_writes(tmp_path):
    save_file({name: np.asarray(value) for name, value in values().items()}, tmp_path / "x.safetensors")
    read = open_file(tmp_path / "x.safetensors")
    assert read.keys() == values().keys()
    for name, value in values().items():
        assert (read[name].shape, read[name].dtype, read[name].nbytes) == (value.shape, value.dtype, value.nbytes)
        np.testing.assert_array_equal(np.asarray(read[name]), value)
    np.testing.assert_array_equal(read["bfloat16"][2], values()["bfloat16"][2])
    assert np.asarray(read["f8"], np.float32).dtype == np.float32
    with pytest.raises(IndexError):
        read["f4"][3]


def test_the_library_reads_what_we_write(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "MAX_SHARD_BYTES", 250)
    made = {name: np.asarray(value) for name, value in values().items()}
    abstract = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in made.items() if v.dtype.itemsize < 8}
    abstract |= {name: made[name] for name in ("f8", "i8")}
    write(tmp_path, STEM, abstract, reversed(made.items()))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == made.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in made.values())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    read = {}
    for file in files:
        read |= load_file(file)
        with safe_open(file, "np") as reader:
            assert reader.metadata() == {"format": "pt"}
    for name, value in made.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)
    assert open_tensors(tmp_path).keys() == made.keys()


def test_writing_casts_and_keeps_its_promise(tmp_path):
    half = {"a": jax.ShapeDtypeStruct((2, 3), ml_dtypes.bfloat16), "b": jax.ShapeDtypeStruct((1,), np.float32)}
    a, b = np.arange(6, dtype=np.float32).reshape(3, 2).T, np.ones(1, np.float32)
    write(tmp_path, STEM, half, [("a", a), ("b", b)])
    read = open_tensors(tmp_path)
    assert read["a"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.asarray(read["a"]), a)
    for given, message in (([("a", a)], "not given"), ([("a", a.T)], "promised")):
        with pytest.raises(ValueError, match=message):
            write(tmp_path, STEM, half, given)


DAMAGE = {
    "truncated": lambda file, header, data: rewrite(file, header, data[:-4]),
    "too long": lambda file, header, data: rewrite(file, header, data + b"1234"),
    "empty": lambda file, header, data: file.write_bytes(b""),
    "a wrong length": lambda file, header, data: file.write_bytes(b"\xff" * 8 + data),
    "no JSON": lambda file, header, data: rewrite(file, b"{nonsense", data),
    "a list": lambda file, header, data: rewrite(file, b"[1, 2]", data),
    "not UTF-8": lambda file, header, data: rewrite(file, b'{"\xff": 1}', data),
    "an unknown dtype": lambda file, header, data: rewrite(file, header | {"a": header["a"] | {"dtype": "F3"}}, data),
    "no offsets": lambda file, header, data: rewrite(file, header | {"a": {"dtype": "F32", "shape": [2]}}, data),
    "a negative size": lambda file, header, data: rewrite(file, header | {"a": header["a"] | {"shape": [-2]}}, data),
    "another size": lambda file, header, data: rewrite(file, header | {"a": header["a"] | {"shape": [3]}}, data),
    "overlap": lambda file, header, data: rewrite(file, header | {"a": header["b"]}, data),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_before_any_data_is_read(tmp_path, damage):
    file = tmp_path / "model.safetensors"
    save_file({"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}, file)
    DAMAGE[damage](file, *header_of(file))
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or damaged") as error:
        open_tensors(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": np.ones(2, np.float32)}, file)
    tensor = open_file(file)["a"]
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match="ends 3 bytes early"):
        np.asarray(tensor)
    file.unlink()
    with pytest.raises(UserError, match="can't read"):
        np.asarray(tensor)


@pytest.fixture
def sharded(write_published, tmp_path):
    folder = write_published(tmp_path / "transformer", "transformer")
    return folder, folder / "diffusion_pytorch_model.safetensors.index.json"


def shard(folder, number):
    return folder / f"diffusion_pytorch_model-0000{number}-of-00003.safetensors"


def test_shards_that_disagree_with_their_index(sharded, published_tensors):
    folder, _ = sharded
    assert open_tensors(folder).keys() == published_tensors("transformer").keys()
    held = load_file(shard(folder, 1))
    moved = next(iter(held))
    save_file({name: value for name, value in held.items() if name != moved} | {"stray": np.ones(1)}, shard(folder, 1))
    shard(folder, 2).unlink()
    with pytest.raises(UserError) as error:
        open_tensors(folder)
    for fault in (f"00001-of-00003.safetensors lacks {moved}", "holds stray", "00002-of-00003.safetensors is missing"):
        assert fault in str(error.value)


@pytest.mark.parametrize("name", ["/etc/x.safetensors", "../x.safetensors", "a\\x.safetensors", "x.bin", 3])
def test_an_index_can_not_leave_its_folder(sharded, name):
    folder, index = sharded
    changed = json.loads(index.read_text())
    changed["weight_map"]["proj_out.bias"] = name
    index.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"shards are|no weight_map"):
        open_tensors(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_a_broken_index(sharded, text):
    folder, index = sharded
    index.write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        open_tensors(folder)


def test_links_into_another_folder_are_fine(sharded, tmp_path):
    """The Hub's cache looks like this."""
    folder, _ = sharded
    (tmp_path / "snapshot").mkdir()
    for file in folder.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert open_tensors(tmp_path / "snapshot").keys() == open_tensors(folder).keys()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "mp_rank_00_model_states.pt", "x.ckpt"])
def test_pickles_are_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=r"is a pickle.*weights_only=True"):
            open_tensors(path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(UserError, match=r"no diffusion_pytorch_model\.safetensors or model\.safetensors"):
        open_tensors(tmp_path)
