"""`python -m magic141_jax.recipe RECIPE.toml --workdir DIR`: stages that make a network smaller, each one measured.

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
import json
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magic141_jax import settings
from magic141_jax.errors import OneLineParser, UserError, run_entry_point
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    parser = OneLineParser(prog="python -m magic141_jax.recipe", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="a TOML file of stages")
    parser.add_argument("--workdir", type=Path, required=True, help="where the stages' folders are made")
    args = parser.parse_args(arguments)
    run(read(args.recipe), args.workdir)
    return 0


def read(file: Path) -> Recipe:
    """Reads a recipe; raises `UserError` where it can't be read, or has an unknown key or a wrong type."""
    try:
        values = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"can't read the recipe {file}: {error}") from None
    return settings.build(Recipe, values, where=str(file))


def run(recipe: Recipe, workdir: Path) -> None:
    """Runs and measures the stages that are not done.

    Raises:
      UserError: a command fails or makes no weights folder, or a gated stage has lost more than `recipe.points`.
    """
    find_folder(recipe.dense)
    before = recipe.dense
    for stage in recipe.stage:
        work = Path(workdir) / stage.name
        weights = Path(stage.weights.format(work=work, before=before))
        named = {"work": work, "before": before, "weights": weights}
        if not (weights / "model_index.json").is_file():
            work.mkdir(parents=True, exist_ok=True)
            _python([word.format(**named) for word in stage.command], stage.name)
            if not (weights / "model_index.json").is_file():
                raise UserError(f"the stage {stage.name} ran, but made no weights folder {weights}")
        lost = loss(_compared(recipe, stage.name, weights, work / "comparison.json"))
        worst, points = max(lost.items(), key=lambda item: item[1])
        print(f"{stage.name}: {_told(lost)}", flush=True)
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


def _told(lost: dict[str, float]) -> str:
    return json.dumps({name: round(points, 1) for name, points in lost.items()}) + " points lost"


if __name__ == "__main__":
    run_entry_point(main)
