"""Low-rank adapters (LoRA, arXiv 2106.09685) in PEFT's naming, as diffusers writes them, <-> ours; and their merge.

    theirs  <module>.lora_A.weight (r, in), <module>.lora_B.weight (out, r), alpha      W + alpha / r  B A
    ours    <kernel>.a ([layers,] in, r), .b ([layers,] r, out), .scale ([layers,] r)    W + (a scale) b

Ours is a tree beside the parameters: where these have `x.kernel`, it may have `x.a`, `x.b` and `x.scale`, one scale per
rank. The tables of names serve both ways, for any layout. Each rule there moves the entries of matrices without
computing on them, so it is told apart by sending row numbers, then column numbers, through it: B's rows go where the
rows went, A's columns where the columns went (`_Layers`).

Several of their matrices in one of ours (q, k, v) keep a slot of ranks each: a holds theirs side by side, b is zero
outside of a slot's own columns. One of theirs in several of ours (a single block's output) puts the same ranks into
each. Both are found again on the way out, bit for bit, and where they aren't there, as in an adapter trained here, the
way out gives every module all ranks that touch it. Ranks that a module lacks (a smaller rank, no adapter at all) have
scale 0.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from magic141_jax.convert.engine import Rule, Table
from magic141_jax.convert.tensors import refuse_pickle
from magic141_jax.errors import UserError, nearest
from magic141_jax.pytree import Params, flatten, unflatten

KINDS = {".lora_A.weight": "a", ".lora_B.weight": "b", ".alpha": "alpha"}
PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.")  # all are read, the first is written
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's config in a safetensors header
UNSUPPORTED = ("use_dora", "use_rslora", "lora_bias")


class Adapter(NamedTuple):
    """The adapter of one of their modules, or of rules' matrices together: b (out, r) and a (r, in), scale (r,)."""

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray


def load(file: Path, table: Table, abstract_params: Params) -> Params:
    """Reads a safetensors file of theirs, alphas from its header included; see `to_ours`."""
    refuse_pickle(file)
    try:
        with safe_open(file, framework="flax") as reader:
            names, metadata = reader.keys(), reader.metadata() or {}
            tensors = {name: reader.get_tensor(name) for name in names}
        peft = json.loads(metadata.get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"can't read {file}: {error}") from None
    return to_ours(tensors, table, abstract_params, peft=peft)


def save(file: Path, lora: Params, table: Table, abstract_params: Params) -> None:
    """Writes a safetensors file that diffusers' `load_lora_weights` takes; see `from_ours`."""
    tensors, peft = from_ours(lora, table, abstract_params)
    save_file({k: jnp.asarray(v) for k, v in tensors.items()}, file, {"format": "pt", METADATA: json.dumps(peft)})


def to_ours(
    tensors: Mapping[str, Any], table: Table, abstract_params: Params, *, peft: Mapping[str, Any] | None = None
) -> Params:
    """Their tensors as our tree of numpy arrays, dtypes as given.

    Args:
      tensors: by their names, with or without one of `PREFIXES`; `<module>.alpha` may be among them.
      table: of the network's layout, as `hunyuan_dit.table(config)`.
      abstract_params: of the network (`Network.abstract_params`).
      peft: PEFT's config, where alphas are given by it: lora_alpha and alpha_pattern. Without any alpha it is the rank.

    Raises:
      UserError: listing every tensor that belongs to no linear layer, lacks its partner or has another shape.
    """
    adapters, errors = _read(tensors, peft or {})
    if not adapters and not errors:
        raise UserError("there is no lora_A in this file")
    rank = max((len(adapter.scale) for adapter in adapters.values()), default=0)
    flat: dict[str, np.ndarray] = {}
    for layers in _linear_layers(table, abstract_params):
        errors += layers.misfits(adapters)
        found = [[adapters.pop(name, None) for name in names] for names in layers.names]
        if errors or not any(adapter for layer in found for adapter in layer):
            continue
        some = next(adapter for layer in found for adapter in layer if adapter)
        joined = [layers.join(layer, rank, some) for layer in found]
        for path, parts in zip(layers.paths, zip(*joined, strict=True), strict=True):
            stack = np.stack if layers.stacked else lambda one: one[0]
            flat |= {f"{path}.{kind}": stack(arrays) for kind, arrays in zip(Adapter._fields, zip(*parts))}
    errors += [f"no linear layer is called {name}" for name in adapters]
    if errors:
        raise UserError(f"this LoRA doesn't fit the network: {'; '.join(errors)}")
    return unflatten(flat)


