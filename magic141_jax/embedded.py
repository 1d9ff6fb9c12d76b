"""What comes with the package: the default's weights, its data set, and the scripts behind the console commands.

    ROOT/sample.py  ROOT/train.py    run by `magic141-sample` and `magic141-train`
    ROOT/weights/                    what `from_pretrained("default")` reads
    ROOT/datasets/emoji/             the emoji pack

In a checkout ROOT is the repository; an installed wheel carries these files itself (pyproject.toml lists them).
"""

from __future__ import annotations

import runpy
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_IN_A_WHEEL = _PACKAGE / "_embedded"
ROOT = _IN_A_WHEEL if _IN_A_WHEEL.is_dir() else _PACKAGE.parent


def sample() -> None:
    """The command magic141-sample: sample.py; exits with its code."""
    _run("sample")


def train() -> None:
    """The command magic141-train: train.py; exits with its code."""
    _run("train")


def _run(name: str) -> None:
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
