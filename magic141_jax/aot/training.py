"""The training step of a config, a distillation's being its own: the program "train".

The experiment is the one that `train.py` runs: the same method, optimizers, shardings and jitted step. Only the
teacher is known by its shapes alone and records are random ones. What is compiled is step 0, which updates every role
and so needs the most memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from magic141_jax import sharding
from magic141_jax.aot.program import Program, struct
from magic141_jax.aot.topology import Topology
from magic141_jax.errors import UserError
from magic141_jax.experiment import RULES, Experiment, record_shape
from magic141_jax.train import streams
from magic141_jax.train.method import active_roles
from magic141_jax.train.step import jit_step


def train(values: Mapping[str, Any], topology: Topology, batch: int | None = None) -> Program:
    """Step 0 of the experiment of a config over the devices of a topology; nothing but one random record is drawn.

    Raises:
      UserError: what `Experiment.from_config` refuses; a method that doesn't train a transformer on latents; a batch,
        which the config has of its own.
    """
    if batch is not None:
        raise UserError("--batch is of the programs that sample; a step's is --config.data.video_batch")
    experiment = open_experiment(values, topology)
    config, method, mesh = experiment.config, experiment.method, experiment.mesh
    roles = active_roles(method, 0)
    arguments = (experiment.abstract_state, _batch(experiment), _frozen(experiment))
    step = jit_step(method, experiment.optimizers, accumulate=config.train.accumulate, layout=experiment.layout)
    clips = (config.data.image_batch + config.data.video_batch) / config.train.accumulate
    description = {
        "what": f"step 0 of {config.method['name']} updates {' and '.join(roles)}",
        "method": config.method["name"],
        "mesh": dict(mesh.shape),
        "clip": [config.data.num_frames if config.data.video_batch else 1, config.data.height, config.data.width],
        "samples": clips / mesh.size,
        "roles": list(roles),
    }
    return Program(step, arguments, _held(*arguments), description, static={"active": roles})


def open_experiment(values: Mapping[str, Any], topology: Topology) -> Experiment:
    """The experiment of a config over the devices of a topology, with random records and an abstract teacher.

    Raises:
      UserError: as `train`.
    """
    data = {**values["data"], "path": streams.RANDOM, "image_path": "", "threads": 0}
    experiment = Experiment.from_config({**values, "data": data}, Path(), devices=list(topology.devices), abstract=True)
    if experiment.config.model["model"] != "mmdit":
        raise UserError("only steps of the model 'mmdit' are compiled here (config.model.model)")
    return experiment


def _batch(experiment: Experiment) -> dict[str, Any]:
    data, split = experiment.config.data, sharding.batch_sharding(experiment.mesh)
    sizes = {"image": data.image_batch, "video": data.video_batch}
    one = dataclasses.replace(data, image_batch=min(1, sizes["image"]), video_batch=min(1, sizes["video"]))
    records = streams.arrays(next(streams.make_batches(one, seed=0, shape=record_shape(experiment.config))))
    return {
        part: {name: struct(x, split, (sizes[part], *x.shape[1:])) for name, x in record.items()}
        for part, record in records.items()
    }


def _frozen(experiment: Experiment) -> dict[str, Any]:
    frozen = dict(experiment.method.frozen)
    return jax.tree.map(struct, frozen, sharding.shardings(frozen, experiment.mesh, RULES))


def _held(state: Any, batch: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """What lies on the devices between steps: by role, parameters, moments and average apart, and the batch."""
    trees = {f"{role}, frozen": tree for role, tree in frozen.items()}
    for role in state.params:
        trees[f"{role}, parameters"] = state.params[role]
        trees[f"{role}, moments"] = state.opt_state[role]
        trees[f"{role}, average"] = state.ema.get(role, {})
    return trees | {"batch": batch}
