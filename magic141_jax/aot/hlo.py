"""What a compiled program does on one device, read from its text (XLA's HLO): collectives, bytes touched, large arrays.

A program is a set of computations; one calls another as the body of a loop, a branch or a fused or asynchronous
part. A loop's body counts as often as the loop turns: as the compiler has noted it, or as its condition `i < n` says.
How often the walk of a few-step student turns is drawn while the program runs: such a body counts once. All branches
count.

Bytes that a collective over n devices gives to each of them, at best:

    all-gather, all-to-all    (n - 1) / n of its result: a device has its own part already
    all-reduce                2 (n - 1) / n of its result: every device sums a part and is given the others
    reduce-scatter            n - 1 times its result, which is one part of n
    collective-permute        its result

Bytes touched are those that move between HBM and the cores: operands and results of every instruction, a fusion as one,
slices instead of the arrays they are cut from. It is an estimate. A kernel's operands count once, though attention
reads the keys again for each block of queries; what the compiler keeps in the cores' own memory does not count.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# bits of an element type's name that its digits don't tell
BITS = {"pred": 8, "c64": 64, "c128": 128}
# Bytes given to a device as a multiple of the bytes of the result, n devices taking part
RECEIVED = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
# Instructions that move nothing themselves: names for what is there, and calls of what counts by itself
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all", "partition-id"),
    *("while", "conditional", "call", "async-start", "async-update", "async-done"),
}
CALLS = {"while", "conditional", "call", "async-start"}
SLICES = {"dynamic-slice", "slice", "gather"}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_NUMBER = re.compile(r"^[su]\d+\[\]")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")  # a layout in another memory than HBM
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OPERATOR = re.compile(r'op_name="([^"]*)"')
_WRAPPERS = re.compile(r"^(jit\(.*\)|while|body|cond|closed_call|checkpoint|rematted_computation|shard_map|jvp\(.*\))$")
# Devices of a group: {{0,1},{2,3}}, [groups,devices]<=[...], or mesh['a'=2,'b'=4] {'b'}
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]<=|mesh\[([^\]]*)\]\S* \{([^}]*)\})")


class Instruction(NamedTuple):
    """One line of a computation: the name and shape of its result, what it does, to which operands, and the rest."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """The computations of a program, the name of the one that is called first, and how many devices run it."""

    computations: dict[str, Computation]
    entry: str
    devices: int


def parse(text: str) -> Program:
    """The program of a text such as `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header[2]
            computations[name] = {}
            entry = name if header[1] else entry
        elif name and (found := _INSTRUCTION.match(line)):
            root, own, shape, opcode, rest = found.groups()
            operands = tuple(_NAME.findall(_until_closed(rest)))
            computations[name][own] = Instruction(own, shape, opcode, operands, rest, bool(root))
    devices = re.search(r"num_partitions=(\d+)", text[:100_000])
    return Program(computations, entry, int(devices[1]) if devices else 1)


def collectives(text: str | Program) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes", "received"}} of a program's run on one device.

    "bytes" are those of the results and "received" those that other devices give, see the module's docstring.

    Args:
      text: of an optimised program, `compiled.as_text()`, or the program that was parsed from it.
    """
    program = parse(text) if isinstance(text, str) else text
    outside = {id(scope) for scope, _, _ in _run(program, program.entry)}
    found: dict[Any, tuple[int, Instruction]] = {}
    for scope, each, times in _run(program, program.entry, fused=True):
        channel = _CHANNEL.search(each.rest)
        if each.opcode.removesuffix("-start") in KINDS:
            # One that runs beside others is written into each fusion that it overlaps with, also inside of loops that
            # turn meanwhile. Those have one channel, and the fewest times are its own.
            beside = channel and id(scope) not in outside
            key = (each.opcode, channel[1]) if beside else len(found)
            found[key] = min(found.get(key, (times, each)), (times, each), key=lambda one: one[0])
    sums: dict[str, Counter[str]] = {}
    for times, each in found.values():
        kind = each.opcode.removesuffix("-start")
        size = times * _result_bytes(each.shape, kind != each.opcode)
        received = round(size * RECEIVED[kind](_group(each.rest, program.devices)))
        sums.setdefault(kind, Counter()).update({"count": times, "bytes": size, "received": received})
    return {kind: dict(sums[kind]) for kind in KINDS if kind in sums}


def touched(program: Program) -> int:
    """Bytes that a program's run moves between HBM and the cores of one device, estimated."""
    return sum(times * _touched(program, scope, each) for scope, each, times in _run(program, program.entry))


def largest(program: Program, count: int = 3) -> list[dict[str, str | int]]:
    """The largest arrays in HBM that a program makes, each {"bytes", "shape", "operator"}; alike ones once."""
    found = {}
    for _, instruction, _ in _run(program, program.entry):
        if instruction.opcode not in FREE and not instruction.opcode.endswith(("-start", "-done")):
            for array in _ARRAY.finditer(instruction.shape):
                name = _OPERATOR.search(instruction.rest)
                operator = short_operator(name[1]) if name else instruction.opcode
                found[f"{array[1]}[{array[2]}]", operator] = _hbm_bytes(array[0])
    ranked = sorted(found.items(), key=lambda item: -item[1])[:count]
    return [{"bytes": size, "shape": shape, "operator": operator} for (shape, operator), size in ranked if size]


def short_operator(name: str) -> str:
    """The last three telling parts of an operator's path: without loops, calls and transformations."""
    parts = [part for part in name.split("/") if part and not _WRAPPERS.match(part)]
    return "/".join(parts[-3:]) or name


def _run(
    program: Program, name: str, times: int = 1, *, fused: bool = False
) -> Iterator[tuple[Computation, Instruction, int]]:
    """(where, instruction, how often) of all that runs below a computation, with `fused` what is inside of fusions."""
    scope = program.computations.get(name, {})
    for instruction in scope.values():
        yield scope, instruction, times
        if instruction.opcode.removesuffix("-start") in KINDS or not (fused or instruction.opcode in CALLS):
            continue
        below = times * _turns(program, instruction) if instruction.opcode == "while" else times
        for called in _CALLED.findall(instruction.rest):
            for callee in re.findall(r"[\w.\-]+", called):
                yield from _run(program, callee, below, fused=fused)


def _turns(program: Program, loop: Instruction) -> int:
    """How often a loop turns; 1 where nobody knows before it runs."""
    noted = _TURNS.search(loop.rest)
    if noted:
        return int(noted[1])
    condition = program.computations.get(_CONDITION.search(loop.rest)[1], {}).values()
    numbers = [each.rest for each in condition if each.opcode == "constant" and _NUMBER.match(each.shape)]
    less = any(each.opcode == "compare" and "direction=LT" in each.rest for each in condition)
    return int(numbers[0].partition(")")[0]) if len(numbers) == 1 and less else 1


def _group(rest: str, devices: int) -> int:
    """How many devices take part in a collective together; all of them unless it says."""
    found = _GROUPS.search(rest)
    if not found:
        return devices
    listed, size, axes, chosen = found.groups()
    if listed is not None:
        return listed.count(",") + 1
    if size:
        return int(size)
    # An axis may be cut: 'a':(1)2 is the part of size 2 of the axis a.
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    return math.prod(int(part) if part else sizes[n] for n, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", chosen))


def _touched(program: Program, scope: Computation, instruction: Instruction) -> int:
    _, shape, opcode, operands, rest, _ = instruction
    if opcode in FREE or opcode.endswith("-done"):
        return 0
    result = _hbm_bytes(shape)
    if opcode.endswith("-start") and shape.startswith("("):  # (operands, results, ...)
        return _slice_bytes(shape) if opcode.removesuffix("-start") in SLICES else result
    sizes = [_hbm_bytes(scope[name].shape) if name in scope else 0 for name in operands]
    if opcode in SLICES:
        return result + min(sizes[0], _result_bytes(shape))
    if opcode == "dynamic-update-slice":
        return sizes[1] + min(result, _result_bytes(scope[operands[1]].shape))
    if opcode == "fusion":
        inside = program.computations[_CALLED.search(rest)[1].lstrip("%")]
        read = [min(size, _read(program, inside, number)) for number, size in enumerate(sizes) if size]
        return sum(read) + min(result, _written(inside))
    return result + sum(sizes)


def _slice_bytes(shape: str) -> int:
    """Bytes of a slice that is started: read where it is cut, and written where that is in HBM."""
    part = _elements(shape)[1]
    return _result_bytes(part) + _hbm_bytes(part)


def _read(program: Program, inside: Computation, number: int) -> int:
    """Bytes that a fused computation reads of its parameter of that number: the whole, unless it only slices it."""
    parameter = next(e for e in inside.values() if e.opcode == "parameter" and e.rest.startswith(f"{number})"))
    return _read_of(program, inside, parameter)


def _read_of(program: Program, inside: Computation, value: Instruction) -> int:
    total = 0
    for user in (each for each in inside.values() if value.name in each.operands):
        first = user.operands[0] == value.name
        if user.opcode in SLICES and first:
            total += _result_bytes(user.shape)
        elif user.opcode == "bitcast":
            total += _read_of(program, inside, user)
        elif user.opcode == "fusion":
            nested = program.computations[_CALLED.search(user.rest)[1].lstrip("%")]
            total += _read(program, nested, user.operands.index(value.name))
        elif not (user.opcode == "dynamic-update-slice" and first):  # which is done in place
            return _result_bytes(value.shape)
    return total


def _written(inside: Computation) -> int:
    """Bytes that a fused computation writes: of an array that is updated in place the new part."""
    root = next(each for each in inside.values() if each.root)
    parts = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for part in parts:
        while part.opcode == "bitcast" and part.operands[0] in inside:
            part = inside[part.operands[0]]
        total += _result_bytes(inside[part.operands[1]].shape if part.opcode == "dynamic-update-slice" else part.shape)
    return total


def _result_bytes(shape: str, start: bool = False) -> int:
    """Bytes of a result; a start's shape is (operands, results, ...), or the results alone."""
    if start and shape.startswith("("):
        shape = _elements(shape)[1]
    return sum(_array_bytes(array) for array in _ARRAY.finditer(shape))


def _hbm_bytes(shape: str) -> int:
    """Bytes of the arrays of a shape that lie in HBM."""
    return sum(_array_bytes(array) for array in _ARRAY.finditer(shape) if not _ELSEWHERE.search(array[3] or ""))


def _array_bytes(array: re.Match[str]) -> int:
    return _bits(array[1]) * math.prod(map(int, filter(None, array[2].split(",")))) // 8


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


def _until_closed(text: str) -> str:
    """What stands before the bracket that closes an instruction's list of operands."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:place]
    return text


def _bits(kind: str) -> int:
    digits = re.search(r"\d+", kind)
    return BITS[kind] if kind in BITS else int(digits[0]) if digits else 0
