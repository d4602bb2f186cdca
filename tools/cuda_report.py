"""Registers, spills and shared memory of every kernel in a built CUDA library: what ``make cuda-report`` prints.

The library contains its kernels as PTX; ptxas compiles that again for each architecture and reports what it used. (The
machine code in the library does not tell: cuobjdump shows no spills.) The exit status is 1 if a forward kernel spills,
if a kernel has more instantiations than three dtypes and four head dimensions need, or if the attention kernels of one
direction have more than their budget.

    python3 tools/cuda_report.py build/Release/libvitkernels_cuda13.so --markdown docs/cuda_report.md
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = ("80", "90")
MAX_INSTANTIATIONS = 12  # of a kernel: {float16, bfloat16, float32} x {32, 64, 128, 256}
MAX_ATTENTION = 48  # of all attention kernels of a direction that are compiled for each head dimension

# The layout of a fat binary: a header, then entries of which each has a header of its own.
_FAT_MAGIC, _FAT_HEADER = 0xBA55ED50, struct.Struct("<IHHQ")
_ENTRY, _PTX = struct.Struct("<HHIQIIHHI"), 1

# By the last part of the name in C++.
_ELEMENTS = {
    "half_t": "float16", "bfloat16_t": "bfloat16", "tfloat32_t": "tf32", "Float16": "float16", "BFloat16": "bfloat16",
    "float": "float32", "double": "float64",
}  # fmt: skip


_HEAD = """# CUDA kernels

What each kernel needs, as the compiler says; `make cuda-report` writes this page. Shared memory is what a launch has,
static and dynamic, and threads those of a block, as the emulator saw them. No kernel may have more than 99 KB.
"""


@dataclass(frozen=True)
class Kernel:
    """One instantiation, compiled for one architecture."""

    name: str
    arguments: str
    """The template's arguments, as in ``bfloat16, 64``."""
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    """Static, in bytes; the dynamic part of a launch is not in the library."""

    @property
    def spills(self) -> bool:
        return self.spill_stores + self.spill_loads > 0

    @property
    def family(self) -> str:
        """The kernel of which this is an instantiation by dtype and head dimension."""
        dtypes = "|".join(_ELEMENTS.values())
        return re.sub(rf"\b({dtypes})\b", "*", re.sub(r"\b(32|64|128|256)\b", "*", str(self), count=1))

    @property
    def is_attention(self) -> bool:
        """Whether compiled for each head dimension: that costs compile time and library size, and has a budget."""
        return self.name.startswith("attention") and re.search(r"\b(32|64|128|256)\b", self.arguments) is not None

    @property
    def is_forward(self) -> bool:
        return "backward" not in self.name and "grad" not in self.name

    def __str__(self) -> str:
        return f"{self.name}<{self.arguments}>" if self.arguments else self.name


def ptx_images(library: bytes) -> Iterator[bytes]:
    """The PTX texts in the fat binaries of a library that was built without compression."""
    magic, at = struct.pack("<I", _FAT_MAGIC), -1
    while (at := library.find(magic, at + 1)) >= 0:
        _, _, header, size = _FAT_HEADER.unpack_from(library, at)
        entry, end = at + header, at + header + size
        while entry < min(end, len(library) - _ENTRY.size):
            kind, _, header, size = _ENTRY.unpack_from(library, entry)[:4]
            text = library[entry + header : entry + header + size].partition(b"\0")[0]
            if kind == _PTX and b".version" not in text:
                raise SystemExit(
                    "the PTX in this library is compressed: build without VITKERNELS_CUDA_ARCHITECTURES=all"
                )
            if kind == _PTX and b".entry" in text:
                yield text
            entry += header + size


def short_name(demangled: str) -> tuple[str, str]:
    """The kernel, and its template's arguments with dtypes as PyTorch calls them."""
    found = re.search(r"([A-Za-z_]\w*)(?:<(.*)>)?\(", demangled.replace("(anonymous namespace)::", ""))
    assert found is not None, demangled
    words = re.sub(r"\([\w: ]+\)", "", found[2] or "")  # the type of a constant
    last_parts = re.sub(r"[\w:]+", lambda word: word[0].rpartition("::")[2], words)
    return found[1], re.sub(r"\w+", lambda word: _ELEMENTS.get(word[0], word[0]), last_parts).replace(" >", ">").strip()


def demangle(names: Iterable[str]) -> list[str]:
    program = shutil.which("cu++filt") or shutil.which("c++filt") or "c++filt"
    ran = subprocess.run([program], input="\n".join(names), check=True, capture_output=True, text=True)
    return ran.stdout.splitlines()


_PARTS = {
    "stack": r"(\d+) bytes stack frame",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
    "registers": r"Used (\d+) registers",
    "shared": r"(\d+) bytes smem",
}


