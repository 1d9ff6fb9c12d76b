"""Stages that make a network smaller, each one measured, from a TOML file.

    dense = "default"                     what every stage is held against
    points = 2.0                          how much worse, in points of 100, a stage may be in any score
    compare = ["--samples", "16"]         flags of `python -m magic141_jax.evaluation compare`

    [[stage]]
    name = "prune"
    command = ["-m", "magic141_jax.sparsity", "{before}", "{weights}", "--single_blocks", "3"]
    gate = false                          damage that a later stage mends

    [[stage]]
    name = "recover"
    command = ["train.py", "--config=configs/x.py", "--config.init_from={before}", "--workdir={work}"]
    weights = "{work}/weights"

A command is Python's, run from the current folder. {before} is the weights folder of the stage before, at first the
dense one; {work} is DIR/NAME, {weights} what the stage has to make, DIR/NAME/weights unless it says otherwise. After
each stage its clips are compared with the dense network's. Where a gated stage has lost more than was stated the recipe
ends there with exit code 2, and nothing after it is run. What is done is not done again: the same command goes on.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magic141_jax import settings
from magic141_jax.errors import UserError
from magic141_jax.evaluation import record, standing
from magic141_jax.pipelines.components import find_folder


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command and the weights folder that it makes; without a gate it is measured and never stops the recipe."""

    name: str
    command: tuple[str, ...]
    weights: str = "{work}/weights"
    gate: bool = True


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Stages in their order, and by what they are judged; see the module's docstring."""

    stage: tuple[Stage, ...]
    dense: str = "default"
    points: float = 2.0
    compare: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stage]
        if not names or len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
            raise UserError(f"the stages are named {names}; each needs a name of its own, of letters and digits")


def read(file: Path) -> Recipe:
    """Reads a recipe; raises `UserError` where it can't be read, or has an unknown key or a wrong type."""
    try:
        values = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"can't read the recipe {file}: {error}") from None
    return settings.build(Recipe, values, where=str(file))


def run(recipe: Recipe, workdir: Path, *, tell: Callable[[str], None] = lambda line: None) -> None:
    """Runs and measures the stages that are not done; `tell` is called with what each has lost.

    Raises:
      UserError: a command fails or makes no weights folder, or a gated stage has lost more than `recipe.points`.
    """
    find_folder(recipe.dense)
    before = recipe.dense
    for stage in recipe.stage:
        work = Path(workdir) / stage.name
        weights = Path(_filled(stage.weights, {"work": work, "before": before}))
        named = {"work": work, "before": before, "weights": weights}
        if not (weights / "model_index.json").is_file():
            work.mkdir(parents=True, exist_ok=True)
            _python([_filled(word, named) for word in stage.command], stage.name)
            if not (weights / "model_index.json").is_file():
                raise UserError(f"the stage {stage.name} ran, but made no weights folder {weights}")
        lost = loss(_compared(recipe, stage.name, weights, work / "comparison.json"))
        worst, points = max(lost.items(), key=lambda item: item[1])
        told = ", ".join(f"{name} {points:+.1f}" for name, points in lost.items())
        tell(f"{stage.name}: points lost: {told}")
        if stage.gate and points > recipe.points + standing.ROUNDING:
            raise UserError(
                f"the stage {stage.name} has lost {points:.1f} points of {worst}, more than {recipe.points:g}; "
                f"change it and delete {work} to run it again"
            )
        before = str(weights)


def loss(comparison: dict[str, Any]) -> dict[str, float]:
    """By how many points of 100 the second row of a comparison is below the first: {"kind score, split": points}.

    Means over seeds; below 0 where it is better.
    """
    made = {}
    for split in comparison["settings"]["splits"]:
        found = next(iter(standing.standings(comparison["rows"], split).values()))
        for aspect in standing.ASPECTS:
            for kind, name in standing.KINDS.items():
                values = found["aspects"].get(f"{kind} {aspect.measure}")
                if values is not None and aspect.against is standing.POINTS:
                    made[f"{name} {aspect.label}, {split}"] = -float(np.mean(values))
    return made


def _compared(recipe: Recipe, name: str, weights: Path, output: Path) -> dict[str, Any]:
    if not output.is_file():
        rows = ["--row", f"dense={recipe.dense}", "--row", f"{name}={weights}"]
        _python(["-m", "magic141_jax.evaluation", "compare", *recipe.compare, *rows, "--output", str(output)], name)
    return record.read(output)


def _python(words: Sequence[str], name: str) -> None:
    done = subprocess.run([sys.executable, *words], check=False)
    if done.returncode:
        raise UserError(f"the stage {name} failed with exit code {done.returncode}: python {' '.join(words)}")


def _filled(word: str, named: Mapping[str, Any]) -> str:
    """A word with {name} replaced; other braces are its own."""
    for name, value in named.items():
        word = word.replace(f"{{{name}}}", str(value))
    return word
