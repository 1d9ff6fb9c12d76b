"""Why a program fits a chip or does not: what takes the most of its memory.

A compiler that refuses a program says how much it needs, and at times what its largest arrays are:

    RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (35.00G) exceeds ...

    RESOURCE_EXHAUSTED: ... Ran out of memory in memory space hbm. Used 35.01G of 31.25G hbm. ...
      Largest program allocations in hbm:
      1. Size: 2.50G
         Operator: op_name="jit(step)/while/body/dot_general"
         Shape: bf16[1310720,1024]{1,0:T(8,128)(2,1)}
         ...
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from magic141_jax.aot import hlo

TEMPORARIES = "temporaries"
COUNT = 3
UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

_SIZE = r"([\d.]+)([KMGTB]?)"
_NEEDED = (
    re.compile(rf"total memory required for HLO temporaries \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of [\d.]+[KMGTB]? hbm"),
)
_ARGUMENTS = "Largest program arguments"  # the list of these follows that of the allocations
_ALLOCATION = re.compile(
    rf'^\s*\d+\. Size: {_SIZE}\n(?:\s*Operator: (?:.*?op_name="([^"]*)".*|.*)\n)?\s*Shape: (\w+\[[\d,]*\])',
    re.MULTILINE,
)


def needed(message: str) -> int | None:
    """The bytes that a program needs, by the message of a compiler that refuses it; None where it doesn't say."""
    found = next((match for pattern in _NEEDED if (match := pattern.search(message))), None)
    return found and _bytes(*found.groups())


def allocations(message: str) -> list[dict[str, Any]]:
    """The largest arrays by such a message, each {"bytes", "shape", "operator"}; alike ones once."""
    found = {
        (shape, hlo.short_operator(operator or "unknown")): _bytes(size, unit)
        for size, unit, operator, shape in _ALLOCATION.findall(message.partition(_ARGUMENTS)[0])
    }
    ranked = sorted(found.items(), key=lambda item: -item[1])[:COUNT]
    return [{"bytes": size, "shape": shape, "operator": operator} for (shape, operator), size in ranked]


def reasons(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The three things that take most, each {"what", "bytes"}: of what a chip holds, and of what it computes.

    Where the program fits, its temporaries are one thing; where it does not, the largest of them are things themselves.

    Args:
      results: with "fits", "held", and as far as they are known "memory" and "allocations".
    """
    things = [{"what": name, "bytes": size} for name, size in results["held"].items()]
    memory, arrays = results.get("memory", {}), results.get("allocations")
    if arrays and not results["fits"]:
        things += [{"what": f"{array['operator']} {array['shape']}", "bytes": array["bytes"]} for array in arrays]
    elif TEMPORARIES in memory:
        things.append({"what": TEMPORARIES, "bytes": memory[TEMPORARIES]})
    elif rest := memory.get("total", 0) - sum(results["held"].values()):
        things.append({"what": f"{TEMPORARIES} and outputs", "bytes": max(rest, 0)})
    return sorted(things, key=lambda thing: -thing["bytes"])[:COUNT]


def _bytes(size: str, unit: str) -> int:
    return round(float(size) * UNITS[unit])
