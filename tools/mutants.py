"""Puts faults into kernels, one at a time: tests must find each of them.

    python -m tools.mutants [--all] [NAME ...]

A fault is built into the library in the build folder, or the emulator's; the short tests that should find it run until
the first failure (with ``--all`` also the rows of ``make test-all``); then the file is restored. The exit status
is 1 if a fault survived. Nothing else may build or test while it runs.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "Release"
GATES, EMULATED = "tests/gates", "tests/cuda/test_emulator_gates.py"


@dataclass(frozen=True)
class Mutant:
    """One edit of one file, and the tests that must fail: pytest's arguments that select them."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def is_cuda(self) -> bool:
        return "/cuda/" in self.file


MUTANTS = (
    Mutant(
        "stale keys: a tile counts as packed for the next one, too", "csrc/attention/cpu/forward.cpp",
        "packed_head == kv_head && packed_tile == tile", "packed_head == kv_head",
        (f"{GATES}/test_reference.py", "-k", "attention-"),
    ),
    Mutant(
        "wrong sign of an lse's gradient", "csrc/attention/cpu/spatial_backward.cpp",
        "deltas[row] -= static_cast", "deltas[row] += static_cast", (f"{GATES}/test_gradcheck.py", "-k", "spatial"),
    ),
    Mutant(
        "partial sums not cleared", "csrc/attention/cpu/spatial_backward.cpp",
        "(tokens.shared.end - tokens.shared.begin) * sums.width, T(0)", "0, T(0)",
        (f"{GATES}/test_layout.py", "-k", "uninitialised and spatial"),
    ),
    Mutant(
        "missing mask: probabilities beyond what a query sees", "csrc/attention/cpu/transposed.cpp",
        "clear_outside<T>(prob, visible, round_up(width, kWidth<T>));", "",
        (f"{GATES}/test_reference.py", "-k", "transposed"),
    ),
    Mutant(
        "a part without keys has a share", "csrc/attention/cpu/merge_attentions.cpp",
        "lse_of(part) == kMinusInfinity<T> ? T(0) : std::exp", "std::exp",
        (f"{GATES}/test_reference.py", "-k", "merge"),
    ),
    Mutant(
        "bias of another column", "csrc/monarch/cpu/multiply.cpp",
        "epilogue(v, first_column + c, n)", "epilogue(v, column + c, n)",
        (f"{GATES}/test_reference.py", "-k", "butterfly"),
    ),
    Mutant(
        "stale padding of operands", "csrc/monarch/cpu/monarch_tile.h",
        "j < blocks && count < width", "j < 0",
        (f"{GATES}/test_layout.py", "-k", "uninitialised and butterfly"),
    ),
    Mutant(
        "only the last rows' products are in a weight's gradient", "csrc/monarch/cpu/grad_weight.cpp",
        "p.second.inputs, rows, row == 0,", "p.second.inputs, rows, true,",
        (f"{GATES}/test_reference.py", "-k", "butterfly"),
    ),
    Mutant(
        "stale tails of the intermediate on a GPU", "csrc/monarch/cuda/multiply.cu",
        "if (p.is_inner_shared) clear_tails();", "", (EMULATED, "-k", "test_layout_gate and butterfly"),
    ),
    Mutant(
        "stale spectrum: that of other channels' filters", "csrc/monarch/cpu/long_conv_task.h",
        "if (group == task / p.shares) return;", "if (group >= 0) return;",
        (f"{GATES}/test_reference.py", "-k", "long_conv"),
    ),
    Mutant(
        "wrong weight of a transform's points", "csrc/monarch/op/long_conv_cpu.cpp",
        "j * (4 * k + 1)", "j * 4 * k", (f"{GATES}/test_long_conv.py",),
    ),
    Mutant(
        "wrong twiddles of a stage", "csrc/monarch/op/spectral_gating_cpu.cpp",
        "j * k * (plan.length / n) * 4", "j * (plan.length / n) * 4", (f"{GATES}/test_spectral_gating.py",),
    ),
    Mutant(
        "a frequency that stands for two counts once", "csrc/monarch/cpu/spectral_gating_grad.cpp",
        "one : 2 * one", "one : one", (f"{GATES}/test_reference.py", "-k", "spectral_gating"),
    ),
    Mutant(
        "stale weight: that of other channels", "csrc/monarch/cpu/spectral_gating_task.h",
        "if (group == task / p.shares) return;", "if (group >= 0) return;",
        (f"{GATES}/test_reference.py", "-k", "spectral_gating"),
    ),
    Mutant(
        "no twiddles on the way back on a GPU", "csrc/monarch/cuda/spectral_lines.h",
        "    if (j > 0) rotate<true>(roots, j * stage.root_step);\n", "",
        ("tests/cuda/test_emulator_spectral_gating.py", "-k", "test_sizes and 28-15"),
    ),
    Mutant(
        "only the last map's products are in a gradient on a GPU", "csrc/monarch/cuda/spectral_gating.cu",
        "if (!is_first) ", "if (false) ", ("tests/cuda/test_emulator_spectral_gating.py", "-k", "several_maps"),
    ),
    Mutant(
        "dropped barrier", "csrc/attention/cuda/sum_parts.cu", "  __syncthreads();\n", "",
        (EMULATED, "-k", "test_reference_gate"),
    ),
    Mutant(
        "skipped partial sum", "csrc/attention/cuda/sum_parts.cu",
        "part < parts.count; part += lanes", "part < parts.count - 1; part += lanes",
        (EMULATED, "-k", "test_reference_gate"),
    ),
    Mutant(
        "wrong stride of the splits' sums", "csrc/attention/cuda/merge_attentions.cu",
        "sums[part * rows + row]", "sums[row]", (EMULATED, "-k", "test_reference_gate and (few or tokens)"),
    ),
    Mutant(
        "shifted index of a row", "csrc/attention/cuda/backward_rows.cu",
        "row = (b * s.queries + q) * s.heads + h;", "row = (b * s.queries + q) * s.heads + (h + 1) % s.heads;",
        (EMULATED, "-k", "test_reference_gate"),
    ),
    Mutant(
        "a key beyond the edge of the grid", "csrc/attention/cuda/rel_pos.cu",
        "return coordinate < size ? coordinate : -1;", "return coordinate <= size ? coordinate : -1;",
        (EMULATED, "-k", "rel-pos or all-terms-on-grid"),
    ),
    Mutant(
        "an element of the intermediate with another block", "csrc/monarch/cuda/tiles.h",
        "of_group = column - depth * p.group;", "of_group = (column + 1 - depth * p.group) % p.group;",
        (EMULATED, "-k", "test_reference_gate and blockdiag"),
    ),
    Mutant(
        "outputs before all have been staged", "csrc/monarch/cuda/multiply.cu",
        "      __syncthreads();\n      store_rows", "      store_rows",
        ("tests/cuda/test_emulator_monarch.py", "-k", "test_shapes and vectors"),
    ),
    Mutant(
        "a gradient's points before the signal's have been read", "csrc/monarch/cuda/long_conv_grad.cu",
        "      __syncthreads();  // all have read what the gradient takes the place of\n", "",
        ("tests/cuda/test_emulator_long_conv.py", "-k", "test_lengths"),
    ),
    Mutant(
        "a share of the batch is not in the filter's gradient", "csrc/monarch/cuda/long_conv_grad.cu",
        "share < p.shares; ++share", "share < p.shares - (p.shares > 1); ++share",
        ("tests/cuda/test_emulator_long_conv.py", "-k", "test_batches"),
    ),
)  # fmt: skip


