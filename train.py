"""Trains what a config describes, or exports what was trained.

    python train.py --config=configs/emoji64.py --workdir=runs/emoji64 --config.train.steps=1000
    python train.py --config=configs/emoji64.py --workdir=runs/emoji64 --export=weights/mine

Started again, a run goes on from its last checkpoint. SIGTERM and Ctrl-C save and end it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from magic141_jax import command_line
from magic141_jax.errors import UserError, run_entry_point
from magic141_jax.experiment import Experiment
from magic141_jax.pipelines.components import enable_compilation_cache

config_flags.DEFINE_config_file("config", None, "A file of configs/; its keys are set by --config.a.b=value.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, and weights at the end.")
_EXPORT = flags.DEFINE_string("export", None, "Write the last checkpoint's averaged weights to this folder, and end.")
_PROGRESS = flags.DEFINE_bool("progress", True, "Show a progress bar.")


def main() -> None:
    """Runs the command line."""
    config = _parse(sys.argv)
    enable_compilation_cache()
    experiment = Experiment.from_config(config, Path(_WORKDIR.value))
    if _EXPORT.value:
        experiment.export(experiment.restore(), Path(_EXPORT.value))
        print(f"wrote {_EXPORT.value}")
        return
    result = experiment.train(progress=_PROGRESS.value)
    if result.stopped:
        print(f"stopped and saved at step {result.step}; the same command goes on from there")
        return
    target = experiment.workdir / "weights"
    experiment.export(result.state, target)
    print(f"{result.step} steps done; weights in {target}")


def _parse(arguments: list[str]) -> ConfigDict:
    """The config, once the flags are found to be complete."""
    config = command_line.parse(arguments)
    if config is None or not _WORKDIR.value:
        raise UserError("--config and --workdir are needed: train.py --config=configs/debug.py --workdir=runs/debug")
    return config


if __name__ == "__main__":
    run_entry_point(main)
