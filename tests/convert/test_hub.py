"""The Hub, replaced by a fake: what is asked for, what is told first, and one clear line on every failure."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import DryRunError, RevisionNotFoundError

from magic141_jax.convert import hub, memory
from magic141_jax.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "model_index.json": 500,
    "flux1.safetensors": 24_000_000_000,
    "transformer/config.json": 600,
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": 5_000_000_000,
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": 1_000_000_000,
    "transformer/diffusion_pytorch_model.safetensors.index.json": 700,
    "transformer/diffusion_pytorch_model.fp16.safetensors": 3_000_000_000,
    "tokenizer/merges.txt": 500_000,
    "tokenizer/spiece.model": 800_000,
}
NEEDED = [name for name in FILES if name != "flux1.safetensors" and "fp16" not in name]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A Hub with one repository; `fake.error` makes it fail, `fake.cached` are files that are there already."""
    state = SimpleNamespace(files=dict(FILES), error=None, broken=None, cached=[], calls=[], folder=tmp_path / COMMIT)

    def download(name, *, revision=None, allow_patterns=None, dry_run=False, local_files_only=False):
        state.calls.append(SimpleNamespace(revision=revision, patterns=allow_patterns, dry=dry_run))
        if local_files_only:
            if state.folder.exists():
                return str(state.folder)
            raise OSError("nothing cached")
        if state.error:
            raise state.error
        if dry_run:
            return [
                SimpleNamespace(commit_hash=COMMIT, filename=f, file_size=size, will_download=f not in state.cached)
                for f, size in state.files.items()
            ]
        if state.broken:
            raise state.broken
        return str(state.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000_000))
    return state


def test_sizes_are_told_and_only_needed_files_are_fetched(fake, capsys):
    fake.cached = ["transformer/diffusion_pytorch_model-00001-of-00002.safetensors"]
    assert hub.fetch("owner/name", "v1") == fake.folder
    asked, fetched = fake.calls
    assert asked.dry and asked.revision == "v1" and not any("bin" in pattern for pattern in asked.patterns)
    assert not fetched.dry and fetched.revision == COMMIT and sorted(fetched.patterns) == sorted(NEEDED)
    told = capsys.readouterr().err
    assert f"owner/name at commit {COMMIT}: 7 files, 6 of them to download (1.0 GB)" in told
    assert "1.0 GB  transformer/diffusion_pytorch_model-00002-of-00002.safetensors" in told
    assert "00001-of-00002" not in told


def test_the_disk_is_checked_first(fake):
    fake.files["transformer/diffusion_pytorch_model-00001-of-00002.safetensors"] = 50_000_000_000
    with pytest.raises(UserError, match=r"the download of owner/name takes 51\.0 GB, but .* has 10\.0 GB free"):
        hub.fetch("owner/name")
    assert all(call.dry for call in fake.calls)


def test_a_repository_of_one_component_is_at_the_top():
    names = ["config.json", "model.safetensors", "model.fp16.safetensors", "vae/model.safetensors"]
    assert hub.needed_files(names) == ["config.json", "model.safetensors", "vae/model.safetensors"]


def offline():
    error = DryRunError("Dry run cannot be performed")
    error.__cause__ = ConnectionError("couldn't connect\nsecond line")
    return error


def test_without_a_network_the_cache_serves(fake, capsys):
    fake.error = offline()
    fake.folder.mkdir()
    assert hub.fetch("owner/name", "v1") == fake.folder
    assert fake.calls[-1].revision == "v1"
    told = capsys.readouterr().err
    assert "couldn't connect" in told and f"from the cache, commit {COMMIT}" in told


def test_failures_are_one_line(fake):
    fake.error = offline()
    with pytest.raises(UserError, match=r"nor could it be fetched from the Hub: couldn't connect second line$"):
        hub.fetch("owner/name")
    fake.error, fake.broken = None, OSError("connection reset\nmore")
    with pytest.raises(UserError, match="broke off: connection reset more; run again to go on"):
        hub.fetch("owner/name")
    fake.files = {"config.json": 1, "pytorch_model.bin": 2}
    with pytest.raises(UserError, match="holds no safetensors"):
        hub.fetch("owner/name")


def test_a_wrong_revision_is_not_looked_up_in_the_cache(fake):
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    fake.error = RevisionNotFoundError("no revision v9", response=response)
    fake.folder.mkdir()
    with pytest.raises(UserError, match=r"nor does the Hub give it: .*no revision v9"):
        hub.fetch("owner/name", "v9")


def test_the_real_library_works_offline(monkeypatch, tmp_path):
    """The same calls against the installed huggingface_hub, whose cache is filled by hand."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="nor could it be fetched from the Hub"):
        hub.fetch("owner/name")
    folder = tmp_path / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "snapshots" / COMMIT / "model_index.json").write_text("{}")
    found = hub.fetch("owner/name")
    assert found == Path(folder / "snapshots" / COMMIT) and found.name == COMMIT
