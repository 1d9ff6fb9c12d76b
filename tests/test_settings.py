"""Strict configs: everything that does not fit is named by its dotted path."""

import dataclasses
from typing import Any, Literal

import ml_collections
import pytest

from magic141_jax.errors import UserError
from magic141_jax.settings import build, to_dict


@dataclasses.dataclass(frozen=True)
class Inner:
    """A nested config."""

    width: int = 8
    rate: float = 0.5

    def __post_init__(self):
        if self.width % 2:
            raise ValueError(f"width must be even, got {self.width}")


@dataclasses.dataclass(frozen=True)
class Outer:
    """A config with a field of every kind."""

    name: str
    inner: Inner = Inner()
    axes: tuple[int, int, int] = (1, 2, 3)
    more: tuple[float, ...] = ()
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    either: int | tuple[int, ...] = 1
    flag: bool = False
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    layers: tuple[Inner, ...] = ()


FULL = {
    "name": "x",
    "inner": {"width": 4, "rate": 1},
    "axes": [4, 5, 6],
    "more": [1, 2.5],
    "kind": "b",
    "limit": 3,
    "either": [1, 2],
    "flag": True,
    "extra": {"k": 1},
    "layers": [{"width": 2}, {}],
}


@pytest.mark.parametrize("wrap", [dict, ml_collections.ConfigDict])
def test_everything_that_fits_is_built(wrap):
    config = build(Outer, wrap(FULL))
    assert config.inner == Inner(4, 1.0) and isinstance(config.inner.rate, float)
    assert config.axes == (4, 5, 6) and config.more == (1.0, 2.5) and config.either == (1, 2)
    assert config.layers == (Inner(2), Inner())
    assert (config.kind, config.limit, config.flag, config.extra) == ("b", 3, True, {"k": 1})


def test_defaults_and_the_way_back():
    config = build(Outer, {"name": "x"})
    assert config == Outer("x")
    assert build(Outer, to_dict(build(Outer, FULL))) == build(Outer, FULL)
    assert hash(build(Inner, {"width": 4})) == hash(Inner(4)), "configs without dicts may be static arguments"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nam": "y"}, "config.nam. Did you mean 'name'"),
        ({"inner": {"widht": 4}}, "config.inner.widht. Did you mean 'width'"),
        ({"inner": {"width": "4"}}, "config.inner.width must be int, got '4'"),
        ({"inner": {"width": True}}, "config.inner.width must be int"),
        ({"inner": {"width": 4.0}}, "config.inner.width must be int"),
        ({"inner": {"width": 3}}, "config.inner: width must be even"),
        ({"inner": {"rate": False}}, "config.inner.rate must be float"),
        ({"inner": 5}, "config.inner must be Inner"),
        ({"axes": [1, 2]}, "config.axes must be"),
        ({"axes": [1, 2, "3"]}, "config.axes[2] must be int"),
        ({"kind": "c"}, "config.kind is 'c'"),
        ({"limit": "none"}, "config.limit must be int"),
        ({"flag": 1}, "config.flag must be bool"),
        ({"extra": 3}, "config.extra must be"),
        ({"layers": [{}, {"width": 1}]}, "config.layers[1]: width must be even"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    with pytest.raises(UserError) as error:
        build(Outer, FULL | change)
    assert words in str(error.value)


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match=r"missing key model\.name"):
        build(Outer, {}, where="model")
