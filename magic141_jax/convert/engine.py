"""Published tensors <-> our parameter tree, by a table of rules, strictly and in both directions.

A table is a tuple of `Rule`s, tried in order; the first one that fits a name owns it. Names are templates:

    {i}     a layer number (digits; any letter or word may stand for i)
    {*p}    any dotted part of a name, dots included
    A placeholder that occurs in `theirs` but not in `ours` is stacked: ours gains a leading axis with one entry for
    each of its values 0, 1, ...

A rule may join several of their tensors into one of ours, or split one into several; its `Transform` maps a tuple of
arrays to a tuple of arrays and has an exact inverse. A name without a rule, a rule with some of its tensors missing,
and a parameter that no tensor fills are all errors, and all are reported at once.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from magic141_jax.errors import UserError
from magic141_jax.pytree import Params, differences, flatten, unflatten

Arrays = tuple[np.ndarray, ...]
Binding = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A named pair of inverse functions on tuples of arrays, without the stacked layer axis."""

    name: str
    to_ours: Callable[[Arrays], Arrays]
    from_ours: Callable[[Arrays], Arrays]


def each(name: str, to_ours: Callable[..., np.ndarray], from_ours: Callable[..., np.ndarray]) -> Transform:
    """A transform that treats every array of a rule alike."""
    return Transform(name, lambda a: tuple(map(to_ours, a)), lambda a: tuple(map(from_ours, a)))


def chain(*transforms: Transform) -> Transform:
    """Applies transforms in order on the way in, and their inverses in reverse order on the way out."""

    def run(arrays: Arrays, functions: Iterable[Callable[[Arrays], Arrays]]) -> Arrays:
        return functools.reduce(lambda value, function: function(value), functions, arrays)

    return Transform(
        " > ".join(t.name for t in transforms),
        lambda a: run(a, [t.to_ours for t in transforms]),
        lambda a: run(a, [t.from_ours for t in reversed(transforms)]),
    )


IDENTITY = each("identity", lambda a: a, lambda a: a)
LINEAR = each("linear (out, in) to (in, out)", np.transpose, np.transpose)
# OIHW or OIDHW to HWIO or DHWIO
CONV = each(
    "convolution (out, in, *kernel) to (*kernel, in, out)",
    lambda a: np.transpose(a, (*range(2, a.ndim), 1, 0)),
    lambda a: np.transpose(a, (a.ndim - 1, a.ndim - 2, *range(a.ndim - 2))),
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which of their tensors make which of our parameters.

    Attributes:
      theirs: one name template, or several that are joined.
      ours: one dotted-path template, or several; `()` drops their tensor (buffers that are not weights).
      transform: maps the tuple of theirs to the tuple of ours.
    """

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    transform: Transform = IDENTITY

    @property
    def sources(self) -> tuple[str, ...]:
        """`theirs` as a tuple."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    @property
    def targets(self) -> tuple[str, ...]:
        """`ours` as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def stacked(self) -> str | None:
        """The placeholder that becomes a leading axis, if any."""
        extra = _placeholders(self.sources) - _placeholders(self.targets)
        return next(iter(extra), None) if self.targets else None


Table = tuple[Rule, ...]


def to_ours(tensors: Mapping[str, Any], table: Table, abstract_params: Params) -> Params:
    """Their tensors as our parameter tree of numpy arrays, dtypes as given.

    Args:
      tensors: every tensor of the component by its published name.
      abstract_params: the tree wanted (`Network.abstract_params`); paths and shapes must match it.

    Raises:
      UserError: listing every tensor without a rule, every missing partner and every unfilled or ill-shaped parameter.
    """
    groups, errors = _group(tensors, [rule.sources for rule in table], "no rule for tensor")
    flat: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for (index, key), names in groups.items():
        rule, binding = table[index], dict(key)
        missing = [_fill(s, binding) for s in rule.sources if s not in names]
        errors += [f"tensor {name} is missing" for name in missing]
        if missing or not rule.targets:
            continue
        outputs = rule.transform.to_ours(tuple(np.asarray(tensors[names[s]]) for s in rule.sources))
        for target, output in zip(rule.targets, outputs, strict=True):
            path = _fill(target, binding)
            if rule.stacked:
                stacks.setdefault(path, {})[int(binding[rule.stacked])] = output
            else:
                flat[path] = output
    for path, layers in stacks.items():
        absent = sorted(set(range(max(layers) + 1)) - set(layers))
        if absent:
            errors.append(f"{path} lacks layers {absent}")
        elif len({layer.shape for layer in layers.values()}) > 1:
            errors.append(f"{path} has layers of unequal shapes")
        else:
            flat[path] = np.stack([layers[i] for i in range(len(layers))])
    params = unflatten(flat)
    _report(errors + differences(params, abstract_params), "these tensors don't fit the table")
    return params


def from_ours(params: Params, table: Table) -> dict[str, np.ndarray]:
    """Our parameter tree as their tensors: the exact inverse of `to_ours` (dropped buffers apart).

    Raises:
      UserError: listing every parameter without a rule and every missing partner.
    """
    leaves = flatten(params)
    groups, errors = _group(leaves, [rule.targets for rule in table], "no rule for parameter")
    tensors: dict[str, np.ndarray] = {}
    for (index, key), names in groups.items():
        rule, binding = table[index], dict(key)
        missing = [_fill(t, binding) for t in rule.targets if t not in names]
        errors += [f"parameter {path} is missing" for path in missing]
        if missing:
            continue
        arrays = tuple(np.asarray(leaves[names[t]]) for t in rule.targets)
        layers = range(len(arrays[0])) if rule.stacked else [None]
        for i in layers:
            own = binding if i is None else binding | {rule.stacked: str(i)}
            outputs = rule.transform.from_ours(arrays if i is None else tuple(a[i] for a in arrays))
            names_out = [_fill(source, own) for source in rule.sources]
            tensors.update(zip(names_out, map(np.ascontiguousarray, outputs), strict=True))
    _report(errors, "these parameters don't fit the table")
    return tensors


def _group(
    names: Iterable[str], sides: list[tuple[str, ...]], complaint: str
) -> tuple[dict[tuple[int, tuple], dict[str, str]], list[str]]:
    """Sorts names by (rule number, binding): {template: name}; names that fit no template become errors."""
    patterns = [(i, template, _compile(template)) for i, side in enumerate(sides) for template in side]
    groups: dict[tuple[int, tuple], dict[str, str]] = {}
    errors = []
    for name in names:
        for index, template, pattern in patterns:
            if match := pattern.fullmatch(name):
                key = (index, tuple(sorted(match.groupdict().items())))
                groups.setdefault(key, {})[template] = name
                break
        else:
            errors.append(f"{complaint} {name}")
    return groups, errors


_PLACEHOLDER = re.compile(r"\{(\*?)(\w+)\}")


@functools.cache
def _compile(template: str) -> re.Pattern[str]:
    pattern, end, seen = "", 0, set()
    for match in _PLACEHOLDER.finditer(template):
        wild, name = match.groups()
        pattern += re.escape(template[end : match.start()])
        pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{'.+?' if wild else '[0-9]+'})"
        seen.add(name)
        end = match.end()
    return re.compile(pattern + re.escape(template[end:]))


def _placeholders(templates: tuple[str, ...]) -> set[str]:
    return {name for template in templates for _, name in _PLACEHOLDER.findall(template)}


def _fill(template: str, binding: Binding) -> str:
    return _PLACEHOLDER.sub(lambda match: binding[match.group(2)], template)


def _report(errors: list[str], what: str) -> None:
    if errors:
        raise UserError(f"{what}: {'; '.join(errors)}")
