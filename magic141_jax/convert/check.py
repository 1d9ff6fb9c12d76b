"""What a component holds, and the first layer whose output differs from a reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from magic141_jax.convert.engine import plan_in
from magic141_jax.convert.memory import gigabytes, memory_free, memory_needed
from magic141_jax.convert.repository import Component
from magic141_jax.errors import UserError
from magic141_jax.models.network import Network
from magic141_jax.pytree import Params

INPUTS = ("inputs", "t", "text", "text_mask", "pooled", "guidance")
# What an MMDiT computes, in its order; names of a group alternate layer by layer.
OUTPUTS = (
    ("condition",),
    ("patch_in",),
    ("text_in",),
    ("double_blocks.video", "double_blocks.text"),
    ("single_blocks",),
    ("output",),
)


class Difference(NamedTuple):
    """How far an output is from its reference: the largest difference over the largest reference value."""

    name: str
    error: float


def describe(component: Component, dtype: Any, mesh: Mesh | None = None) -> list[str]:
    """A table of a component: per parameter its shape (layers first), stored dtype, count and bytes; then the memory.

    Only names, shapes and dtypes are read.
    """
    abstract = component.network.abstract_params
    _, leaves = plan_in(component.tensors, component.table, abstract)
    rows = []
    for path, leaf in sorted(leaves.items()):
        size = leaf.size * leaf.dtype.itemsize
        rows.append((path, "x".join(map(str, leaf.shape)), leaf.dtype.name, f"{leaf.size:,}", gigabytes(size)))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  " + "  ".join([*(cell.ljust(w) for cell, w in zip(row[:3], widths)), *map(str.rjust, row[3:], widths[3:])])
        for row in rows
    ]
    source = f" ({component.written_by})" if component.written_by else ""
    needed = memory_needed(abstract, dtype, mesh, rules=component.rules)
    device = (mesh.local_devices if mesh is not None else jax.local_devices())[0]
    free = memory_free(device)
    have = "" if free is None else f"; {gigabytes(free)} free on {device.device_kind}"
    return [
        f"{component.folder}: {component.architecture}{source} is our {component.kind}",
        *lines,
        f"  {len(component.tensors)} tensors, {sum(leaf.size for leaf in leaves.values()):,} parameters, "
        f"{gigabytes(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values()))} as stored",
        f"  memory: {gigabytes(needed)} in {jnp.dtype(dtype).name} on each device{have}",
    ]


def compare(network: Network, params: Params, reference: Mapping[str, Any]) -> Iterator[Difference]:
    """Runs an MMDiT on the reference's inputs and compares every output, in the order of the computation.

    Rows of padded text may hold anything and don't count.

    Args:
      network, params: an `MMDiT`.
      reference: "input.<name>" for the names of `INPUTS` (guidance only where the network has it), and any of
        `OUTPUTS`, in the shapes of `MMDiT.__call__(..., intermediates=True)`.

    Raises:
      UserError: an input is missing, or a name or shape is not the network's.
    """
    given = {
        name: jnp.asarray(np.asarray(reference[f"input.{name}"])) for name in INPUTS if f"input.{name}" in reference
    }
    missing = [name for name in INPUTS[:-1] if name not in given]
    known = [name for group in OUTPUTS for name in group]
    strange = sorted(reference.keys() - {f"input.{name}" for name in INPUTS} - set(known))
    if missing or strange:
        raise UserError(f"the reference lacks the inputs {missing} or holds the unknown {strange}; make it anew")
    output, outputs = jax.jit(network.__call__, static_argnames="intermediates")(params, **given, intermediates=True)
    outputs = {"output": output} | outputs
    text = np.asarray(given["text_mask"], bool)
    rows = {"text_in": text, "double_blocks.text": text}
    video = np.ones(outputs["patch_in"].shape[:2], bool)
    rows["single_blocks"] = np.concatenate([video, text], axis=1)
    for group in OUTPUTS:
        names = [name for name in group if name in reference]
        stacked = "blocks" in group[0]
        for layer in range(outputs[group[0]].shape[0]) if stacked else [None]:
            for name in names:
                ours, theirs = (np.asarray(x[name], np.float32) for x in (outputs, reference))
                if ours.shape != theirs.shape:
                    raise UserError(f"{name} of the reference has shape {theirs.shape}, the network's {ours.shape}")
                if stacked:
                    ours, theirs = ours[layer], theirs[layer]
                if name in rows:
                    ours, theirs = ours[rows[name]], theirs[rows[name]]
                error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)
                yield Difference(name if layer is None else f"{name}[{layer}]", float(error))


def component_folders(folder: Path) -> list[Path]:
    """The component folders of a repository: itself, or those below that have a config.json."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    if (folder / "config.json").exists():
        return [folder]
    found = sorted(file.parent for file in folder.glob("*/config.json"))
    if not found:
        raise UserError(f"neither {folder} nor a folder in it has a config.json; is it a published repository?")
    return found
