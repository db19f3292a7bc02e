"""What a compiled XLA program moves and holds, read from its text.

XLA's own cost analysis is not there for programs compiled without a device. As it does, a kernel is
taken to read each of its operands once and to write its results.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

# Bytes that each of n devices sends, of one that its operand has: of the ways to do it, that which
# sends least.
COLLECTIVES: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "ragged-all-to-all": lambda n: (n - 1) / n,
}
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "token": 0, "c64": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_PRODUCTS = ("dot", "ragged-dot")
_LIBRARY = re.compile(r'custom_call_target="[^"]*(gemm|matmul)', re.IGNORECASE)
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
# They move nothing of their own.
_FREE = {
    *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "iota"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency"),
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: its result's arrays, what it does, to what, and the rest."""

    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    op: str
    operands: tuple[str, ...]
    text: str
    root: bool

    @property
    def nbytes(self) -> int:
        return sum(_width(kind) * math.prod(shape) for kind, shape in self.shapes)


class Collective(NamedTuple):
    """One instruction by which devices exchange data.

    Attributes:
      kind: of `COLLECTIVES`.
      times: that it runs, as far as XLA knows how often loops do.
      sent: bytes that each device sends in all these times.
      groups: numbers of the devices that exchange with one another [groups, devices].
    """

    kind: str
    times: int
    sent: float
    groups: np.ndarray

    def within(self, node: int) -> bool:
        """Whether no group has devices of two nodes, which have so many each."""
        return bool((self.groups // node == self.groups[:, :1] // node).all())


class Program:
    """A parsed program."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self.computations.setdefault(match[1], {})
                self.entry = match[1] if line.startswith("ENTRY") else self.entry
            elif match := _INSTRUCTION.match(line):
                root, name, shape, op, rest = match.groups()
                operands = tuple(re.findall(r"%([\w.-]+)", _arguments(rest)))
                current[name] = Instruction(name, _shapes(shape), op, operands, rest, bool(root))

    def moved(self) -> int:
        """Bytes that all its kernels read and write."""
        return self._moved(self.entry)

    def collectives(self) -> list[Collective]:
        """Those between more than one device, in the order of the program; of branches, those of
        the one that sends most.

        Raises:
          ValueError: one names its devices in a way that is not known here.
        """
        return [c for c in self._collectives(self.entry, 1) if c.groups.shape[1] > 1]

    def squares(self, rows: int, columns: int) -> list[Instruction]:
        """Results with two axes of these sizes, which memory has to hold."""
        return [
            i
            for i in self._kernels()
            if any(
                rows in shape and shape.count(columns) >= 1 + (rows == columns)
                for _, shape in i.shapes
            )
        ]

    def ragged_dots(self) -> int:
        """Products of ragged groups that were not left to a library: dense, masked work."""
        ragged = [i for i in self._products() if "ragged_dot" in i.text]
        return sum("grouped" not in i.text for i in ragged)

    def float32_products(self) -> list[Instruction]:
        """Products with float32 operands for which nobody asked for float32's precision: on AMD
        GPUs they are computed in XF32, and slower than the bfloat16 ones they were meant as."""
        return [
            i
            for i in self._products()
            if "highest" not in i.text.lower() and "f32" in self._kinds_of_operands(i)
        ]

    def _products(self) -> list[Instruction]:
        """Those that libraries or XLA's own kernels compute."""
        return [i for i in self._all() if i.op in _PRODUCTS or _LIBRARY.search(i.text)]

    def _kinds_of_operands(self, product: Instruction) -> set[str]:
        (computation,) = [c for c in self.computations.values() if c.get(product.name) is product]
        operands = [computation[o] for o in product.operands[:2] if o in computation]
        return {kind for operand in operands for kind, _ in operand.shapes}

    def _all(self) -> list[Instruction]:
        return [i for c in self.computations.values() for i in c.values()]

    def _kernels(self) -> list[Instruction]:
        """Instructions whose results are buffers: not those inside of fusions."""
        inside = {m for i in self._all() if i.op == "fusion" for m in _called(i)}
        return [
            i for name, c in self.computations.items() if name not in inside for i in c.values()
        ]

    def _collectives(self, name: str, times: int) -> Iterator[Collective]:
        computation = self.computations[name]
        for i in computation.values():
            kind = i.op.removesuffix("-start")
            if kind in COLLECTIVES:
                groups = _groups(i)
                once = sum(computation[o].nbytes for o in i.operands)
                sent = once * COLLECTIVES[kind](groups.shape[1])
                yield Collective(kind, times, times * sent, groups)
            elif i.op == "while":
                (body,) = _called(i, "body")
                yield from self._collectives(body, times * _trips(i))
            elif i.op == "conditional":
                branches = _called(i, "branch_computations", "true_computation")
                found = [list(self._collectives(branch, times)) for branch in branches]
                yield from max(found, key=lambda branch: sum(c.sent for c in branch))
            elif i.op in ("call", "async-start"):
                for called in _called(i, "to_apply", "calls"):
                    yield from self._collectives(called, times)

    def _moved(self, name: str) -> int:
        computation, total = self.computations[name], 0
        for i in computation.values():
            if i.op == "while":
                body = next(c for c in _called(i, "body"))
                total += _trips(i) * self._moved(body)
            elif i.op == "conditional":
                total += max(
                    map(self._moved, _called(i, "branch_computations", "true_computation"))
                )
            elif i.op in ("call", "async-start"):
                total += sum(map(self._moved, _called(i, "to_apply", "calls")))
            elif i.op == "fusion":
                total += self._moved_by_fusion(i, computation)
            elif i.op == "dynamic-update-slice":
                total += 2 * computation[i.operands[1]].nbytes
            elif i.op in ("dynamic-slice", "slice", "gather"):
                total += 2 * i.nbytes
            elif i.op not in _FREE and not i.op.endswith("-done"):
                total += i.nbytes + sum(computation[o].nbytes for o in set(i.operands))
        return total

    def _moved_by_fusion(self, fusion: Instruction, outside: dict[str, Instruction]) -> int:
        """Of operands of which the fusion takes slices, those alone; of what it updates in place,
        the update."""
        (name,) = _called(fusion)
        inside = self.computations[name]
        total = 0
        for i in inside.values():
            if i.op == "parameter":
                number = int(i.text.partition(")")[0])
                users = [u for u in inside.values() if i.name in u.operands]
                sliced = users and all(
                    u.op in ("dynamic-slice", "slice", "gather", "dynamic-update-slice")
                    and u.operands[0] == i.name
                    for u in users
                )
                whole = outside[fusion.operands[number]].nbytes
                parts = sum(u.nbytes for u in users if u.op != "dynamic-update-slice")
                total += min(parts, whole) if sliced else whole
            elif i.root:
                total += _written(i, inside)
        return total


def _written(root: Instruction, inside: dict[str, Instruction]) -> int:
    if root.op == "tuple":
        return sum(_written(inside[name], inside) for name in root.operands)
    if root.op == "bitcast" and root.operands:
        return _written(inside[root.operands[0]], inside)
    if root.op == "dynamic-update-slice":
        return inside[root.operands[1]].nbytes
    return root.nbytes


def _arguments(rest: str) -> str:
    """What stands between an instruction's parentheses."""
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:place]
    return rest


def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    text = re.sub(r"\{[^{}]*\}", "", text)
    return tuple(
        (kind, tuple(int(n) for n in sizes.split(",") if n)) for kind, sizes in _ARRAY.findall(text)
    )


def _width(kind: str) -> int:
    if kind in _BYTES:
        return _BYTES[kind]
    bits = re.search(r"\d+", kind)
    return max(int(bits[0]) // 8, 1) if bits else 0


def _called(instruction: Instruction, *keys: str) -> list[str]:
    found = []
    for key in keys or ("calls",):
        if match := re.search(rf"{key}=(\{{[^}}]*\}}|%[\w.-]+)", instruction.text):
            found += re.findall(r"%([\w.-]+)", match[1])
    if "false_computation" in instruction.text and "true_computation" in keys:
        found += re.findall(r"false_computation=%([\w.-]+)", instruction.text)
    return found


def _groups(collective: Instruction) -> np.ndarray:
    """The devices that exchange with one another [groups, devices], in whichever way they are
    named; a sender and its receiver are such a group too."""
    text = collective.text
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", text):
        return np.array([_numbers(group) for group in re.findall(r"\{([^}]*)\}", match[1])])
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if tiled:
        sizes = _numbers(tiled[2])
        order = _numbers(tiled[3]) if tiled[3] else range(len(sizes))
        devices = np.arange(math.prod(sizes)).reshape(sizes)
        return devices.transpose(order).reshape(_numbers(tiled[1]))
    mesh = re.search(r"replica_groups=mesh\[(('\w+'=\d+,?)+)\] \{(('\w+',?)+)\}", text)
    if mesh:
        names = re.findall(r"'(\w+)'", mesh[1])
        sizes = [int(size) for size in re.findall(r"=(\d+)", mesh[1])]
        along = [names.index(name) for name in re.findall(r"'(\w+)'", mesh[3])]
        devices = np.moveaxis(np.arange(math.prod(sizes)).reshape(sizes), along, range(len(along)))
        return devices.reshape(math.prod(sizes[axis] for axis in along), -1).T
    raise ValueError(f"{collective.name}: its devices are not named in a known way: {text}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _trips(loop: Instruction) -> int:
    """How often a loop runs, where XLA knows; else once."""
    match = re.search(r'"known_trip_count":(\{[^}]*\})', loop.text)
    return int(json.loads(match[1])["n"]) if match else 1
