"""Published tensors <-> our parameter tree, by a table of rules, strictly and in both directions.

A table is a tuple of `Rule`s, tried in order; the first one that fits a name owns it. Names are templates:

    {i}     a layer number (digits; any letter or word may stand for i)
    {*p}    any dotted part of a name, dots included
    A placeholder that occurs in `theirs` but not in `ours` is stacked: ours gains a leading axis with one entry for
    each of its values 0, 1, ...

A rule may join several of their tensors into one of ours, or split one into several; its `Transform` maps a tuple of
arrays to a tuple of arrays and has an exact inverse. A name without a rule, a rule with some of its tensors missing,
a parameter that no tensor fills and one that two fill are all errors, and all are reported at once.

Both directions first make a plan from names and shapes alone, a list of `Job`s, each of which turns a few arrays into
a few others. So every misfit is known before any data is read, and only one job's arrays need to be in memory: the
tensors may be lazy, and `OnDevices` lays each parameter on a mesh layer by layer.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from magic141_jax.errors import UserError
from magic141_jax.pytree import Params, differences, flatten, unflatten

Arrays = tuple[np.ndarray, ...]
Binding = dict[str, str]
SHOWN = 40  # misfits that a message lists


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
      copy: their tensor repeats the one of another rule, and counts only where that one is absent.
    """

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    transform: Transform = IDENTITY
    copy: bool = False

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


def linear(theirs: str, ours: str, first: Transform = IDENTITY) -> Table:
    """The rules of a linear layer's weight and bias; `first` rearranges the rows of both before the transpose."""
    return (
        Rule(f"{theirs}.weight", f"{ours}.kernel", LINEAR if first is IDENTITY else chain(first, LINEAR)),
        Rule(f"{theirs}.bias", f"{ours}.bias", first),
    )


def norm(theirs: str, ours: str) -> Table:
    """The rules of a layer or group norm's weight and bias."""
    return (Rule(f"{theirs}.weight", f"{ours}.scale"), Rule(f"{theirs}.bias", f"{ours}.bias"))


@dataclasses.dataclass(frozen=True)
class Job:
    """One application of a rule: which tensors make which parameters, and at which layer of a stack (else None)."""

    rule: Rule
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    layer: int | None


class Place(Protocol):
    """Where parameters are put as they are made."""

    def whole(self, path: str, array: np.ndarray) -> Any:
        """A parameter that comes in one piece."""
        ...

    def empty(self, path: str, leaf: jax.ShapeDtypeStruct) -> Any:
        """Room for a stacked parameter."""
        ...

    def write(self, path: str, stack: Any, array: np.ndarray, *, layer: int) -> Any:
        """The stack with one of its layers filled, in rising order; the old one is gone."""
        ...


