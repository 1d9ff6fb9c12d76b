"""A pipeline that is walked without weights: its own code runs, over zeros, and every program that it would start is
traced, counted, and compiled if asked, but never run.

So what is told of a call is what the call does: the same stages, with the same shapes, as often. Only text encoders,
which have programs of their own, are known by their parameters alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from magic141_jax import flops, sharding
from magic141_jax.aot.program import memory_account
from magic141_jax.errors import UserError
from magic141_jax.models import kind_of
from magic141_jax.models.resident import Held, Lend, Lent, Room, Source
from magic141_jax.models.text import TextEncoder, TextStates
from magic141_jax.pipelines.components import DEFAULT, load_components
from magic141_jax.pipelines.engine import Engine, Stage
from magic141_jax.pipelines.text_to_video import BOTH, TextToVideoPipeline
from magic141_jax.pytree import Params, flatten


@dataclasses.dataclass
class Found:
    """One program: what it is called, its operations, what compiles it, and how often it is started.

    `compiled` gives the bytes that it needs on a device beside its parameters.
    """

    label: str
    operations: float
    compiled: Callable[[], int] = lambda: 0
    calls: int = 0


class Part(NamedTuple):
    """A component's parameters.

    Attributes:
      size: bytes on each device.
      count: their number.
      room: all of one are on the devices together.
      most: bytes that were there at once, where programs bring what they read; else None.
    """

    size: int
    count: int
    room: object
    most: int | None = None


@dataclasses.dataclass
class Book:
    """What a walk tells.

    Attributes:
      parts: components by the name of their network, which is numbered where it is there already.
      programs: by what tells them apart.
    """

    parts: dict[str, Part] = dataclasses.field(default_factory=dict)
    programs: dict[Any, Found] = dataclasses.field(default_factory=dict)

    @property
    def operations(self) -> float:
        """Of the whole walk."""
        return sum(found.calls * found.operations for found in self.programs.values())

    @property
    def held(self) -> dict[str, int]:
        """{component: bytes on each device} of the fullest room."""
        rooms: dict[object, dict[str, int]] = {}
        for name, part in self.parts.items():
            rooms.setdefault(part.room, {})[name] = part.size if part.most is None else part.most
        return max(rooms.values(), key=lambda held: sum(held.values()))

    def temporaries(self) -> int:
        """Compiles the programs: the most that one needs beside its parameters."""
        return max(found.compiled() for found in self.programs.values())

    def hold(self, name: str, params: Params, room: object) -> str:
        """Notes the parameters of a component, by shape; returns the name that it has here."""
        names = itertools.chain([name], (f"{name} {number}" for number in itertools.count(2)))
        free = next(each for each in names if each not in self.parts)
        self.parts[free] = Part(bytes_held(params), sum(x.size for x in flatten(params).values()), room)
        return free

    def bring(self, name: str, params: Mapping[str, Any]) -> None:
        """Notes that these parameters of a component are there at once."""
        part = self.parts[name]
        self.parts[name] = part._replace(most=max(part.most or 0, bytes_held(params)))


def bytes_held(params: Params) -> int:
    """Bytes on each device of parameters by shape, laid over a mesh or not."""
    leaves = flatten(params).values()
    shards = [x.shape if x.sharding is None else x.sharding.shard_shape(x.shape) for x in leaves]
    return sum(int(np.prod(shape)) * x.dtype.itemsize for shape, x in zip(shards, leaves, strict=True))


class Shapes(Room):
    """Lends parameters by their shapes and places; with `come_and_go` as a room does."""

    def __init__(self, book: Book, *, come_and_go: bool, on_host: bool | None = None) -> None:
        """`book` is told of each component; `on_host` as for a room."""
        super().__init__(on_host=on_host)
        self._book, self._come_and_go = book, come_and_go

    def lender(self) -> Lend:
        """Lends one component's."""
        room = object() if self._come_and_go else None

        def lend(source: Source) -> Held:
            params, flat = source.shapes, flatten(source.shapes)
            name = self._book.hold(kind_of(source.network.config), params, room)

            def bring(wanted: Collection[str]) -> Mapping[str, Any]:
                there = {path: flat[path] for path in self.there(flat, wanted)}
                self._book.bring(name, there)
                return there

            return Lent(params, bring) if self._come_and_go else params

        return lend


