"""The seconds that a program takes at best (Williams et al., "Roofline", CACM 2009): what of its chip it waits for.

    operations     operations of a chip / rate of its matrix units
    hbm            bytes touched / bandwidth of its memory
    interconnect   bytes received by collectives / bandwidth of its links

The three can run at once: the program takes the longest of them, at best ("roofline"), and their sum where nothing
overlaps ("sum"). Matrix units rarely do better than 45 % of their published rate in a transformer of this kind, so
"expected" is the longest again with the operations at 45 %.

All three are bounds from below. `aot.hlo` says what its bytes leave out; a collective on a torus may send bytes over
several links in a row, which an all-to-all does, or use some of the links only.
"""

from __future__ import annotations

from magic141_jax.aot.topology import Topology

UTILISATION = 0.45


def seconds(
    topology: Topology, *, operations: float, touched: int | None = None, received: int | None = None
) -> dict[str, float]:
    """The times above by name, as far as they are known.

    Args:
      topology: the chips, see `topology.Chip` for their rates.
      operations: of all chips together.
      touched: bytes that one chip moves between its HBM and its cores; None where nothing was compiled.
      received: bytes that one chip receives.
    """
    at_peak = operations / len(topology.devices) / topology.chip.rate
    if touched is None or received is None:
        return {"operations": at_peak}
    exchange = received / topology.interconnect if received else 0.0  # a single chip has no links
    waits = {"hbm": touched / topology.chip.bandwidth, "interconnect": exchange}
    return {
        "operations": at_peak,
        **waits,
        "roofline": max(at_peak, *waits.values()),
        "expected": max(at_peak / UTILISATION, *waits.values()),
        "sum": at_peak + sum(waits.values()),
    }
