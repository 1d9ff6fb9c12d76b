"""`python -m magic141_jax.aot`: compiles the training step of a config for chips that nobody has at hand.

    python -m magic141_jax.aot --config=configs/hunyuan13b_distil_tpu.py --topology=v5p:2x2x2 [--json=FILE]
        [--config.data.num_frames=33 ...]
    python -m magic141_jax.aot --table=docs/results/aot --page=docs/layouts.md

Slices are v4, v5e, v5p or v6e with their sizes, or h100 with a number. No weights and no data are read. A step for
GPUs is compiled where XLA's CUDA plugin is installed (pip install jax[cuda13]), and else measured by shapes alone. The
second form puts the results saved by the first into a page, between its markers.
"""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from magic141_jax import command_line
from magic141_jax.aot import program, report, topology
from magic141_jax.errors import UserError, run_entry_point
from magic141_jax.evaluation.report import require_folders, update_card, write


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "Whose step: a file of configs/.", flag_values=values)
    for name, text in {
        "topology": "For which chips: v5p:2x2x2, v6e:4x4, h100:8...",
        "json": "Write the results here.",
        "table": "A folder of results: print them as a table.",
        "page": "With --table: put the table between this page's markers.",
    }.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    return values


def main() -> None:
    """Runs the command line; raises `UserError` for what the user can mend."""
    values = _flags()
    config = command_line.parse(sys.argv, values)
    if values.table:
        _write_table(Path(values.table), values.page)
        return
    if config is None or not values.topology:
        raise UserError("--config and --topology are needed, such as --config=configs/debug.py --topology=v5p:2x2x2")
    target = Path(values.json) if values.json else None
    require_folders(target)
    jax.config.update("jax_platforms", "cpu")
    results = measure(config, topology.make(values.topology), name=Path(values["config"].config_filename).stem)
    results["command"] = f"python -m magic141_jax.aot {shlex.join(_without(sys.argv[1:], 'json'))}"
    if target:
        write(target, json.dumps(results, indent=2) + "\n")
    print(report.summary(results))


def measure(config: ConfigDict, made: topology.Topology, *, name: str) -> dict[str, Any]:
    """The results of a config's step on a topology, compiled where it can be."""
    experiment = program.open_experiment(config.to_dict(), made)
    given = program.inputs(experiment)
    step = program.traced(experiment, given)
    results = {
        "config": name,
        "topology": made.name,
        "chips": len(made.devices),
        "chip_memory": made.chip.memory,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        **program.describe(experiment, given),
        **program.operations(step, made),
    }
    return results | (program.compiled(step, made) if made.compiles else {})


def _write_table(folder: Path, page: str | None) -> None:
    body = report.table(report.read_folder(folder))
    print(body)
    if page:
        try:
            text = Path(page).read_text()
        except OSError as error:
            raise UserError(f"can't read the page {page}: {error.strerror}") from None
        write(Path(page), update_card(text, f"\n{body}\n", markers=report.MARKERS))


def _without(arguments: list[str], flag: str) -> list[str]:
    """Arguments without a flag and its value."""
    kept = []
    for i, argument in enumerate(arguments):
        before = arguments[i - 1] if i else ""
        if argument.partition("=")[0].lstrip("-") != flag and before.lstrip("-") != flag:
            kept.append(argument)
    return kept


if __name__ == "__main__":
    run_entry_point(main)
