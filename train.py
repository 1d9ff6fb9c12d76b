"""Trains what a config describes, or exports what was trained.

    python train.py --config=configs/emoji64.py --workdir=runs/emoji64 --config.train.steps=1000
    python train.py --config=configs/emoji64.py --workdir=runs/emoji64 --export=weights/mine [--export_step=500]

Started again, a run goes on from its last checkpoint. SIGTERM and Ctrl-C save and end it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from magic141_jax.errors import UserError, nearest, run_entry_point
from magic141_jax.experiment import Experiment
from magic141_jax.pipelines.components import enable_compilation_cache
from magic141_jax.train.checkpoint import read_step
from magic141_jax.train.state import TrainState

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/; its keys are set by --config.a.b=value.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, and weights at the end.")
_EXPORT = flags.DEFINE_string("export", None, "Write the last checkpoint's averaged weights to this folder, and end.")
_EXPORT_STEP = flags.DEFINE_integer("export_step", None, "With --export: the checkpoint of this step, not the last.")
_PROGRESS = flags.DEFINE_bool("progress", True, "Show a progress bar.")


def main() -> None:
    """Runs the command line."""
    config = _parse(sys.argv)
    enable_compilation_cache()
    experiment = Experiment.from_config(config, Path(_WORKDIR.value))
    if _EXPORT.value:
        experiment.export(_state_to_export(experiment), Path(_EXPORT.value))
        print(f"wrote {_EXPORT.value}")
        return
    print(experiment.memory(), flush=True)
    result = experiment.train(progress=_PROGRESS.value)
    if result.stopped:
        print(f"stopped and saved at step {result.step}; the same command goes on from there")
        return
    target = experiment.workdir / "weights"
    experiment.export(result.state, target)
    print(f"{result.step} steps done; weights in {target}")


def _state_to_export(experiment: Experiment) -> TrainState:
    """The state after --export_step steps (train.keep has to have kept it), or after the last ones."""
    if _EXPORT_STEP.value is None:
        return experiment.restore()
    return read_step(experiment.workdir / "checkpoints", experiment.abstract_state, _EXPORT_STEP.value)


def _parse(arguments: list[str]) -> ConfigDict:
    """Parses the flags, and turns every complaint of the flag libraries into one line."""
    try:
        rest = flags.FLAGS(arguments)
    except (AttributeError, KeyError, TypeError):
        raise UserError(_unknown_key(arguments)) from None
    except flags.Error as error:
        raise UserError(str(error)) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags look like --config.train.steps=100")
    if _EXPORT_STEP.value is not None and not _EXPORT.value:
        raise UserError("--export_step says which checkpoint --export=FOLDER writes; give both")
    if _CONFIG.value is None or not _WORKDIR.value:
        raise UserError("--config and --workdir are needed: train.py --config=configs/debug.py --workdir=runs/debug")
    return _readable(_CONFIG.value)


def _readable(config: ConfigDict) -> ConfigDict:
    """The config, if its file could be run: the flag library hands on a stand-in that raises when it is looked at."""
    try:
        config.to_dict()
    except UserError:
        raise
    except Exception as error:  # whatever a config file may raise
        raise UserError(f"can't read the --config file: {' '.join(str(error).split())[:300]}") from None
    return config


def _unknown_key(arguments: list[str]) -> str:
    """Names the first --config.a.b that the config file does not have."""
    start = next(i for i, argument in enumerate(arguments) if argument.lstrip("-").partition("=")[0] == "config")
    # The config flag looks for its overrides in sys.argv, so the file alone can be read only without them there.
    sys.argv = arguments[:1] + arguments[start : start + 1 + ("=" not in arguments[start])]
    flags.FLAGS(sys.argv)
    config = _readable(_CONFIG.value)
    for argument in arguments[1:]:
        path = argument.lstrip("-").partition("=")[0].removeprefix("no").split(".")
        node = config
        for depth, key in enumerate(path[1:] if path[0] == "config" else []):
            if not isinstance(node, ConfigDict) or key not in node:
                known = list(node) if isinstance(node, ConfigDict) else []
                return f"unknown key {'.'.join(path[: depth + 2])}.{nearest(key, known)}"
            node = node[key]
    return "a --config.key=value flag could not be read"


if __name__ == "__main__":
    run_entry_point(main)
