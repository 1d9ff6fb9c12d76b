"""Weights folders from the Hugging Face Hub: one commit, only the files that are read, their sizes told beforehand.

Of a repository, JSON files, tokenizers and safetensors of the names that `tensors.STEMS` lists are fetched. Pickles
never are, nor other precisions (*.fp16.safetensors), nor the weights that some repositories hold a second time beside
their component folders. Without a network, or with HF_HUB_OFFLINE=1, the local cache serves.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from magic141_jax.convert.memory import gigabytes, require_disk
from magic141_jax.convert.tensors import STEMS
from magic141_jax.errors import UserError

_WEIGHTS = re.compile(rf"({'|'.join(STEMS)})(-\d+-of-\d+)?\.safetensors")
PATTERNS = ["*.json", "*.safetensors", "*merges.txt", "*.model"]


def fetch(name: str, revision: str | None = None) -> Path:
    """The local folder of the repository `name` ("owner/name"), downloaded where the cache lacks a file.

    Tells on stderr which commit it is, and what is downloaded.

    Args:
      name: the repository.
      revision: branch, tag or commit; the main branch unless given.

    Raises:
      UserError: no such repository or revision, no access, a full disk, or no network and nothing cached.
    """
    try:
        listed = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=PATTERNS, dry_run=True)
    except Exception as error:  # the library raises its own, httpx's and the system's errors
        return _cached(name, revision, error)
    files = {file.filename: file for file in listed}
    wanted = sorted(needed_files(files))
    if not any(file.endswith(".safetensors") for file in wanted):
        raise UserError(
            f"the Hub's {name} holds no safetensors that are read here; name a repository in a known layout"
        )
    commit = files[wanted[0]].commit_hash
    missing = [files[file] for file in wanted if files[file].will_download]
    total = sum(file.file_size or 0 for file in missing)
    _tell(f"{name} at commit {commit}: {len(wanted)} files, {len(missing)} of them to download ({gigabytes(total)})")
    for file in missing:
        _tell(f"  {gigabytes(file.file_size or 0):>9}  {file.filename}")
    require_disk(Path(huggingface_hub.constants.HF_HUB_CACHE), total, f"the download of {name}")
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=commit, allow_patterns=wanted))
    except Exception as error:
        raise UserError(f"the download of {name} broke off: {_reason(error)}; run again to go on with it") from None


def needed_files(names: list[str] | dict[str, object]) -> list[str]:
    """Which files of a repository are read.

    Safetensors at the top, beside component folders and model_index.json, are the same weights in another packing.
    """
    nested = "model_index.json" in names
    wanted = []
    for name in names:
        folder, _, file = name.rpartition("/")
        weights = file.endswith(".safetensors")
        if not weights or (_WEIGHTS.fullmatch(file) and (folder or not nested)):
            wanted.append(name)
    return wanted


def _cached(name: str, revision: str | None, error: Exception) -> Path:
    """The folder in the local cache, after the Hub could not be asked."""
    why = _reason(error.__cause__ or error)
    if isinstance(error, HfHubHTTPError):  # the Hub has answered: it doesn't exist, or isn't ours to read
        raise UserError(f"no weights folder {name}, nor does the Hub give it: {why}") from None
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=["*.json"], local_files_only=True
        )
    except Exception:
        raise UserError(f"no weights folder {name}, nor could it be fetched from the Hub: {why}") from None
    _tell(f"the Hub can't be asked ({why}); {name} comes from the cache, commit {Path(folder).name}")
    return Path(folder)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
