"""Trains what a config describes, or exports what was trained.

    python train.py --config=configs/emoji64.py --workdir=runs/emoji64 --config.train.steps=1000
    python train.py --config=configs/emoji64.py --workdir=runs/emoji64 --export=weights/mine [--export_step=500]
    python train.py --config=configs/emoji64.py --workdir=runs/emoji64 --preflight

Started again, a run goes on from its last checkpoint. SIGTERM and Ctrl-C save and end it. On several hosts start it on
each, see `magic141_jax.processes`; they have to see the same --workdir. The third form only tells what the run takes,
and exits with 1 if it can't fit.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from magic141_jax import command_line, processes
from magic141_jax.aot import preflight
from magic141_jax.errors import UserError, run_entry_point
from magic141_jax.experiment import Experiment
from magic141_jax.pipelines.components import enable_compilation_cache
from magic141_jax.train.checkpoint import read_step
from magic141_jax.train.state import TrainState

config_flags.DEFINE_config_file("config", None, "A file of configs/; its keys are set by --config.a.b=value.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, and weights at the end.")
_EXPORT = flags.DEFINE_string("export", None, "Write the last checkpoint's averaged weights to this folder, and end.")
_EXPORT_STEP = flags.DEFINE_integer("export_step", None, "With --export: the checkpoint of this step, not the last.")
_PREFLIGHT = flags.DEFINE_bool("preflight", False, "Only tell what the run takes: memory, time, disk.")
_PROGRESS = flags.DEFINE_bool("progress", True, "Show a progress bar.")


def main() -> int:
    """Runs the command line; returns the exit code."""
    config = _parse(sys.argv)
    processes.start()
    say = print if processes.leads() else lambda *_, **__: None
    if _PREFLIGHT.value:
        report = preflight.training(config.to_dict(), Path(_WORKDIR.value))
        say(report.text())
        return 0 if report.fits else 1
    enable_compilation_cache()
    experiment = Experiment.from_config(config, Path(_WORKDIR.value))
    if _EXPORT.value:
        experiment.export(_state_to_export(experiment), Path(_EXPORT.value))
        say(f"wrote {_EXPORT.value}")
        return 0
    say(experiment.memory(), flush=True)
    say("the first step waits for the compiler, which takes as long as many steps", flush=True)
    result = experiment.train(progress=_PROGRESS.value)
    if result.stopped:
        say(f"stopped and saved at step {result.step}; the same command goes on from there")
        return 0
    target = experiment.workdir / "weights"
    experiment.export(result.state, target)
    say(f"{result.step} steps done; weights in {target}")
    return 0


def _state_to_export(experiment: Experiment) -> TrainState:
    """The state after --export_step steps (train.keep has to have kept it), or after the last ones."""
    if _EXPORT_STEP.value is None:
        return experiment.restore()
    return read_step(experiment.workdir / "checkpoints", experiment.abstract_state, _EXPORT_STEP.value)


def _parse(arguments: list[str]) -> ConfigDict:
    """The config, once the flags are found to be complete."""
    config = command_line.parse(arguments)
    if _EXPORT_STEP.value is not None and not _EXPORT.value:
        raise UserError("--export_step says which checkpoint --export=FOLDER writes; give both")
    if config is None or not _WORKDIR.value:
        raise UserError("--config and --workdir are needed: train.py --config=configs/debug.py --workdir=runs/debug")
    return config


if __name__ == "__main__":
    run_entry_point(main)