class InMemory:
    """Parameters as NumPy arrays, dtypes as given."""

    def whole(self, path: str, array: np.ndarray) -> np.ndarray:
        """The array itself."""
        return array

    def empty(self, path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        """An uninitialised array."""
        return np.empty(leaf.shape, leaf.dtype)

    def write(self, path: str, stack: np.ndarray, array: np.ndarray, *, layer: int) -> np.ndarray:
        """Copies the layer into its place."""
        stack[layer] = array
        return stack


@dataclasses.dataclass(frozen=True)
class OnDevices:
    """Parameters as JAX arrays, each laid out by its sharding; a host never holds more than a layer of a large one.

    Attributes:
      shardings: by dotted path.
      dtype: of floating-point parameters; None keeps theirs.
      small: stacks of fewer bytes are gathered on the host, which compiles nothing.
    """

    shardings: Mapping[str, Sharding]
    dtype: Any = None
    small: int = 2**25

    def whole(self, path: str, array: np.ndarray) -> jax.Array:
        """Each device gets its slice."""
        return _spread(array.astype(self._cast(array.dtype), copy=False), self.shardings[path]).block_until_ready()

    def empty(self, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array | np.ndarray:
        """Zeros, made on the devices."""
        if leaf.size * leaf.dtype.itemsize < self.small:
            return np.empty(leaf.shape, leaf.dtype)
        return jnp.zeros(leaf.shape, self._cast(leaf.dtype), device=self.shardings[path])

    def write(
        self, path: str, stack: jax.Array | np.ndarray, array: np.ndarray, *, layer: int
    ) -> jax.Array | np.ndarray:
        """Updates the stack in place; waits, so that layers don't queue up in host memory."""
        if isinstance(stack, np.ndarray):
            stack[layer] = array
            return self.whole(path, stack) if layer == len(stack) - 1 else stack
        sharding = stack.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        return _updater(stack.sharding)(stack, _spread(array, sharding), layer).block_until_ready()

    def _cast(self, dtype: Any) -> Any:
        return self.dtype if self.dtype is not None and jnp.issubdtype(dtype, jnp.floating) else dtype


def _spread(array: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@functools.cache
def _updater(sharding: Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    def update(stack: jax.Array, layer: jax.Array, index: int) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), index, 0)

    return jax.jit(update, donate_argnums=0, out_shardings=sharding)


def to_ours(tensors: Mapping[str, Any], table: Table, abstract_params: Params, *, place: Place | None = None) -> Params:
    """Their tensors as our parameter tree: NumPy arrays with the dtypes given, or what `place` makes of them.

    Args:
      tensors: every tensor of the component by its published name; read (`np.asarray`) one job at a time.
      abstract_params: the tree wanted (`Network.abstract_params`); paths and shapes must match it.
      place: where the parameters go.

    Raises:
      UserError: listing every tensor without a rule, every missing partner and every unfilled or ill-shaped parameter.
    """
    place = place or InMemory()
    jobs, leaves = plan_in(tensors, table, abstract_params)
    flat: dict[str, Any] = {}
    for job in jobs:
        arrays = job.rule.transform.to_ours(tuple(np.asarray(tensors[name]) for name in job.theirs))
        for path, array in zip(job.ours, arrays, strict=True):
            if job.layer is None:
                flat[path] = place.whole(path, array)
            else:
                stack = flat.pop(path) if path in flat else place.empty(path, leaves[path])
                flat[path] = place.write(path, stack, array, layer=job.layer)
    return unflatten(flat)


def from_ours(params: Params, table: Table) -> dict[str, np.ndarray]:
    """Our parameter tree as their tensors: the exact inverse of `to_ours` (dropped buffers apart).

    Raises:
      UserError: listing every parameter without a rule and every missing partner.
    """
    leaves = flatten(params)
    jobs, _ = plan_out(leaves, table)
    return {name: np.ascontiguousarray(array) for job in jobs for name, array in run_out(job, leaves)}


def run_out(job: Job, leaves: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Their (name, array) pairs that a job of `plan_out` makes; of stacked leaves it reads one layer."""
    parts = (leaves[path] if job.layer is None else leaves[path][job.layer] for path in job.ours)
    return zip(job.theirs, job.rule.transform.from_ours(tuple(map(np.asarray, parts))), strict=True)


def plan_in(
    tensors: Mapping[str, Any], table: Table, abstract_params: Params
) -> tuple[list[Job], dict[str, jax.ShapeDtypeStruct]]:
    """The jobs of `to_ours`, stacks in order, and what each parameter will be; from names, shapes and dtypes alone.

    Raises:
      UserError: as `to_ours`.
    """
    groups, errors = _group(tensors, [rule.sources for rule in table], "no rule for tensor")
    jobs: list[Job] = []
    made: dict[str, dict[int | None, jax.ShapeDtypeStruct]] = {}
    shape_of = _Shapes()
    for (index, key), names in sorted(groups, key=lambda group: table[group[0][0]].copy):
        rule, binding = table[index], dict(key)
        missing = [_fill(source, binding) for source in rule.sources if source not in names]
        errors += [f"tensor {name} is missing" for name in missing]
        repeated = rule.copy and all(_fill(target, binding) in made for target in rule.targets)
        if missing or repeated or not rule.targets:
            continue
        layer = int(binding[rule.stacked]) if rule.stacked else None
        theirs, ours = (tuple(_fill(t, binding) for t in side) for side in (rule.sources, rule.targets))
        job = Job(rule, theirs, ours, layer)
        try:
            outputs = shape_of(rule.transform.to_ours, [tensors[name] for name in theirs])
        except ValueError as error:
            errors.append(f"{', '.join(theirs)}: {rule.transform.name} fails, {error}")
            continue
        jobs.append(job)
        for path, output in zip(ours, outputs, strict=True):
            if layer in made.setdefault(path, {}):
                errors.append(f"{path} is filled twice, the second time by {', '.join(theirs)}")
            made[path][layer] = output
    leaves = {path: _leaf(path, layers, errors) for path, layers in made.items()}
    fitting = unflatten({path: leaf for path, leaf in leaves.items() if leaf is not None})
    _report(errors + differences(fitting, abstract_params), "these tensors don't fit the table")
    return jobs, leaves


def plan_out(leaves: Mapping[str, Any], table: Table) -> tuple[list[Job], dict[str, jax.ShapeDtypeStruct]]:
    """The jobs of `from_ours` on flat parameters, and what each tensor will be.

    Raises:
      UserError: as `from_ours`.
    """
    groups, errors = _group(leaves, [rule.targets for rule in table], "no rule for parameter")
    jobs: list[Job] = []
    made: dict[str, jax.ShapeDtypeStruct] = {}
    shape_of = _Shapes()
    for (index, key), names in groups:
        rule, binding = table[index], dict(key)
        missing = [_fill(target, binding) for target in rule.targets if target not in names]
        errors += [f"parameter {path} is missing" for path in missing]
        if missing:
            continue
        ours = tuple(_fill(target, binding) for target in rule.targets)
        for layer in range(leaves[ours[0]].shape[0]) if rule.stacked else [None]:
            own = binding if layer is None else binding | {rule.stacked: str(layer)}
            job = Job(rule, tuple(_fill(source, own) for source in rule.sources), ours, layer)
            parts = [leaves[path] for path in ours]
            if layer is not None:
                parts = [jax.ShapeDtypeStruct(part.shape[1:], part.dtype) for part in parts]
            jobs.append(job)
            made.update(zip(job.theirs, shape_of(rule.transform.from_ours, parts), strict=True))
    _report(errors, "these parameters don't fit the table")
    return jobs, made


class _Shapes:
    """What a transform makes of shapes: it is run on zeros that take no memory, once for each set of shapes."""

    def __init__(self) -> None:
        self.known: dict[Any, list[tuple[int, ...]]] = {}

    def __call__(self, function: Callable[[Arrays], Arrays], inputs: list[Any]) -> list[jax.ShapeDtypeStruct]:
        shapes = tuple(tuple(x.shape) for x in inputs)
        if (function, shapes) not in self.known:
            zeros = tuple(np.broadcast_to(np.zeros((), bool), shape) for shape in shapes)
            self.known[function, shapes] = [output.shape for output in function(zeros)]
        dtype = np.result_type(*(np.dtype(x.dtype) for x in inputs))
        return [jax.ShapeDtypeStruct(shape, dtype) for shape in self.known[function, shapes]]


def _leaf(
    path: str, layers: Mapping[int | None, jax.ShapeDtypeStruct], errors: list[str]
) -> jax.ShapeDtypeStruct | None:
    """A parameter from its layers, or None and an error."""
    if None in layers:
        return layers[None]
    absent = sorted(set(range(max(layers) + 1)) - set(layers))
    if absent:
        errors.append(f"{path} lacks layers {absent}")
    elif len({layer.shape for layer in layers.values()}) > 1:
        errors.append(f"{path} has layers of unequal shapes")
    else:
        dtype = np.result_type(*(layer.dtype for layer in layers.values()))
        return jax.ShapeDtypeStruct((len(layers), *layers[0].shape), dtype)
    return None


def _group(
    names: Iterable[str], sides: list[tuple[str, ...]], complaint: str
) -> tuple[list[tuple[tuple[int, tuple], dict[str, str]]], list[str]]:
    """Names by (rule number, binding), in that order: {template: name}; names that fit no template become errors."""
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
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], [(k, len(v), v) for k, v in item[0][1]]))
    return ordered, errors


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
        rest = f"; and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
        raise UserError(f"{what}: {'; '.join(errors[:SHOWN])}{rest}")
