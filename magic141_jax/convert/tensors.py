"""Safetensors files read and written tensor by tensor, with every header checked before any data is touched.

    8 bytes: length n of the header (little-endian) | n bytes of JSON | data
    header = {name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {...}}

A `LazyTensor` knows its shape and dtype and reads its values, or one slice of its leading axis, when asked. Values
are read into fresh memory rather than mapped: a mapping of a file that shrinks kills the process, and is slow on
network file systems. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from magic141_jax import weights
from magic141_jax.errors import UserError

# what the file formats call a dtype -> NumPy's
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
STEMS = ("diffusion_pytorch_model", "model")
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
HOW_TO_UNPICKLE = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "d = torch.load(sys.argv[1], map_location='cpu', weights_only=True, mmap=True); "
    "d = d.get('module') or d.get('model') or d.get('state_dict') or d; "
    'save_file({k: v.contiguous() for k, v in d.items()}, sys.argv[2])" {path} {safe}'
)
MAX_HEADER_BYTES = 100_000_000  # the format's own bound
MAX_SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still on disk.

    `read(None)` gives all of its values, `read(i)` those of index i of the leading axis.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int | None], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read(None) if dtype is None else self.read(None).astype(dtype)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.read(index)


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one safetensors file, or of a component folder (one file, or shards with their index).

    Raises:
      UserError: no safetensors (a pickle is refused, with the way to convert it), a shard that is missing, that
        lacks tensors of the index or holds others, or a file that is truncated or damaged.
    """
    path = Path(path)
    refuse_pickle(path)
    if path.is_file():
        return open_file(path)
    for stem in STEMS:
        index = path / f"{stem}.safetensors.index.json"
        if index.exists():
            return _open_shards(index)
        if (path / f"{stem}.safetensors").exists():
            return open_file(path / f"{stem}.safetensors")
    pickles = sorted(file for file in path.glob("*") if file.suffix in PICKLES)
    if pickles:
        refuse_pickle(pickles[0])
    names = " or ".join(f"{stem}.safetensors" for stem in STEMS)
    raise UserError(f"no {names} (nor their index.json) in {path}; is it the folder of one component?")


def refuse_pickle(path: Path) -> None:
    """Raises `UserError` for a pickled checkpoint, by its name, with the command that rewrites it as safetensors."""
    path = Path(path)
    if path.suffix in PICKLES:
        command = HOW_TO_UNPICKLE.replace("{path}", str(path)).replace("{safe}", str(path.with_suffix(".safetensors")))
        raise UserError(f"{path} is a pickle, which is not read here. Rewrite it where torch is installed: {command}")


def open_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file; only its header is read.

    Raises:
      UserError: the file is missing, truncated or damaged, or holds a dtype that NumPy lacks.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(path, f"its header should have {length} bytes, the file has {size}")
            header = json.loads(stream.read(length))
        entries = {name: _entry(entry) for name, entry in header.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise UserError(f"no file {path}; the weights folder is incomplete") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise error if isinstance(error, UserError) else _damaged(path, f"its header is malformed ({error})") from None
    end = 0
    for name, (dtype, shape, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
            raise _damaged(path, f"{name} {dtype} {shape} can't lie at bytes {begin} to {stop}")
        end = stop
    if end != size - 8 - length:
        raise _damaged(path, f"its header tells of {end} bytes of data, the file has {size - 8 - length}")
    return {
        name: LazyTensor(shape, dtype, _reader(path, shape=shape, dtype=dtype, offset=8 + length + begin))
        for name, (dtype, shape, begin, _) in entries.items()
    }


def write(
    folder: Path,
    stem: str,
    abstract: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes tensors into `folder` as they come, as one file or as shards with an index; never more than one in memory.

    Args:
      folder: exists, without files of this name.
      stem: such as "model".
      abstract: shape and dtype of every tensor by its name; its order is that of the shards.
      tensors: each of them once, in any order; values are cast to the dtype promised.

    Raises:
      OSError: the disk is full.
    """
    shards = _split(abstract, MAX_SHARD_BYTES)
    files = [f"{stem}.safetensors"]
    if len(shards) > 1:
        files = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    places = {}
    for file, names in zip(files, shards):
        places |= {name: (file, offset) for name, offset in _write_header(folder / file, names, abstract).items()}
    for name, values in tensors:
        file, offset = places.pop(name)
        want = abstract[name]
        if values.shape != want.shape:
            raise ValueError(f"{name} has shape {values.shape}, promised was {want.shape}")
        with (folder / file).open("r+b") as stream:
            stream.seek(offset)
            stream.write(np.ascontiguousarray(values, want.dtype).reshape(-1).view(np.uint8).data)
    if places:
        raise ValueError(f"{len(places)} tensors were promised but not given, among them {next(iter(places))}")
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(map(_nbytes, abstract.values()))}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _open_shards(index: Path) -> dict[str, LazyTensor]:
    weight_map = weights.read_weight_map(index)
    tensors: dict[str, LazyTensor] = {}
    errors = []
    for file in sorted(set(weight_map.values())):
        if not (index.parent / file).exists():
            errors.append(f"{file} is missing")
            continue
        held = open_file(index.parent / file)
        promised = {name for name, place in weight_map.items() if place == file}
        errors += [f"{file} lacks {name}" for name in sorted(promised - held.keys())]
        errors += [
            f"{file} holds {name}, which the index doesn't place there" for name in sorted(held.keys() - promised)
        ]
        tensors |= held
    if errors:
        rest = f" and {len(errors) - 4} more" if len(errors) > 4 else ""
        raise UserError(f"{index} and its shards disagree: {'; '.join(errors[:4])}{rest}; copy the folder again")
    return tensors


def _entry(entry: Mapping[str, Any]) -> tuple[np.dtype, tuple[int, ...], int, int]:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    begin, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(not isinstance(n, int) or n < 0 for n in (*shape, begin, stop)):
        raise ValueError(f"shape {shape} at bytes {begin} to {stop}")
    return DTYPES[entry["dtype"]], shape, begin, stop


def _reader(path: Path, *, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> Callable[[int | None], np.ndarray]:
    def read(index: int | None) -> np.ndarray:
        part = shape if index is None else shape[1:]
        size = math.prod(part) * dtype.itemsize
        start = offset if index is None else offset + range(shape[0])[index] * size
        try:
            values = np.fromfile(path, np.uint8, count=size, offset=start)
        except OSError as error:
            raise UserError(f"can't read {path}: {error.strerror}") from None
        if len(values) != size:
            raise _damaged(path, f"it ends {size - len(values)} bytes early")
        return values.view(dtype).reshape(part)

    return read


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is truncated or damaged: {why}; copy or download it again")


def _split(abstract: Mapping[str, Any], limit: int) -> list[list[str]]:
    """Names in order, cut where a shard would grow beyond `limit` bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in abstract.items():
        if shards[-1] and size + _nbytes(tensor) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(tensor)
    return shards


def _write_header(file: Path, names: list[str], abstract: Mapping[str, Any]) -> dict[str, int]:
    """Makes a file with its header; returns where in it each tensor belongs. Wide dtypes go first, which aligns all."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in sorted(names, key=lambda name: (-np.dtype(abstract[name].dtype).itemsize, name)):
        tensor = abstract[name]
        end = begin + _nbytes(tensor)
        code = CODES[np.dtype(tensor.dtype)]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + header[name]["data_offsets"][0] for name in names}


def _nbytes(tensor: Any) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
