"""The wheel as a user installs it: it carries the default, and makes a video where there is no repository."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from magic141_jax import embedded
from magic141_jax.data.emoji import DEFAULT_PACK
from magic141_jax.pipelines.components import DEFAULT_FOLDER

ROOT = Path(__file__).parents[1]


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of console scripts of an environment with the wheel, which shares the libraries of this one."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False)
    scripts = Path(sysconfig.get_path("scripts", "venv", {"base": str(home), "platbase": str(home)}))
    pip("--python", scripts / "python", "install", "--no-deps", wheel)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def run(command, folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run([command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_in_a_checkout_everything_is_the_repositorys():
    assert ROOT.resolve() == embedded.ROOT
    assert DEFAULT_FOLDER.is_relative_to(ROOT.resolve()) and DEFAULT_PACK.is_file()


def test_a_wheel_holds_the_package_and_the_default_within_100_megabytes(wheel):
    assert wheel.stat().st_size < 100e6
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = [name for name in names if name.endswith("METADATA")]
        told = archive.read(about).decode()
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "magic141_jax").rglob("*.py")}
    assert modules <= names
    inside = "magic141_jax/_embedded/"
    default = json.loads((DEFAULT_FOLDER / "model_index.json").read_text())
    assert f"{inside}weights/emoji64_4step/transformer/model.safetensors" in names
    assert f"{inside}weights/{default['base']}/text_encoder/NOTICE" in names
    assert f"{inside}datasets/emoji/LICENSE" in names
    assert not [name for name in names if name.split("/")[0] in ("tests", "configs", "docs", "sample.py", "train.py")]
    assert "Requires-Dist: jax<" in told and "Requires-Python: >=3.11" in told
    extras = {file.stem.removeprefix("requirements-") for file in ROOT.glob("requirements-*.txt")}
    assert {"dev", "docs"} <= extras
    for extra in extras:
        assert f"Provides-Extra: {extra}" in told and f"extra == '{extra}'" in told


def test_an_installed_wheel_makes_a_video_in_an_empty_folder(installed, tmp_path):
    made = run(installed / "magic141-sample", tmp_path, "--prompt", "a shark moves left on a yellow background")
    assert made.returncode == 0, made.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"out.mp4", "out.png", "out.json"}
    assert json.loads((tmp_path / "out.json").read_text())["weights"] == "emoji64_4step"
    where = run(installed / "python", tmp_path, "-c", "from magic141_jax import embedded; print(embedded.ROOT)")
    assert where.stdout.strip().startswith(str(installed.parent)), "the repository lent nothing"


def test_the_installed_training_command_errs_in_one_line(installed, tmp_path):
    made = run(installed / "magic141-train", tmp_path, "--config=none.py", "--workdir=run")
    assert made.returncode == 2
    assert made.stderr.startswith("error: can't read the --config file") and made.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
