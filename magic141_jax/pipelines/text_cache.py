"""States of encoded prompts on disk, so that a text encoder need not be there for prompts that it has read before.

    DIR/<key>.safetensors    states (s, e), mask (s,) and pooled (p,) of one prompt
    DIR/<key>.digest         of a text encoder's files, so that they are not all read to name them

The key of a prompt is the SHA-256 of the prompt, its encoder's files and dtype, the number of rows, and, of an encoder
that reads a picture along with it, the picture. A prompt is encoded alone, so that its states are the same whatever
else is in the call. Files appear whole or not at all, so processes and users may share a folder. What is damaged is
encoded anew, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError
from safetensors.numpy import load, save

from magic141_jax import weights
from magic141_jax.errors import UserError
from magic141_jax.models.text import TextEncoder, TextStates, require_prompts
from magic141_jax.pipelines.media import staged

FORMAT = 1  # a part of every key: states are made anew where their meaning changes
READ = (".json", ".safetensors", ".txt")  # files that a text encoder is made from


class CachedTextEncoder:
    """A `TextEncoder` that looks into a folder before it asks another one."""

    def __init__(self, encoder: TextEncoder, folder: Path, *, identity: str) -> None:
        """Makes the folder if it isn't there; `identity` tells `encoder` from any other."""
        self.length, self.width, self.pooled_width = encoder.length, encoder.width, encoder.pooled_width
        self.image_tokens = encoder.image_tokens
        self._encoder, self._folder = encoder, make_folder(folder)
        self._identity = [FORMAT, identity, self.length, self.image_tokens]

    def encode(self, prompts: Sequence[str], images: Sequence[np.ndarray] | None = None) -> TextStates:
        """The states of each prompt; see `TextEncoder.encode`. Warnings about long prompts come with the first use."""
        require_prompts(prompts)
        pictures = [None] * len(prompts) if images is None else list(images)
        paths = [self._path(*pair) for pair in zip(prompts, pictures, strict=True)]
        known = [self._read(path) for path in paths]
        there = _in_all_processes([states is not None for states in known])
        for i in np.flatnonzero(~there):
            picture = None if pictures[i] is None else [pictures[i]]
            made = self._encoder.encode([prompts[i]], picture)  # pyright: ignore[reportCallIssue]
            known[i] = TextStates(*(np.asarray(leaf)[0] for leaf in made))
            write(paths[i], save(known[i]._asdict()))  # pyright: ignore[reportOptionalMemberAccess]
        return TextStates(*map(np.stack, zip(*known, strict=True)))

    def _path(self, prompt: str, picture: np.ndarray | None) -> Path:
        total = hashlib.sha256(json.dumps([*self._identity, prompt]).encode())
        if picture is not None:
            picture = np.asarray(picture)
            total.update(f"{picture.shape} {picture.dtype}".encode() + picture.tobytes())
        return self._folder / f"{total.hexdigest()}.safetensors"

    def _read(self, path: Path) -> TextStates | None:
        """The states in a file; None where there is none, or it is damaged."""
        rows = self.image_tokens + self.length
        wanted = {
            "states": ((rows, self.width), np.float32),
            "mask": ((rows,), np.bool_),
            "pooled": ((self.pooled_width,), np.float32),
        }
        try:
            found = load(path.read_bytes())
        except FileNotFoundError:
            return None
        except SafetensorError:
            found = {}
        if {name: (leaf.shape, leaf.dtype) for name, leaf in found.items()} != wanted:
            warnings.warn(f"{path} is damaged; its prompt is encoded anew", stacklevel=3)
            return None
        return TextStates(**found)


def digest(folders: Sequence[Path], cache: Path) -> str:
    """The SHA-256 over the files in some folders, as `cache` remembers it: for the same paths, sizes and times."""
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*")) if file.suffix in READ]
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    note = make_folder(cache) / f"{_sha256(stats)}.digest"
    if note.is_file() and len(remembered := note.read_text()) == 64:
        return remembered
    found = _sha256([(file.name, weights.digest(file)) for file in files])
    write(note, found.encode())
    return found


def make_folder(folder: Path) -> Path:
    """The folder, made where it is missing; raises `UserError` where it can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"can't make the folder {folder}: {error.strerror}; choose another text_cache") from None
    return folder


def write(path: Path, data: bytes) -> None:
    """Writes a file of the cache, whole or not at all; raises `UserError` where its folder can't be written."""
    try:
        with staged(path) as (temporary,):
            temporary.write_bytes(data)
    except PermissionError:
        raise UserError(f"can't write into the folder {path.parent}; choose another text_cache") from None


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _in_all_processes(found: Sequence[bool]) -> np.ndarray:
    """Which of some things all processes have: what one lacks they make together, or it would wait for ever."""
    there = np.array(found)
    return there if jax.process_count() == 1 else multihost_utils.process_allgather(there).all(axis=0)