def from_ours(lora: Params, table: Table, abstract_params: Params) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Our tree as their tensors and PEFT's config with the alphas: the inverse of `to_ours`.

    Raises:
      UserError: listing every path that is no kernel of the network.
    """
    rest = _by_kernel(lora)
    adapters: dict[str, Adapter] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for layers in _linear_layers(table, abstract_params):
        parts = [rest.pop(path, None) for path in layers.paths]
        if not any(parts):
            continue
        for i, names in enumerate(layers.names):
            layer = [part and {k: np.asarray(v[i] if layers.stacked else v) for k, v in part.items()} for part in parts]
            found = zip(names, layers.split(layer), strict=True)
            adapters |= {name: adapter for name, adapter in found if len(adapter.scale)}
            shapes |= dict(zip(names, layers.shapes, strict=True))
    if rest:
        raise UserError(f"the network has no {', '.join(f'{path}.kernel' for path in rest)}")
    tensors = {}
    for name, adapter in adapters.items():
        ones = (1,) * (len(shapes[name]) - 2)  # convolutions: theirs are convolutions too
        tensors[f"{PREFIXES[0]}{name}.lora_A.weight"] = adapter.a.reshape(-1, *shapes[name][1:])
        tensors[f"{PREFIXES[0]}{name}.lora_B.weight"] = adapter.b.reshape(*adapter.b.shape, *ones)
    return tensors, _peft_config(adapters)


def merge(params: Params, lora: Params, scale: float | jax.Array = 1.0) -> Params:
    """`params` with `scale` times the adapter added to its kernels, in float32, then rounded to each kernel's dtype.

    `lora` may lack the `scale` leaves, which then count as 1. May be traced.

    Raises:
      UserError: a path of `lora` is no kernel of `params`.
    """
    flat = flatten(params)
    for path, part in _by_kernel(lora).items():
        name = f"{path}.kernel"
        if name not in flat:
            raise UserError(f"the network has no {name} for this LoRA.{nearest(name, flat)}")
        a, b = (jnp.asarray(part[kind]).astype(jnp.float32) for kind in "ab")
        if "scale" in part:
            a = a * jnp.asarray(part["scale"]).astype(jnp.float32)[..., None, :]
        kernel, added = flat[name], jnp.matmul(a, b, precision="highest")
        flat[name] = (kernel.astype(jnp.float32) + scale * added).astype(kernel.dtype)
    return unflatten(flat)


@dataclasses.dataclass(frozen=True)
class _Layers:
    """The linear layers of one rule of a table, and how entries move between their matrices and ours.

    Attributes:
      names: their modules, a tuple for each layer (one tuple where the rule isn't stacked).
      shapes: of their weights.
      paths: our kernels, without ".kernel".
      rows: for each of our kernels, for each of its outputs: the row of theirs, counted through all of `shapes`.
      columns: for each of our kernels, for each of its inputs: the column of theirs.
    """

    names: list[tuple[str, ...]]
    shapes: list[tuple[int, ...]]
    paths: tuple[str, ...]
    rows: list[np.ndarray]
    columns: list[np.ndarray]
    stacked: bool

    @functools.cached_property
    def ends(self) -> list[int]:
        """Where the rows of each of their matrices end."""
        return np.cumsum([shape[0] for shape in self.shapes]).tolist()

    @property
    def inputs(self) -> int:
        """The columns of theirs."""
        return int(np.prod(self.shapes[0][1:]))

    def misfits(self, adapters: Mapping[str, Adapter]) -> list[str]:
        """What is wrong with the shapes of the adapters that are for these layers."""
        named = [pair for names in self.names for pair in zip(names, self.shapes, strict=True) if pair[0] in adapters]
        return [
            f"{name} has A with {adapters[name].a.shape[1]} inputs and B with {len(adapters[name].b)} outputs, but the "
            f"layer's weight is {shape}"
            for name, shape in named
            if (adapters[name].a.shape[1], len(adapters[name].b)) != (int(np.prod(shape[1:])), shape[0])
        ]

    def join(self, layer: list[Adapter | None], rank: int, like: Adapter) -> list[Adapter]:
        """Their adapters of one layer -> ours, one for each of our kernels, every module in a slot of `rank`."""
        ranks = rank * len(layer)
        a, b = np.zeros((ranks, self.inputs), like.a.dtype), np.zeros((self.ends[-1], ranks), like.b.dtype)
        scale = np.zeros(ranks, np.float32)
        for i, adapter in enumerate(layer):
            if adapter:
                slot = slice(i * rank, i * rank + len(adapter.scale))
                a[slot], b[self._own(i), slot], scale[slot] = adapter
        return [Adapter(a[:, columns].T, b[rows].T, scale) for rows, columns in zip(self.rows, self.columns)]

    def split(self, layer: list[dict[str, np.ndarray] | None]) -> Iterator[Adapter]:
        """Ours of one layer, None where a kernel has none -> theirs, of rank 0 where there is nothing to add."""
        whole = self._overlay([self._placed(j, part) for j, part in enumerate(layer) if part])
        ranks, count = len(whole.scale), len(self.shapes)
        slots = np.repeat(np.arange(count), ranks // count) if ranks % count == 0 else np.full(ranks, -1)
        owners = np.repeat(np.arange(count), np.diff([0, *self.ends]))
        in_slots = not whole.b[owners[:, None] != slots].any()
        for i in range(count):
            kept = (whole.scale != 0) & ((slots == i) | (not in_slots))
            b, scale = whole.b[self._own(i)][:, kept], whole.scale[kept]
            if len(set(scale.tolist())) > 1:  # a module of theirs has one alpha
                b, scale = (b * scale).astype(b.dtype), np.ones_like(scale)
            yield Adapter(whole.a[kept], b, scale)

    def _own(self, i: int) -> slice:
        return slice(self.ends[i] - self.shapes[i][0], self.ends[i])

    def _placed(self, j: int, part: Mapping[str, np.ndarray]) -> tuple[Adapter, int]:
        """The adapter of our kernel j among all rows and columns of theirs."""
        a, b = part["a"], part["b"]
        placed_a = np.zeros((a.shape[1], self.inputs), a.dtype)
        placed_b = np.zeros((self.ends[-1], b.shape[0]), b.dtype)
        placed_a[:, self.columns[j]], placed_b[self.rows[j]] = a.T, b.T
        return Adapter(placed_a, placed_b, part.get("scale", np.ones(len(b), np.float32))), j

    def _overlay(self, placed: list[tuple[Adapter, int]]) -> Adapter:
        """Adapters of several of our kernels as one: on the same ranks where they agree, else on ranks of their own."""
        (whole, first), *others = placed
        rows, columns = self.rows[first], self.columns[first]
        for part, j in others:
            common_rows, common_columns = np.intersect1d(rows, self.rows[j]), np.intersect1d(columns, self.columns[j])
            agree = np.array_equal(whole.scale, part.scale) and (
                np.array_equal(whole.b[common_rows], part.b[common_rows])
                and np.array_equal(whole.a[:, common_columns], part.a[:, common_columns])
            )
            if agree:
                whole.a[:, self.columns[j]], whole.b[self.rows[j]] = part.a[:, self.columns[j]], part.b[self.rows[j]]
            else:
                axes = (0, 1, 0)
                whole = Adapter(*(np.concatenate(pair, axis) for *pair, axis in zip(whole, part, axes)))
            rows, columns = np.union1d(rows, self.rows[j]), np.union1d(columns, self.columns[j])
        return whole


def _linear_layers(table: Table, abstract_params: Params) -> Iterator[_Layers]:
    """The rules of a table whose matrices can have an adapter."""
    leaves = flatten(abstract_params)
    for rule in table:
        if all(target.endswith(".kernel") and target in leaves for target in rule.targets) and rule.targets:
            yield _layers(rule, [leaves[target].shape for target in rule.targets])


def _layers(rule: Rule, shapes: list[tuple[int, ...]]) -> _Layers:
    kernels = tuple(np.zeros(shape[-2:], np.int32) for shape in shapes)
    theirs = [weight.shape for weight in rule.transform.from_ours(kernels)]
    starts = np.cumsum([0, *(shape[0] for shape in theirs)])[:-1]
    rows = [start + np.arange(shape[0], dtype=np.int32)[:, None] for start, shape in zip(starts, theirs)]
    columns = [np.arange(np.prod(shape[1:]), dtype=np.int32)[None] for shape in theirs]

    def moved(labels: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        spread = [np.broadcast_to(x, (s[0], np.prod(s[1:]))).reshape(s) for x, s in zip(labels, theirs)]  # pyright: ignore[reportCallIssue]
        return rule.transform.to_ours(tuple(spread))

    modules = [source.removesuffix(".weight") for source in rule.sources]
    names = [tuple(modules)]
    if rule.stacked:
        names = [tuple(m.replace(f"{{{rule.stacked}}}", str(i)) for m in modules) for i in range(shapes[0][0])]
    return _Layers(
        names=names,
        shapes=theirs,
        paths=tuple(target.removesuffix(".kernel") for target in rule.targets),
        rows=[_common(labels, 0) for labels in moved(rows)],
        columns=[_common(labels, 1) for labels in moved(columns)],
        stacked=rule.stacked is not None,
    )


def _common(labels: np.ndarray, axis: int) -> np.ndarray:
    """What all rows (axis 0) or all columns (axis 1) of a matrix of labels have in common."""
    first = labels.take(0, axis)
    if (labels != np.expand_dims(first, axis)).any():
        raise ValueError("a rule mixes rows with columns; the factors of an adapter can't follow it")
    return first


def _read(tensors: Mapping[str, Any], peft: Mapping[str, Any]) -> tuple[dict[str, Adapter], list[str]]:
    """Their tensors by module, matrices flattened and alphas read; and what is wrong with them."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    peft = {_bare(key): value for key, value in peft.items()}
    errors = [f"{key} is not supported" for key in UNSUPPORTED if peft.get(key)]
    for name, tensor in tensors.items():
        kind = next((kind for kind in KINDS if name.endswith(kind)), None)
        if kind is None:
            errors.append(f"{name} is no lora_A.weight, lora_B.weight or alpha")
        else:
            parts.setdefault(_bare(name.removesuffix(kind)), {})[KINDS[kind]] = np.asarray(tensor)
    adapters = {}
    for module, part in parts.items():
        if "a" not in part or "b" not in part:
            errors.append(f"{module} lacks lora_{'B' if 'a' in part else 'A'}.weight")
            continue
        rank = len(part["a"])
        if not rank or part["b"].shape[1:2] != (rank,):
            errors.append(f"{module} has A {part['a'].shape} and B {part['b'].shape}, which share no rank")
            continue
        alpha = float(part["alpha"]) if "alpha" in part else _alpha(module, rank, peft)
        scale = np.full(rank, alpha / rank, np.float32)
        adapters[module] = Adapter(part["a"].reshape(rank, -1), part["b"].reshape(-1, rank), scale)
    return adapters, errors


def _alpha(module: str, rank: int, peft: Mapping[str, Any]) -> float:
    """PEFT's rule: the first of alpha_pattern whose expression fits the end of the module's name, else lora_alpha."""
    for pattern, alpha in peft.get("alpha_pattern", {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return alpha
    return peft.get("lora_alpha", rank)


def _bare(name: str) -> str:
    return functools.reduce(str.removeprefix, PREFIXES, name)


def _peft_config(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """PEFT's config of these adapters, as diffusers stores it."""
    ranks, alphas = {}, {}
    for name, adapter in adapters.items():
        ranks[name] = len(adapter.scale)
        exact = float(adapter.scale[0]) * ranks[name]
        whole = round(exact)
        alphas[name] = whole if np.float32(whole / ranks[name]) == adapter.scale[0] else exact
    if not adapters:
        return {}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
    }
    return {PREFIXES[0] + key: value for key, value in config.items()}


def _by_kernel(lora: Params) -> dict[str, dict[str, Any]]:
    """{path of a kernel, without ".kernel": {"a": ..., "b": ..., "scale": ...}}."""
    parts: dict[str, dict[str, Any]] = {}
    for name, leaf in flatten(lora).items():
        path, kind = name.rsplit(".", 1)
        parts.setdefault(path, {})[kind] = leaf
    wrong = [path for path, part in parts.items() if not {"a", "b"} <= set(part) <= set(Adapter._fields)]
    if wrong:
        raise UserError(f"a LoRA has a, b and scale at every kernel; not so at {', '.join(wrong)}")
    return parts
