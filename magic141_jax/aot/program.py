"""A training step without weights, data or devices: its shapes with their shardings, compiled, and what that tells.

The experiment is the one that `train.py` runs: the same method, optimizers, shardings and jitted step. Only the
teacher is known by its shapes alone and records are random ones. What is compiled is step 0, which updates every role
and so needs the most memory.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from magic141_jax import sharding
from magic141_jax.aot import flops, hlo
from magic141_jax.aot.topology import Topology
from magic141_jax.errors import UserError
from magic141_jax.experiment import RULES, Experiment, record_shape
from magic141_jax.train import streams
from magic141_jax.train.method import Batch, active_roles
from magic141_jax.train.state import TrainState
from magic141_jax.train.step import jit_step

Results = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a step is given, every leaf a shape struct with its sharding."""

    state: TrainState
    batch: Batch
    frozen: dict[str, Any]


def open_experiment(values: Mapping[str, Any], topology: Topology) -> Experiment:
    """The experiment of a config over the devices of a topology, with random records and an abstract teacher.

    Raises:
      UserError: what `Experiment.from_config` refuses, and a method that doesn't train a transformer on latents.
    """
    data = {**values["data"], "path": streams.RANDOM, "image_path": "", "threads": 0}
    experiment = Experiment.from_config({**values, "data": data}, Path(), devices=list(topology.devices), abstract=True)
    if experiment.config.model["model"] != "mmdit":
        raise UserError("only steps of the model 'mmdit' are compiled here (config.model.model)")
    return experiment


def inputs(experiment: Experiment) -> Inputs:
    """The abstract arguments of the experiment's step; nothing but one random record is drawn."""
    frozen, data, mesh = dict(experiment.method.frozen), experiment.config.data, experiment.mesh
    sizes = {"image": data.image_batch, "video": data.video_batch}
    one = dataclasses.replace(data, image_batch=min(1, sizes["image"]), video_batch=min(1, sizes["video"]))
    records = streams.arrays(next(streams.make_batches(one, seed=0, shape=record_shape(experiment.config))))
    split = sharding.batch_sharding(mesh)
    batch = {
        part: {name: struct(x, split, (sizes[part], *x.shape[1:])) for name, x in record.items()}
        for part, record in records.items()
    }
    frozen = jax.tree.map(struct, frozen, sharding.shardings(frozen, mesh, RULES))
    return Inputs(experiment.abstract_state, batch, frozen)


def struct(leaf: Any, where: jax.sharding.Sharding, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    """The shape struct of a leaf in a sharding, of another shape if one is given."""
    return jax.ShapeDtypeStruct(leaf.shape if shape is None else shape, leaf.dtype, sharding=where)


def held(given: Inputs) -> dict[str, int]:
    """Bytes on each device before a step: by role, parameters, moments and average apart, and the batch."""
    trees = {f"{role}, frozen": tree for role, tree in given.frozen.items()}
    for role in given.state.params:
        trees[f"{role}, parameters"] = given.state.params[role]
        trees[f"{role}, moments"] = given.state.opt_state[role]
        trees[f"{role}, average"] = given.state.ema.get(role, {})
    trees["batch"] = given.batch
    sizes = {name: sharding.bytes_per_device(t, jax.tree.map(lambda x: x.sharding, t)) for name, t in trees.items()}
    return {name: size for name, size in sizes.items() if size}


def describe(experiment: Experiment, given: Inputs) -> Results:
    """What is known of a step before it is traced: clips, mesh, and what lies on each device between steps."""
    config, mesh = experiment.config, experiment.mesh
    return {
        "method": config.method["name"],
        "mesh": dict(mesh.shape),
        "clip": [config.data.num_frames if config.data.video_batch else 1, config.data.height, config.data.width],
        "samples": (config.data.image_batch + config.data.video_batch) / config.train.accumulate / mesh.size,
        "roles": list(active_roles(experiment.method, 0)),
        "held": held(given),
    }


def traced(experiment: Experiment, given: Inputs) -> Any:
    """Step 0, traced (`jax.stages.Traced`)."""
    config, method = experiment.config, experiment.method
    step = jit_step(method, experiment.optimizers, accumulate=config.train.accumulate, layout=experiment.layout)
    return step.trace(given.state, given.batch, given.frozen, active=active_roles(method, 0))


def operations(step: Any, topology: Topology) -> Results:
    """Of a `traced` step: its operations (`flops`), of all devices, and their seconds at the published rate."""
    found = flops.count(step.jaxpr)
    return {"flops": found, "seconds_at_peak": found / (topology.chip.rate * len(topology.devices))}


def compiled(step: Any, topology: Topology) -> Results:
    """Compiles a `traced` step and measures it; bytes are of one device.

    Where the compiler finds no place for the program, "refused" is its first line and the measures are left out.
    """
    start = time.perf_counter()
    lowered = step.lower()
    middle = time.perf_counter()
    seconds = {"lower": round(middle - start, 1)}
    try:
        made = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"seconds": seconds, "fits": False, "refused": " ".join(str(error).split())[:300]}
    seconds["compile"] = round(time.perf_counter() - middle, 1)
    memory = _memory(made.memory_analysis())
    return {
        "seconds": seconds,
        "memory": memory,
        "fits": memory["total"] <= topology.chip.memory,
        "collectives": hlo.collectives(made.as_text()),
    }


def _memory(stats: Any) -> dict[str, int]:
    """The compiler's own account, in bytes; `total` is what a step needs at once: donated arguments become outputs."""
    found = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }
    return found | {"total": found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"]}
