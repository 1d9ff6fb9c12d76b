import pytest

from magic141_jax.data.buckets import Bucket, longest_fit, make_buckets, nearest_size, parse_size
from magic141_jax.errors import UserError


def test_sizes_are_parsed():
    assert parse_size("64") == (64, 64)
    assert parse_size("64x96") == (64, 96)
    for bad in ("", "64x", "-64", "64x64x64", "big"):
        with pytest.raises(UserError, match="HEIGHTxWIDTH"):
            parse_size(bad)


def test_every_size_with_every_length():
    buckets = make_buckets([(64, 64), (32, 64)], [17, 1])
    assert set(buckets) == {Bucket(64, 64, 1), Bucket(64, 64, 17), Bucket(32, 64, 1), Bucket(32, 64, 17)}
    assert str(buckets[1]) == "64x64x17"


@pytest.mark.parametrize(
    ("size", "length", "named"),
    [
        ((60, 64), 17, "64x64"),
        ((3, 70), 17, "8x72"),
        ((0, 64), 17, "8x64"),
        ((10**5, 64), 17, "8192x64"),
        ((64, 64), 16, "13 and 17"),
        ((64, 64), 0, "1 and 5"),
        ((64, 64), -3, "1 and 5"),
        ((64, 64), 10**6, "4097"),
    ],
)
def test_illegal_sizes_name_the_nearest_legal_ones(size, length, named):
    with pytest.raises(UserError, match=f"nearest legal.* {named}$"):
        make_buckets([size], [length])


def test_the_nearest_aspect_ratio_wins_then_the_nearest_area():
    buckets = make_buckets([(64, 64), (64, 128), (128, 64), (128, 128)], [1])
    assert nearest_size(buckets, 1080, 1920) == (64, 128)
    assert nearest_size(buckets, 1920, 1080) == (128, 64)
    assert nearest_size(buckets, 500, 520) == (128, 128)
    assert nearest_size(buckets, 50, 52) == (64, 64)


def test_the_longest_length_that_fits():
    buckets = make_buckets([(64, 64), (32, 64)], [5, 17, 33])
    assert longest_fit(buckets, (64, 64), 32) == Bucket(64, 64, 17)
    assert longest_fit(buckets, (32, 64), 33) == Bucket(32, 64, 33)
    assert longest_fit(buckets, (64, 64), 4) is None
