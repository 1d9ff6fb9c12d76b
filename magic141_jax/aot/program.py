"""A program known by shapes alone, without weights, data or devices: traced, compiled, and what that tells.

What is compiled is what would run: the jitted functions of training and of the pipelines, not models of them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax

from magic141_jax import flops, sharding
from magic141_jax.aot import hlo, roofline, topology, verdict
from magic141_jax.aot.topology import Topology

Results = dict[str, Any]
TOO_LARGE = "RESOURCE_EXHAUSTED"
ALL_THE_SAME = {"xla_tpu_no_crash_on_oom": True}  # has libtpu compile what does not fit its HBM


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with its arguments by shape.

    Attributes:
      function: made by `jax.jit`.
      arguments: every leaf a shape struct with its sharding.
      static: keywords that are part of the program.
      held: the arguments by what they are, for the account of memory; they may name some of them only.
      description: what else is told of the program.
    """

    function: Any
    arguments: tuple[Any, ...]
    held: Mapping[str, Any]
    description: Results
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def struct(leaf: Any, where: jax.sharding.Sharding, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    """The shape struct of a leaf in a sharding, of another shape if one is given."""
    return jax.ShapeDtypeStruct(leaf.shape if shape is None else shape, leaf.dtype, sharding=where)


def held(program: Program) -> dict[str, int]:
    """Bytes on each device of what the program's `held` names; nothing is left out but what is empty."""
    trees = program.held.items()
    sizes = {name: sharding.bytes_per_device(t, jax.tree.map(lambda x: x.sharding, t)) for name, t in trees}
    return {name: size for name, size in sizes.items() if size}


def measure(program: Program, made: Topology, *, insist: bool = False) -> Results:
    """All that is found out about a program on a topology: compiled where it can be.

    Args:
      program: over a mesh of the topology's devices.
      made: from `topology.make`.
      insist: a program that the compiler refuses for its memory is compiled all the same, for its account. That takes
        far longer than the refusal; the verdict stays.
    """
    results = {**program.description, "held": held(program)}
    with topology.as_if_there(made):
        traced = program.function.trace(*program.arguments, **program.static)
        operations = flops.count(traced.jaxpr)
        results |= {"flops": operations}
        found = _compiled(traced, made, insist) if made.compiles else {}
    times = roofline.seconds(made, operations=operations, **found.pop("traffic", {}))
    results |= {"seconds_at_peak": times["operations"], "roofline": times, **found}
    return results | {"reasons": verdict.reasons(results)} if "fits" in results else results


def _compiled(traced: Any, made: Topology, insist: bool) -> Results:
    """Compiles what was traced and measures it; bytes are of one device.

    Where the compiler finds no place for the program, "refused" is its message, and what it needs is all that is known
    of its memory unless it was compiled after all.
    """
    start = time.perf_counter()
    lowered = traced.lower()
    middle = time.perf_counter()
    seconds, refused = {"lower": round(middle - start, 1)}, ""
    try:
        compiled = lowered.compile(compiler_options=dict(made.options))
    except jax.errors.JaxRuntimeError as error:
        if TOO_LARGE not in str(error):
            raise
        refused = str(error)
        compiled = lowered.compile(compiler_options={**made.options, **ALL_THE_SAME}) if insist else None
    seconds["compile"] = round(time.perf_counter() - middle, 1)
    found: Results = {"seconds": seconds}
    if refused:
        needed = verdict.needed(refused)
        found |= {"refused": " ".join(refused.split())[:300], "allocations": verdict.allocations(refused)}
        found |= {"memory": {"total": needed}} if needed else {}
    if compiled is not None:
        program = hlo.parse(compiled.as_text())
        collectives = hlo.collectives(program)
        found |= {
            "memory": memory_account(compiled.memory_analysis()),
            "collectives": collectives,
            "allocations": hlo.largest(program),
            "traffic": {
                "touched": hlo.touched(program),
                "received": sum(kind["received"] for kind in collectives.values()),
            },
        }
    return found | {"fits": not refused and found["memory"]["total"] <= made.chip.memory}


def memory_account(stats: Any) -> dict[str, int]:
    """The compiler's own account, in bytes; `total` is what a run needs at once: donated arguments become outputs."""
    found = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }
    return found | {"total": found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"]}
