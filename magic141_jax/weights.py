"""A component on disk: `config.json` beside safetensors, one file or several with an index. Nothing is unpickled.

    folder/config.json                   {"format": 1, "model": "mmdit", ...fields of its config dataclass}
    folder/model.safetensors             or model-00001-of-0000n.safetensors + model.safetensors.index.json

Tensors are named by their dotted path (see `magic141_jax.pytree`). Storage may be float32, bfloat16 or int8; int8
keeps matrices as integers with one float32 scale per output channel (symmetric, weight only) in `<path>::scale`,
and is expanded to float32 on reading. Biases and norm scales stay float32: stacked over layers they look like
matrices, but rounding them costs accuracy and saves next to nothing.

Components stand in one folder with a model_index.json. Weights that differ from others in some components only hold
just these, and name the others' folder, a sibling, as "base" in the index.

Both kinds of JSON file say the format that they are in. What an older version wrote, files without a number included,
is brought to today's format when it is read (`MIGRATIONS`); what a newer one wrote is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from magic141_jax.errors import UserError
from magic141_jax.pytree import Params, flatten, unflatten

COMPONENTS = ("continuation", "image_encoder", "text_encoder", "transformer", "vae")

Storage = Literal["float32", "bfloat16", "int8"]
SCALE = "::scale"
VECTORS = ("bias", "scale")  # how the last part of the path ends, for parameters that int8 leaves alone
MAX_SHARD_BYTES = 4 << 30

FORMAT = 1  # of config.json and model_index.json; files without a number are of format 0


def _say_how_known_frames_enter(config: dict[str, Any]) -> dict[str, Any]:
    """Format 0 has no `known` of a transformer: known frames entered wherever there were channels for them."""
    if config.get("model") != "mmdit" or "known" in config or "in_channels" not in config:
        return config
    return {**config, "known": "none" if config["in_channels"] == config.get("out_channels") else "channels"}


# Format -> what brings a file of that format to the next one
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {0: _say_how_known_frames_enter}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; a missing or malformed file is the user's to mend."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {path}; is this a weights folder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a JSON object; is it the right file?")
    return value


def read_config(file: Path) -> dict[str, Any]:
    """A config.json or model_index.json in today's format, without its number; of published folders as it is.

    Raises:
      UserError: the file is missing or malformed, or a newer version wrote it.
    """
    found = read_json(file)
    if found.keys() & {"_class_name", "architectures"} and not found.keys() & {"format", "model"}:
        return found
    number = found.pop("format", 0)
    if not isinstance(number, int) or number not in (*MIGRATIONS, FORMAT):
        raise UserError(f"{file} has format {number!r}; this version reads up to {FORMAT}: take a newer magic141_jax")
    for older in range(number, FORMAT):
        found = MIGRATIONS[older](found)
    return found


def write_config(file: Path, config: Mapping[str, Any]) -> None:
    """Writes a config.json or model_index.json with the number of today's format."""
    file.write_text(json.dumps({"format": FORMAT, **config}, indent=2) + "\n")


def save(folder: Path, config: Mapping[str, Any], params: Params, *, storage: Storage = "float32") -> None:
    """Writes a component folder; what stood there is replaced only once everything is on disk."""
    with new_folder(folder) as temporary:
        write_config(temporary / "config.json", config)
        _write_shards(temporary, _encode(flatten(params), storage))


def derive(source: Path, target: Path, components: Mapping[str, tuple[Mapping[str, Any], Params] | None]) -> None:
    """Writes a weights folder like another one but for some components, {name: (its config.json, parameters)}.

    A component of None is left out. What stays the same is linked where the disk allows it, and takes no space; what a
    base lends comes from there, so that the new folder stands alone. A component's other files, a tokenizer say, come
    along.

    Raises:
      UserError: see `require_apart`.
    """
    source, target = Path(source), Path(target)
    require_apart(source, target)
    with new_folder(target) as temporary:
        origins = {path.name: path for path in sorted(source.iterdir()) if path.is_dir()}
        origins |= {name: part(source, name) for name in COMPONENTS if part(source, name).is_dir()}
        for name, origin in origins.items():
            new = components.get(name)
            if name in components and new is None:
                continue
            for file in (file for file in origin.rglob("*") if file.is_file()):
                weight = file.name == "config.json" or file.name.endswith((".safetensors", ".safetensors.index.json"))
                if new is None or not (weight and file.parent == origin):
                    _copy(file, temporary / name / file.relative_to(origin))
            if new is not None:
                (temporary / name).mkdir(exist_ok=True)
                write_config(temporary / name / "config.json", new[0])
                _write_shards(temporary / name, _encode(flatten(new[1]), "float32"))
        index = {key: value for key, value in read_config(source / "model_index.json").items() if key != "base"}
        write_config(temporary / "model_index.json", index)