@contextmanager
def mutated(mutant: Mutant) -> Iterator[None]:
    path = ROOT / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.file} has {text.count(mutant.old)} x {mutant.old!r}, takes 1")
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        yield
    finally:
        path.write_text(text)


def build(target: str) -> None:
    ran = subprocess.run(["cmake", "--build", str(BUILD), "--target", target], capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(ran.stdout + ran.stderr)


def failures(mutant: Mutant, with_all: bool) -> list[str]:
    """The tests that failed: one, or one for each process."""
    options = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "-n", str(os.cpu_count()), "--dist", "worksteal"]
    if with_all:
        options += ["-m", "not emulate_all"]
    # Not the library that is installed.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VITKERNELS_LIBRARY": str(BUILD / "libvitkernels_cpu.so")}
    command = [sys.executable, "-m", "pytest", *options, *mutant.tests]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if ran.returncode not in (0, 1, 2):  # 2: stopped after a failure
        raise SystemExit(ran.stdout + ran.stderr)
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.MULTILINE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a mutant's name; default: all")
    parser.add_argument("--all", action="store_true", help="the rows of make test-all, too")
    arguments = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if not arguments.names or any(n in m.name for n in arguments.names)]
    survivors = 0
    for mutant in chosen:
        start = time.monotonic()
        target = "emulator" if mutant.is_cuda else "vitkernels_cpu"
        with mutated(mutant):
            build(target)
            found = failures(mutant, arguments.all)
        build(target)
        survivors += not found
        place = f"{Path(mutant.file).relative_to('csrc')}: {mutant.name}"
        print(f"{place}\n    {found[0] if found else 'SURVIVED'}, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} found")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
