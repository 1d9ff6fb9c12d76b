"""`python -m magic141_jax.aot`: compiles a program of a config for chips that nobody has at hand.

    python -m magic141_jax.aot --config=configs/hunyuan13b_distil_tpu.py --topology=v5p:2x2x2 [--json=FILE]
        [--program=train|text|encode|sampler|decode] [--batch=CLIPS] [--config.data.num_frames=33 ...]
    python -m magic141_jax.aot --config=... --topology=... --program=sampler --shardings
    python -m magic141_jax.aot --table=docs/results/aot --page=docs/layouts.md

Slices are v4, v5e, v5p or v6e with their sizes, or h100 with a number. The program is the training step, or a stage of
a pipeline call with the config's model. No weights and no data are read. Programs for GPUs are compiled where XLA's
CUDA plugin is installed (pip install jax[cuda13]), and else measured by shapes alone. The second form compiles nothing
and tells where each array lies. The third puts the results saved by the first into a page, between its markers.
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
from ml_collections import config_flags

from magic141_jax import command_line
from magic141_jax.aot import program, report, stages, topology, training
from magic141_jax.errors import UserError, nearest, run_entry_point
from magic141_jax.evaluation.report import require_folders, update_card, write

# Name -> (the config's values, topology, batch) -> the program
PROGRAMS = {
    "train": training.train,
    "text": stages.text,
    "encode": stages.encode,
    "sampler": stages.sampler,
    "decode": stages.decode,
}


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "Whose program: a file of configs/.", flag_values=values)
    for name, text in {
        "topology": "For which chips: v5p:2x2x2, v6e:4x4, h100:8...",
        "json": "Write the results here.",
        "table": "A folder of results: print them as a table.",
        "page": "With --table: put the table between this page's markers.",
    }.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    flags.DEFINE_string("program", "train", f"Which program: {', '.join(PROGRAMS)}.", flag_values=values)
    flags.DEFINE_integer(
        "batch", None, "How many clips a pipeline's program makes at once; 1 unless said.", flag_values=values
    )
    text = "With --program=sampler: how its kernels are held, such as int4 or '2:4 int8'."
    flags.DEFINE_string("kernels", "", text, flag_values=values)
    text = "Say where each array of the program lies, and end."
    flags.DEFINE_bool("shardings", False, text, flag_values=values)
    text = "Compile what the compiler refuses for its memory all the same, for its account; this takes long."
    flags.DEFINE_bool("insist", False, text, flag_values=values)
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
    if values.program not in PROGRAMS:
        raise UserError(f"--program={values.program}: unknown.{nearest(values.program, PROGRAMS)}")
    target = Path(values.json) if values.json else None
    require_folders(target)
    jax.config.update("jax_platforms", "cpu")
    made = topology.make(values.topology)
    if values.kernels and values.program != "sampler":
        raise UserError(f"--kernels is for --program=sampler, not for {values.program}")
    options = {"kernels": values.kernels} if values.kernels else {}
    asked = PROGRAMS[values.program](config.to_dict(), made, values.batch, **options)
    if values.shardings:
        print(report.shardings(asked.held))
        return
    results = _measure(values, asked, made)
    if target:
        write(target, json.dumps(results, indent=2) + "\n")
    print(report.summary(results))


def _measure(values: flags.FlagValues, asked: program.Program, made: topology.Topology) -> dict[str, Any]:
    """The results of the program that the flags name, compiled where it can be."""
    return {
        "config": Path(values["config"].config_filename).stem,  # pyright: ignore[reportAttributeAccessIssue]
        "program": values.program,
        "topology": made.name,
        "chips": len(made.devices),
        "chip_memory": made.chip.memory,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        **program.measure(asked, made, insist=values.insist),
        "command": f"python -m magic141_jax.aot {shlex.join(_without(sys.argv[1:], 'json'))}",
    }


def _write_table(folder: Path, page: str | None) -> None:
    found = report.read_folder(folder)
    tables = {report.MARKERS: report.table(found), report.CLIP_MARKERS: report.clips(found)}
    print("\n\n".join(filter(None, tables.values())))
    if not page:
        return
    try:
        text = Path(page).read_text()
    except OSError as error:
        raise UserError(f"can't read the page {page}: {error.strerror}") from None
    for markers, body in tables.items():
        if body or markers[0] in text:
            text = update_card(text, f"\n{body}\n", markers=markers)
    write(Path(page), text)


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
