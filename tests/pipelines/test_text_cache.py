"""States on disk: the same bits, keyed by all that decides them, never half a file, no encoder where all is there."""

import errno

import jax
import numpy as np
import pytest

from magic141_jax import weights
from magic141_jax.errors import UserError
from magic141_jax.models.text import TextStates
from magic141_jax.pipelines import text_cache
from magic141_jax.pipelines.text_cache import CachedTextEncoder, digest


class Counting:
    """A text encoder whose states are drawn from the prompt and its picture; `asked` is what it was asked for."""

    length, width, pooled_width = 3, 4, 2

    def __init__(self, image_tokens=0):
        self.image_tokens, self.asked = image_tokens, []

    def encode(self, prompts, images=None):
        self.asked.append(tuple(prompts))
        rows, made = self.image_tokens + self.length, []
        for i, prompt in enumerate(prompts):
            picture = 0 if images is None else int(np.asarray(images[i]).sum())
            random = np.random.default_rng([picture, *prompt.encode()])
            states = random.standard_normal((rows, self.width)).astype(np.float32)
            made.append((states, random.random(rows) > 0.5, states[0, :2]))
        return TextStates(*map(np.stack, zip(*made, strict=True)))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, tuple(a), tuple(b))
    assert [x.dtype for x in a] == [x.dtype for x in b]


def test_states_come_back_bit_for_bit_and_are_encoded_once(tmp_path):
    inner, folder = Counting(), tmp_path / "new" / "cache"
    cached = CachedTextEncoder(inner, folder, identity="x")
    want = Counting().encode(["a", "b", "a"])
    equal(cached.encode(["a", "b"]), Counting().encode(["a", "b"]))
    equal(cached.encode(["a", "b", "a"]), want)
    assert inner.asked == [("a",), ("b",)]
    again = Counting()
    equal(CachedTextEncoder(again, folder, identity="x").encode(["a", "b", "a"]), want)
    assert again.asked == []
    assert (cached.length, cached.width, cached.pooled_width, cached.image_tokens) == (3, 4, 2, 0)
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"] * 2, "and nothing half written"


def test_all_that_decides_the_states_is_in_the_key(tmp_path):
    black, white = np.zeros((2, 2, 3), np.float32), np.ones((2, 2, 3), np.float32)
    seeing, longer = Counting(image_tokens=2), Counting(image_tokens=2)
    longer.length = 5
    cached = CachedTextEncoder(seeing, tmp_path, identity="x")
    for pictures in ([black], [white], [black.reshape(1, 4, 3)], [black.astype(np.float64)], [black]):
        equal(cached.encode(["a"], pictures), Counting(image_tokens=2).encode(["a"], pictures))
    assert len(seeing.asked) == 4
    for encoder, identity in ((seeing, "y"), (longer, "x")):
        before = len(encoder.asked)
        CachedTextEncoder(encoder, tmp_path, identity=identity).encode(["a"], [black])
        assert len(encoder.asked) == before + 1
    equal(cached.encode(["a", "b"], [white, black]), Counting(2).encode(["a", "b"], [white, black]))


@pytest.mark.parametrize("damage", [b"", b"nonsense", None], ids=["empty", "nonsense", "another shape"])
def test_a_damaged_file_is_made_anew_with_a_warning(tmp_path, damage):
    inner = Counting()
    cached = CachedTextEncoder(inner, tmp_path, identity="x")
    want = cached.encode(["a"])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(text_cache.save({"states": np.zeros((3, 3), np.float32)}) if damage is None else damage)
    with pytest.warns(UserWarning, match="damaged"):
        equal(cached.encode(["a"]), want)
    assert path.read_bytes() == whole and len(inner.asked) == 2


def test_what_one_process_lacks_all_of_them_make(tmp_path, monkeypatch):
    inner = Counting()
    cached = CachedTextEncoder(inner, tmp_path, identity="x")
    want = cached.encode(["a", "b"])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    others = np.array([True, False])
    monkeypatch.setattr(text_cache.multihost_utils, "process_allgather", lambda mine: np.stack([mine, others]))
    equal(cached.encode(["a", "b"]), want)
    assert inner.asked == [("a",), ("b",), ("b",)]


def test_the_digest_follows_the_files_and_is_remembered(tmp_path, monkeypatch):
    encoder, cache = tmp_path / "encoder", tmp_path / "cache"
    encoder.mkdir()
    for name in ("model.safetensors", "config.json", "README.md"):
        (encoder / name).write_text(name)
    first = digest([encoder], cache)
    (encoder / "README.md").write_text("another")
    with monkeypatch.context() as patch:
        patch.setattr(weights, "digest", None)
        assert digest([encoder], cache) == first
    for name in ("model.safetensors", "config.json"):
        (encoder / name).write_text(f"{name} ")
        assert digest([encoder], cache) != first
        (encoder / name).write_text(name)
        assert digest([encoder], cache) == first
    assert digest([encoder, encoder], cache) != first
    assert {path.suffix for path in cache.iterdir()} == {".digest"}


def test_a_folder_that_can_not_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="choose another text_cache"):
            CachedTextEncoder(Counting(), folder, identity="x")

    def refuse(*paths):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(text_cache, "staged", refuse)
    with pytest.raises(UserError, match="can't write into the folder"):
        CachedTextEncoder(Counting(), tmp_path, identity="x").encode(["a"])
