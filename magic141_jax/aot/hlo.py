"""Collectives of a compiled program, read from its text (XLA's HLO).

A program is a set of computations; one calls another as the body of a loop, a branch or a fused or asynchronous
part. A loop's body counts as often as the loop turns: as the compiler has noted it, or as its condition `i < n` says.
How often the walk of a few-step student turns is drawn while the program runs: such a body counts once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# bits of an element type's name that its digits don't tell
BITS = {"pred": 8, "c64": 64, "c128": 128}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\(")
_CALLS = re.compile(r"(?:body|condition|calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_NUMBER = re.compile(r" [su]\d+\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} of a program's run: how many, and the bytes that all of them give to one device.

    Args:
      text: of an optimised program, `compiled.as_text()`.
    """
    program, entry = _computations(text)
    counts, sizes = Counter(), Counter()
    for shape, kind, start, times in _run(program, entry):
        counts[kind] += times
        sizes[kind] += times * _result_bytes(shape, start)
    return {kind: {"count": counts[kind], "bytes": sizes[kind]} for kind in KINDS if counts[kind]}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the one that is called first."""
    program: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header[2]
            program[name] = []
            entry = name if header[1] else entry
        elif name:
            program[name].append(line)
    return program, entry


def _run(program: dict[str, list[str]], name: str, times: int = 1) -> Iterator[tuple[str, str, bool, int]]:
    """(result's shape, kind, whether it is the start of a pair, how often) of each collective below a computation."""
    for line in program.get(name, ()):
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        shape, opcode = found.groups()
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            yield shape, kind, kind != opcode, times
            continue
        below = times * _turns(program, line) if opcode == "while" else times
        for called in _CALLS.findall(line):
            for callee in re.findall(r"[\w.\-]+", called):
                yield from _run(program, callee, below)


def _turns(program: dict[str, list[str]], line: str) -> int:
    """How often a loop turns; 1 where nobody knows before it runs."""
    noted = _TURNS.search(line)
    if noted:
        return int(noted[1])
    condition = "\n".join(program.get(_CONDITION.search(line)[1], ()))
    numbers = _NUMBER.findall(condition)
    return int(numbers[0]) if len(numbers) == 1 and "direction=LT" in condition else 1


def _result_bytes(shape: str, start: bool) -> int:
    """Bytes of a result; a start's shape is (operands, results, ...), or the results alone."""
    if start and shape.startswith("("):
        shape = _elements(shape)[1]
    return sum(_bits(kind) * _product(sizes) // 8 for kind, sizes in _ARRAY.findall(shape))


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's shape; layouts hold commas and brackets of their own."""
    parts, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _bits(kind: str) -> int:
    digits = re.search(r"\d+", kind)
    return BITS[kind] if kind in BITS else int(digits[0]) if digits else 0


def _product(sizes: str) -> int:
    total = 1
    for size in filter(None, sizes.split(",")):
        total *= int(size)
    return total