def require_apart(source: Path, target: Path) -> None:
    """Raises `UserError` if a weights folder can't be derived there: in or around its source, or over other files."""
    own, new = Path(source).resolve(), Path(target).resolve()
    if own == new or own in new.parents or new in own.parents:
        raise UserError(f"{target} is the folder that is read, or lies in or around it; name another one to write")
    if new.exists() and not (new / "model_index.json").is_file():
        raise UserError(f"{target} is there and is no weights folder; name another one")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source.resolve())
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` to write into, which takes its place in the end, unless something failed."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            if path.is_dir() or path.stat().st_nlink == 1:  # a link's mode is that of another folder's file
                path.chmod(0o755 if path.is_dir() else 0o644)  # only the owner could read what was made here
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(folder: Path) -> tuple[dict[str, Any], Params]:
    """Reads a component folder: its config.json and its parameters (floating leaves as stored, int8 expanded).

    Raises:
      UserError: a file is missing, malformed or truncated.
    """
    folder = Path(folder)
    config = read_config(folder / "config.json")
    # Expanded by NumPy and handed over at once: operations of JAX on single tensors are compiled one by one.
    return config, jax.device_put(unflatten(_decode(read_tensors(folder))))


def read_tensors(folder: Path, stem: str = "model") -> dict[str, np.ndarray]:
    """All tensors of `<stem>.safetensors`, or of the shards that `<stem>.safetensors.index.json` lists."""
    tensors: dict[str, np.ndarray] = {}
    for file in tensor_files(folder, stem):
        try:
            with safe_open(file, framework="numpy") as reader:
                names = reader.keys()
                tensors.update({name: _read(reader, file, name) for name in names})
        except FileNotFoundError:
            raise UserError(f"no file {file}; the weights folder is incomplete") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"can't read {file}: {error}; the file is truncated or damaged, copy it again") from None
    return tensors


def _read(reader: Any, file: Path, name: str) -> np.ndarray:
    """A tensor of an opened file; float8, which NumPy has no name for and safetensors so fails on, by its header."""
    if reader.get_slice(name).get_dtype() != "F8_E4M3":
        return reader.get_tensor(name)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(length))[name]
        begin, end = entry["data_offsets"]
        stream.seek(8 + length + begin)
        values = np.frombuffer(stream.read(end - begin), jnp.float8_e4m3fn)
    return values.reshape(entry["shape"])


def tensor_files(folder: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a component, by its index where it has one.

    Raises:
      UserError: the index is malformed or names a file outside the folder.
    """
    index = Path(folder) / f"{stem}.safetensors.index.json"
    if index.exists():
        return [Path(folder) / name for name in sorted(set(read_weight_map(index).values()))]
    return [Path(folder) / f"{stem}.safetensors"]


def read_weight_map(index: Path) -> dict[str, str]:
    """{tensor: file} of a `*.safetensors.index.json`; files must be plain names, which can't leave the folder.

    Only the name is judged: in the Hub's cache the file itself is a link into another folder.

    Raises:
      UserError: the file is missing or malformed, or names a path.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index} has no weight_map from tensors to files; it is damaged, copy it again")
    for name in found.values():
        if not name.endswith(".safetensors") or set(name) & set("/\\:"):
            raise UserError(f"{index} names {name!r}; shards are *.safetensors files beside the index, nothing else")
    return found


def part(folder: Path, name: str) -> Path:
    """The folder of a component of weights: `folder`/`name`, or the base's where these weights have none of their own.

    Raises:
      UserError: the base that the index names is no sibling folder.
    """
    own, index = Path(folder) / name, Path(folder) / "model_index.json"
    if own.is_dir() or not index.is_file():
        return own
    base = read_json(index).get("base")
    if base is None:
        return own
    # Only a plain name beside the folder: downloaded weights must not lead anywhere else.
    if not isinstance(base, str) or not base or set(base) & set("/\\:") or base.startswith("."):
        raise UserError(f"{index} names the base {base!r}; it must be the name of a folder beside {folder}")
    found = Path(folder).resolve().parent / base
    if not found.is_dir():
        raise UserError(f"{folder} needs the weights folder {found} for its {name}; copy that one too")
    return found / name


def digest(path: Path) -> str:
    """The first 16 hex digits of the SHA-256 over a file, or over a folder's safetensors files in path order."""
    path, total = Path(path), hashlib.sha256()
    for file in [path] if path.is_file() else files(path, "*.safetensors"):
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def files(folder: Path, pattern: str) -> list[Path]:
    """The files below `folder` and in the components that its base lends, in the order of their relative paths."""
    found = {file.relative_to(folder): file for file in Path(folder).rglob(pattern)}
    for lent in (part(folder, name) for name in COMPONENTS):
        found |= {Path(lent.name) / file.relative_to(lent): file for file in lent.rglob(pattern)}
    return [found[name] for name in sorted(found)]


def _write_shards(folder: Path, tensors: Mapping[str, Any]) -> None:
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors")
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _encode(flat: Mapping[str, Any], storage: Storage) -> dict[str, Any]:
    encoded = {}
    for path, leaf in flat.items():
        leaf = np.asarray(leaf)
        if storage == "int8" and leaf.ndim >= 2 and not path.endswith(VECTORS):
            values = leaf.astype(np.float32)
            scale = np.maximum(np.abs(values).max(axis=-2, keepdims=True), 1e-12) / 127
            encoded[path] = jnp.asarray(np.round(values / scale).astype(np.int8))
            encoded[path + SCALE] = jnp.asarray(scale)
        elif storage == "bfloat16" and jnp.issubdtype(leaf.dtype, jnp.floating):
            encoded[path] = jnp.asarray(leaf, jnp.bfloat16)
        else:
            encoded[path] = jnp.asarray(leaf)
    return encoded


def _decode(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {
        path: tensor.astype(np.float32) * tensors[path + SCALE] if path + SCALE in tensors else tensor
        for path, tensor in tensors.items()
        if not path.endswith(SCALE)
    }