def parse(text: str) -> list[Kernel]:
    """The kernels that ``ptxas -v`` printed about."""
    sections = re.split(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", text)[1:]
    triples = list(zip(sections[::3], sections[1::3], sections[2::3], strict=True))
    kernels = []
    for (_, architecture, body), demangled in zip(triples, demangle(t[0] for t in triples), strict=True):
        # A function that a kernel calls has properties of its own, listed after the kernel's.
        values = {name: sum(map(int, re.findall(pattern, body))) for name, pattern in _PARTS.items()}
        name, arguments = short_name(demangled)
        kernels.append(Kernel(name, arguments, architecture, **values))
    return kernels


def ptxas() -> str | None:
    """Next to the compiler that built the library, or on the path."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc:
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
        if top and (path := Path(top[1]) / "bin" / "ptxas").exists():
            return str(path)
    return shutil.which("ptxas")


def compile_verbosely(program: str, image: bytes, architecture: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(image)
        file.flush()
        command = [program, "-v", f"-arch=sm_{architecture}", file.name, "-o", os.devnull]
        ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)}\n{ran.stderr}")
    return ran.stderr + ran.stdout


def measure(program: str, library: Path, architectures: Iterable[str] = ARCHITECTURES) -> list[Kernel]:
    """Every kernel of the library for every architecture, in an order that does not depend on the build."""
    images = list(ptx_images(library.read_bytes()))
    jobs = [(program, image, architecture) for image in images for architecture in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = [kernel for text in pool.map(lambda job: compile_verbosely(*job), jobs) for kernel in parse(text)]

    def order(kernel: Kernel) -> tuple[object, ...]:
        numbers = [part.rjust(8) if part.isdigit() else part for part in re.split(r"(\d+)", kernel.arguments)]
        return kernel.name, numbers, int(re.sub(r"\D", "", kernel.architecture))

    return sorted(kernels, key=order)


def faults(kernels: list[Kernel]) -> list[str]:
    """Violations: spills of forward kernels, and instantiations beyond the limits."""
    found = [f"{k} spills on sm_{k.architecture}" for k in kernels if k.is_forward and k.spills]
    counts = Counter((k.family, k.architecture) for k in kernels)
    for (family, architecture), count in counts.items():
        if family.startswith("attention") and count > MAX_INSTANTIATIONS:
            found.append(f"{family} has {count} instantiations on sm_{architecture}, takes {MAX_INSTANTIATIONS}")
    for (direction, arch), count in attention_counts(kernels).items():
        if count > MAX_ATTENTION:
            found.append(f"{direction} attention has {count} instantiations on sm_{arch}, takes {MAX_ATTENTION}")
    return found


def attention_counts(kernels: list[Kernel]) -> Counter[tuple[str, str]]:
    """The number of kernels by direction and architecture, over all families."""
    return Counter(("forward" if k.is_forward else "backward", k.architecture) for k in kernels if k.is_attention)


def summary(kernels: list[Kernel]) -> list[str]:
    """The most demanding of each direction, and how many there are."""
    lines = []
    for label, chosen in (
        ("forward", [k for k in kernels if k.is_forward]),
        ("backward", [k for k in kernels if not k.is_forward]),
    ):
        if chosen:
            worst = max(chosen, key=lambda k: (k.spill_stores + k.spill_loads, k.registers))
            spills = f"{worst.spill_stores + worst.spill_loads} bytes of spills" if worst.spills else "no spills"
            lines.append(f"Most demanding {label} kernel: `{worst}` on sm_{worst.architecture}, "
                         f"{worst.registers} registers, {spills}.")  # fmt: skip
    counts = Counter(k.family for k in kernels if k.architecture == kernels[0].architecture)
    listed = ", ".join(f"`{family}` {count}" for family, count in counts.items())
    lines.append(f"Instantiations (of an attention kernel at most {MAX_INSTANTIATIONS}): {listed}.")
    totals = attention_counts([k for k in kernels if k.architecture == kernels[0].architecture])
    budget = ", ".join(f"{direction} {count} of {MAX_ATTENTION}" for (direction, _), count in totals.items())
    lines.append(f"Attention kernels compiled for each head dimension, all families together: {budget}.")
    return lines


def table(kernels: list[Kernel], launches: dict[str, list[int]]) -> list[list[str]]:
    """A row for each instantiation: by architecture registers and spills, then shared memory and threads."""
    architectures = list(dict.fromkeys(k.architecture for k in kernels))
    spilled = "spilled (stores + loads), bytes"
    header = ["kernel", *(f"registers sm_{a}" for a in architectures), *(f"{spilled}, sm_{a}" for a in architectures)]
    rows = [[*header, "stack, bytes", "shared memory, bytes", "threads"]]
    by_kernel: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        by_kernel.setdefault(str(kernel), {})[kernel.architecture] = kernel
    for name, compiled in by_kernel.items():
        found = [compiled[a] for a in architectures]
        static = max(k.shared for k in found)
        shared, threads = launches.get(name, (None, None))
        rows.append([
            f"`{name}`", *(str(k.registers) for k in found),
            *(f"{k.spill_stores} + {k.spill_loads}" if k.spills else "0" for k in found),
            str(max(k.stack for k in found)),
            f"{static} + unknown" if shared is None else str(shared), "unknown" if threads is None else str(threads),
        ])  # fmt: skip
    return rows


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 if there are violations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, metavar="80")
    parser.add_argument(
        "--launches", type=Path, help="JSON of tests/support/launches.py: shared memory and threads by kernel"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write a page")
    arguments = parser.parse_args(argv)
    program = ptxas()
    if program is None:
        parser.error("no ptxas was found: set CUDACXX to nvcc's path")
    launches = json.loads(arguments.launches.read_text()) if arguments.launches else {}
    kernels = measure(program, arguments.library, arguments.architectures)
    if not kernels:
        parser.error(f"{arguments.library} holds no kernels")
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.splitlines()[-2]
    text = markdown(table(kernels, launches))
    lines = [f"ptxas: {version}", *summary(kernels)]
    print("\n".join([text, "", *lines, *(f"FAULT: {fault}" for fault in faults(kernels))]))
    if arguments.markdown:
        page = [_HEAD, "\n".join(f"- {line}" for line in lines), "", text, ""]
        arguments.markdown.write_text("\n".join(page))
    return int(bool(faults(kernels)))


if __name__ == "__main__":
    sys.exit(main())
