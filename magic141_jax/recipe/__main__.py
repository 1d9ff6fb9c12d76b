"""`python -m magic141_jax.recipe RECIPE.toml --workdir DIR`: runs the stages of a recipe, see `recipe.stages`."""

import pathlib
import sys

from magic141_jax import errors
from magic141_jax.recipe import stages


def main(words: list[str] | None = None) -> None:
    """Runs the command line, or `words`."""
    known = errors.OneLineParser(prog="python -m magic141_jax.recipe")
    known.add_argument("recipe", type=pathlib.Path, help="a TOML file of stages")
    known.add_argument("--workdir", type=pathlib.Path, required=True, help="where the stages' folders are made")
    given = known.parse_args(words)
    stages.run(stages.read(given.recipe), given.workdir, tell=lambda line: print(line, file=sys.stdout, flush=True))


if __name__ == "__main__":
    errors.run_entry_point(main)