class DryStage(Stage):
    """A stage that notes its program in a book in place of running it, and gives zeros."""

    def __init__(self, book: Book, function: Callable[..., Any], params: Held, seconds: Any, **options: Any) -> None:
        """As `Stage`, with the book."""
        super().__init__(function, params, seconds, **options)
        self._book, self._made = book, {}

    def __call__(self, label: str, *arrays: Any, **static: Any) -> Any:
        """Zeros of the shapes of what the stage makes."""
        leaves, structure = jax.tree.flatten(arrays)
        key = (id(self), structure, *((np.shape(x), _dtype(x)) for x in leaves), *sorted(static.items()))
        if key not in self._made:
            arrays = jax.tree.unflatten(structure, map(self._struct, leaves))
            program, params, read = self._program(arrays, static)
            if isinstance(self._params, Lent):
                self._params.bring(read)
            traced, params = program.trace(params, *arrays), _structs(params)

            def compiled() -> int:
                account = memory_account(traced.lower().compile().memory_analysis())
                return max(account["total"] - bytes_held(params), 0)

            self._made[key] = traced.out_info
            self._book.programs[key] = Found(label, flops.count(traced.jaxpr), compiled)
        self._book.programs[key].calls += 1
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._made[key])

    def _struct(self, leaf: Any) -> jax.ShapeDtypeStruct:
        shape = np.shape(leaf)
        place = None
        if self._mesh is not None:
            place = sharding.batch_sharding(self._mesh, shape[0]) if shape else sharding.replicated(self._mesh)
        return jax.ShapeDtypeStruct(shape, _dtype(leaf), sharding=place)


class DryText:
    """A text encoder that gives zeros; its operations are two for each parameter and row."""

    def __init__(self, encoder: TextEncoder, parameters: int, book: Book) -> None:
        """`parameters` are their number."""
        self.length, self.width, self.pooled_width = encoder.length, encoder.width, encoder.pooled_width
        self.image_tokens = encoder.image_tokens
        self._parameters, self._book = parameters, book

    def encode(self, prompts: Sequence[str], images: Sequence[np.ndarray] | None = None) -> TextStates:
        """Zeros; see `TextEncoder.encode`."""
        rows, count = self.image_tokens + self.length, len(prompts)
        found = Found("text", 2.0 * self._parameters * rows * count)
        self._book.programs.setdefault((id(self), count), found).calls += 1
        shapes = (count, rows, self.width), (count, rows), (count, self.pooled_width)
        return TextStates(*(np.zeros(s, d) for s, d in zip(shapes, (np.float32, bool, np.float32), strict=True)))


def pipeline(
    book: Book, weights: str | Path = DEFAULT, *, image_weights: str | Path | None = None, **options: Any
) -> TextToVideoPipeline:
    """As `TextToVideoPipeline.from_pretrained`, without reading a parameter but adapters'; nothing is downloaded.

    Raises:
      UserError: as that; or weights that are not on this machine.
    """
    engines = [_engine(book, weights, options)]
    if image_weights is not None:
        engines.append(_engine(book, image_weights, {k: v for k, v in options.items() if k in BOTH}))
    return TextToVideoPipeline(*engines)


def _engine(book: Book, weights: str | Path, options: Mapping[str, Any]) -> Engine:
    if str(weights) != DEFAULT and not Path(weights).expanduser().is_dir():
        raise UserError(
            f"no folder {weights}: of weights on the Hub, python -m magic141_jax.convert check {weights} tells the "
            "sizes before anything is downloaded"
        )
    room = Shapes(book, come_and_go=bool(options.get("offload")))
    before = set(book.parts)
    # States on disk are none of a dry run's business: it must not even make their folder.
    components = load_components(weights, **{**options, "offload": room, "text_cache": None})
    models = (components.transformer, components.vae, components.image_encoder)
    others = {kind_of(model.network.config) for model in models if model is not None}
    text = [part.count for name, part in book.parts.items() if name not in before and name.split()[0] not in others]
    encoder = DryText(components.text_encoder, sum(text), book)
    components = dataclasses.replace(components, text_encoder=encoder)
    return Engine(components, stage=functools.partial(DryStage, book))


def _structs(params: Params) -> Params:
    """Parameters by shape, those of adapters too, which are arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), params)


def _dtype(leaf: Any) -> np.dtype:
    return jax.dtypes.canonicalize_dtype(np.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype)
