import json
from collections import Counter

import numpy as np
import pytest

from magic141_jax.data.loader import Stream, batches, first_frame, random_caption, stack
from magic141_jax.errors import UserError


class Numbers:
    """Item i is the number base + i, in an array of a given shape."""

    def __init__(self, length, base=0, shape=(2,)):
        self.length, self.base, self.shape = length, base, shape

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"value": np.full(self.shape, self.base + index), "name": str(self.base + index)}


def noisy(sample, rng):
    return {**sample, "draw": rng.random()}


def streams():
    return {
        "image": Stream((Numbers(10),), 4, noisy),
        "video": Stream((Numbers(30, 100), Numbers(15, 200, (3,))), 2, noisy),
    }


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def names(batches_):
    return [name for batch in batches_ for name in batch["image"]["name"]]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name in a:
            assert a[name]["name"] == b[name]["name"]
            np.testing.assert_array_equal(a[name]["value"], b[name]["value"])
            np.testing.assert_array_equal(a[name]["draw"], b[name]["draw"])


def test_the_seed_decides():
    first = take(batches(streams(), seed=1), 12)
    assert_same(first, take(batches(streams(), seed=1, threads=0), 12))
    other = take(batches(streams(), seed=2), 12)
    assert [b["image"]["name"] for b in first] != [b["image"]["name"] for b in other]
    assert first[0]["image"]["value"].shape == (4, 2)


def test_a_run_resumes_at_the_exact_sample():
    whole = take(batches(streams(), seed=3), 20)
    iterator = batches(streams(), seed=3)
    take(iterator, 7)
    state = json.loads(json.dumps(iterator.get_state()))
    fresh = batches(streams(), seed=3)
    fresh.set_state(state)
    assert_same(whole[7:], take(fresh, 13))
    fresh.set_state(state)
    assert_same(whole[7:9], take(fresh, 2))


def test_an_epoch_holds_everything_once_and_the_next_is_in_another_order():
    iterator = batches({"image": Stream((Numbers(12),), 4)}, seed=0)
    epochs = [names(take(iterator, 3)) for _ in range(3)]
    assert all(sorted(map(int, epoch)) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("count", [2, 4])
def test_the_rows_of_the_processes_make_up_the_batch_of_one(count):
    one = {"image": Stream((Numbers(16),), 8, noisy)}
    whole = take(batches(one, seed=5), 4)
    parts = [take(batches(one, seed=5, rows={"image": np.split(np.arange(8), count)[p]}), 4) for p in range(count)]
    joined = []
    for step in range(4):
        shares = [part[step]["image"] for part in parts]
        assert all(len(share["name"]) == 8 // count for share in shares)
        joined.append({"image": {k: np.concatenate([s[k] for s in shares]) for k in ("value", "draw")}})
        joined[-1]["image"]["name"] = [name for share in shares for name in share["name"]]
    assert_same(whole, joined)
    epoch = [set(names(part[:2])) for part in parts]
    assert sum(map(len, epoch)) == 16 and len(set.union(*epoch)) == 16


def test_the_position_is_one_for_all_rows():
    """So it is saved once, and any process goes on from it with other rows."""
    one = {"image": Stream((Numbers(16),), 8, noisy)}
    iterator, other = (batches(one, seed=5, rows={"image": rows}) for rows in ([1, 2], [5]))
    take(iterator, 3), take(other, 3)
    assert iterator.get_state() == other.get_state()
    whole = batches(one, seed=5)
    whole.set_state(iterator.get_state())
    assert_same(take(whole, 2), take(batches(one, seed=5), 5)[3:])


def test_a_batch_comes_from_one_bucket_in_proportion():
    videos = [batch["video"] for batch in take(batches(streams(), seed=0), 30)]
    shapes = Counter(video["value"].shape for video in videos)
    assert shapes == {(2, 2): 20, (2, 3): 10}


def test_streams_of_the_same_length_are_in_different_orders():
    pair = {"a": Stream((Numbers(16),), 16), "b": Stream((Numbers(16),), 16)}
    batch = next(batches(pair, seed=0))
    assert batch["a"]["name"] != batch["b"]["name"]


def test_mistakes():
    for streams_, message in (
        ({}, "no data"),
        ({"image": Stream((), 4)}, "image data set is empty"),
        ({"image": Stream((Numbers(0),), 4)}, "image data set is empty"),
        ({"image": Stream((Numbers(9),), 0)}, "image batch size is 0"),
    ):
        with pytest.raises(UserError, match=message):
            batches(streams_, seed=0)


def test_transforms():
    sample = {"caption": "a", "captions": ["a", "b", "c"], "frames": np.zeros((5, 2, 2, 3))}
    drawn = {random_caption(sample, np.random.default_rng(i))["caption"] for i in range(40)}
    assert drawn == {"a", "b", "c"}
    assert first_frame(sample, np.random.default_rng(0))["frames"].shape == (1, 2, 2, 3)
    assert "captions" not in random_caption(sample, np.random.default_rng(0))


def test_stack_lists_what_is_no_array():
    batch = stack([{"x": np.ones(2), "caption": "a"}, {"x": np.zeros(2), "caption": "b"}])
    assert batch["x"].shape == (2, 2) and batch["caption"] == ["a", "b"]
