"""Loops of a kernel's machine code (SASS), and the instructions that one pass through a loop issues.

nvdisasm prints the code. It comes with the CUDA toolkit, and by itself as nvidia-cuda-nvdisasm on PyPI.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_FUNCTION = re.compile(r"^\.text\.(\w+):")
_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P[\dT]\s+)?([A-Z][\w.]*)(.*)")
_TARGET = re.compile(r"(.*)`\((\.L_\w+)\)")

# What every pass does; copies are of 16 bytes. Other blocks serve arguments that a call may not have.
NEEDED = re.compile(r"HMMA|LDSM|MUFU\.EX2|LDGSTS.*\.128$|BAR")
# Of kernels that copy through registers, and where exponentials serve a feature map that a call may not have.
NEEDED_WITHOUT_SOFTMAX = re.compile(r"HMMA|LDSM|LDG\.E\.128|STG|BAR")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    is_conditional: bool = False
    target: int | None = None
    """Of a branch: index of an instruction."""

    @property
    def falls_through(self) -> bool:
        return self.is_conditional or self.opcode.partition(".")[0] not in ("BRA", "BRX", "EXIT", "RET")

    @property
    def is_rare(self) -> bool:
        """The mark of a block that is rarely executed (csrc/cuda/fast_softmax.h)."""
        return self.opcode.startswith("NANOSLEEP") and not self.is_conditional


@dataclass(frozen=True)
class Loop:
    """A pass through a loop that holds matrix instructions."""

    opcodes: tuple[str, ...]
    """Of the shortest pass that has everything that is needed."""
    longest: int
    """Instructions of the longest pass."""

    def count(self, *prefixes: str) -> int:
        return sum(opcode.startswith(prefixes) for opcode in self.opcodes)

    @property
    def slots_per_hmma(self) -> float:
        return len(self.opcodes) / self.count("HMMA")

    @property
    def ldsm_per_hmma(self) -> float:
        return self.count("LDSM") / self.count("HMMA")

    @property
    def scores(self) -> int:
        """Of a thread, four a fragment: it computes one exponential each. The few beyond that correct running sums."""
        return self.count("MUFU.EX2") // 4 * 4


def nvdisasm(nvcc_folder: Path | None = None) -> str | None:
    """In the folder of nvcc, on the path, or installed into this environment by pip."""
    packages = importlib.util.find_spec("nvidia")
    roots = (packages and packages.submodule_search_locations) or ()
    found = [path for root in roots for path in Path(root).glob("*/bin/nvdisasm")]
    if nvcc_folder is not None:
        found.insert(0, nvcc_folder / "nvdisasm")
    return next((str(path) for path in found if os.access(path, os.X_OK)), None) or shutil.which("nvdisasm")


def disassemble(program: str, cubin: Path) -> dict[str, list[Instruction]]:
    """The code of each function of a cubin, by its mangled name."""
    return parse(subprocess.run([program, "-c", cubin], check=True, capture_output=True, text=True).stdout)


def parse(text: str) -> dict[str, list[Instruction]]:
    functions: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if found := _FUNCTION.match(line):
            lines = functions.setdefault(found[1], [])
        elif _LABEL.match(line) or _INSTRUCTION.match(line):
            lines.append(line)
    return {name: _instructions(lines) for name, lines in functions.items()}


def _instructions(lines: Iterable[str]) -> list[Instruction]:
    labels: dict[str, int] = {}
    matches: list[re.Match[str]] = []
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(matches)
        elif found := _INSTRUCTION.match(line):
            matches.append(found)
    code = []
    for predicate, opcode, operands in (found.groups() for found in matches):
        target, is_conditional = None, predicate is not None
        # A warp branches at BRA.DIV where its lanes have diverged before a shuffle; ours do not.
        if opcode.startswith("BRA") and (found := _TARGET.search(operands)):
            is_conditional |= found[1].strip() != "" or "DIV" in opcode
            target = None if "DIV" in opcode else labels.get(found[2])
        code.append(Instruction(opcode, is_conditional, target))
    return code


def loops(code: Sequence[Instruction], needed: re.Pattern[str] = NEEDED) -> list[Loop]:
    """The loops that hold matrix instructions outside of loops inside them, in the order of the code.

    ``needed`` are the instructions of the shortest pass.
    """
    after = [
        [n for n in (i + 1 if x.falls_through else None, x.target) if n is not None and n < len(code)]
        for i, x in enumerate(code)
    ]
    order, jumps_back = _depth_first(after)
    bodies = {head: body for head, body in _bodies(after, jumps_back).items() if _matrix_instructions(code, body)}
    result = []
    for head, body in sorted(bodies.items()):
        own = body.difference(*(other for other in bodies.values() if other < body))
        if _matrix_instructions(code, own):
            inside = [i for i in order if i in body and not code[i].is_rare]
            shortest = _best_pass(after, inside, jumps_back, head, lambda i: (bool(needed.match(code[i].opcode)), -1))
            longest = _best_pass(after, inside, jumps_back, head, lambda _: (0, 1))
            result.append(Loop(tuple(code[i].opcode for i in shortest), len(longest)))
    return result


def _matrix_instructions(code: Sequence[Instruction], indices: Iterable[int]) -> bool:
    return any(code[i].opcode.startswith("HMMA") for i in indices)


def _depth_first(after: list[list[int]]) -> tuple[list[int], set[tuple[int, int]]]:
    """The instructions, each behind those that may follow it; and the jumps back to the head of a loop."""
    order: list[int] = []
    jumps_back: set[tuple[int, int]] = set()
    is_open = {0: True}  # of what was seen: whether a way from it is being followed
    ways = [(0, iter(after[0]))]
    while ways:
        i, following = ways[-1]
        for n in following:
            if n not in is_open:
                is_open[n] = True
                ways.append((n, iter(after[n])))
                break
            if is_open[n]:
                jumps_back.add((i, n))
        else:
            is_open[i] = False
            order.append(i)
            ways.pop()
    return order, jumps_back


def _bodies(after: list[list[int]], jumps_back: Iterable[tuple[int, int]]) -> dict[int, set[int]]:
    """By its head, what a loop consists of: all from which a jump back is reached without the head."""
    before: list[list[int]] = [[] for _ in after]
    for i, following in enumerate(after):
        for n in following:
            before[n].append(i)
    bodies: dict[int, set[int]] = {}
    for i, head in jumps_back:
        body, waiting = bodies.setdefault(head, {head}), [i]
        while waiting:
            if (n := waiting.pop()) not in body:
                body.add(n)
                waiting += before[n]
    return bodies


def _best_pass(
    after: list[list[int]],
    inside: list[int],
    jumps_back: set[tuple[int, int]],
    head: int,
    value: Callable[[int], tuple[int, int]],
) -> list[int]:
    """The pass with the largest sum of values. A loop inside the loop is passed once."""
    best: dict[int, tuple[tuple[int, int], int | None]] = {}
    for i in inside:
        ends = [((0, 0), None)] if (i, head) in jumps_back else []
        ways = ends + [(best[n][0], n) for n in after[i] if n in best and (i, n) not in jumps_back]
        if ways:
            (first, second), following = max(ways, key=lambda way: way[0])
            best[i] = (first + value(i)[0], second + value(i)[1]), following
    path = [head]
    while (following := best[path[-1]][1]) is not None:
        path.append(following)
    return path
