"""Registers, spills, shared memory and main loops of every kernel in a built CUDA library: ``make cuda-report``.

The library contains its kernels as PTX; ptxas compiles that again for each architecture and reports what it used. (The
machine code in the library does not tell: cuobjdump shows no spills.) nvdisasm prints the loops of what ptxas made for
sm_90. The exit status is 1 if a forward kernel spills or has a stack, if a kernel has more instantiations than three
dtypes and four head dimensions need, or if the attention kernels of one direction have more than their budget.

    python3 -m tools.cuda_report build/Release/libvitkernels_cuda13.so --markdown docs/cuda_report.md
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tools import pipe_model, sass

ARCHITECTURES = ("80", "90")
LOOP_ARCHITECTURE = "90"  # which the model of pipe_model.py is of
MAX_INSTANTIATIONS = 12  # of a kernel: {float16, bfloat16, float32} x {32, 64, 128, 256}
MAX_ATTENTION = 48  # of all attention kernels of a direction, by dtype and head dimension

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

_LOOPS = """## Loops with matrix instructions

What a warp issues in one pass, counted in the machine code for sm_90. The pass has all products, loads of fragments
(LDSM), exponentials, 16-byte copies and barriers, but jumps over everything else that it can, about as a call without
optional arguments does, and over blocks that are marked as rare. The longest pass jumps over the latter only; no call
needs all of it. A loop inside a loop counts as passed once, and has a row of its own. Scores are counted by their
exponentials; local memory is what spills and arrays load and store.

TF/s are those of the matrix instructions on an H100, inferred by a model (tools/pipe_model.py has its rates and their
sources): serial for products and softmax one after the other, max for perfect overlap. Nothing of it is measured.
FlashAttention-2, the yardstick, is counted likewise, in the code that the same compiler makes of it; its TF/s come from
the same model.
"""
_WITHOUT_LOOPS = "Left out, for want of nvdisasm: `pip install nvidia-cuda-nvdisasm`."


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
    loops: tuple[sass.Loop, ...] = field(default=(), repr=False)
    """Those that hold matrix instructions, if they were looked for."""
    opcodes: tuple[str, ...] = field(default=(), repr=False)
    """All instructions, if they were looked for."""

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
        """Whether a kernel of a whole tile, most of them compiled for each head dimension: that costs compile time and
        library size, and has a budget."""
        of_tiles = re.search(r"\b(32|64|128|256)\b|Kernel<", self.arguments)
        return of_tiles is not None and re.search("(^|_)attention", self.name) is not None

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


def _needed(symbol: str) -> re.Pattern[str]:
    return sass.NEEDED_WITHOUT_SOFTMAX if re.search(r"\d(channel|decayed|linear|monarch)_", symbol) else sass.NEEDED


def parse(text: str, functions: Mapping[str, Sequence[sass.Instruction]] | None = None) -> list[Kernel]:
    """The kernels that ``ptxas -v`` printed about, with their code by mangled name."""
    sections = re.split(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", text)[1:]
    triples = list(zip(sections[::3], sections[1::3], sections[2::3], strict=True))
    kernels = []
    for (symbol, architecture, body), demangled in zip(triples, demangle(t[0] for t in triples), strict=True):
        # A function that a kernel calls has properties of its own, listed after the kernel's.
        values = {name: sum(map(int, re.findall(pattern, body))) for name, pattern in _PARTS.items()}
        name, arguments = short_name(demangled)
        code = (functions or {}).get(symbol, ())
        loops = tuple(sass.loops(code, _needed(symbol))) if code else ()
        opcodes = tuple(instruction.opcode for instruction in code)
        kernels.append(Kernel(name, arguments, architecture, **values, loops=loops, opcodes=opcodes))
    return kernels


@dataclass(frozen=True)
class Programs:
    """Next to the compiler that built the library, or on the path; nvdisasm also from a package."""

    ptxas: str
    nvdisasm: str | None

    @classmethod
    def find(cls) -> Programs | None:
        nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
        folder = None
        if nvcc:
            dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True)
            top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
            folder = Path(top[1]) / "bin" if top else None
        beside = folder / "ptxas" if folder else None
        ptxas = str(beside) if beside and beside.exists() else shutil.which("ptxas")
        return cls(ptxas, sass.nvdisasm(folder)) if ptxas else None

    def compile(self, image: bytes, architecture: str) -> list[Kernel]:
        """The kernels of a PTX image."""
        with tempfile.TemporaryDirectory() as folder:
            ptx, cubin = Path(folder) / "image.ptx", Path(folder) / "image.cubin"
            ptx.write_bytes(image)
            command = [self.ptxas, "-v", f"-arch=sm_{architecture}", str(ptx), "-o", str(cubin)]
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode:
                raise SystemExit(f"{' '.join(command)}\n{ran.stderr}")
            functions = {}
            if self.nvdisasm and architecture == LOOP_ARCHITECTURE:
                functions = sass.disassemble(self.nvdisasm, cubin)
        return parse(ran.stderr + ran.stdout, functions)


def measure(
    programs: Programs, library: Path, architectures: Iterable[str] = ARCHITECTURES, symbols: str = ""
) -> list[Kernel]:
    """Every kernel of the library for every architecture, in an order that does not depend on the build.

    ``symbols`` is a regular expression: images without a kernel whose mangled name it finds are left out.
    """
    wanted = re.compile(rb"\.entry \w*" + symbols.encode())
    images = [image for image in ptx_images(library.read_bytes()) if wanted.search(image)]
    jobs = [(image, architecture) for image in images for architecture in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = [kernel for found in pool.map(lambda job: programs.compile(*job), jobs) for kernel in found]

    def order(kernel: Kernel) -> tuple[object, ...]:
        numbers = [part.rjust(8) if part.isdigit() else part for part in re.split(r"(\d+)", kernel.arguments)]
        return kernel.name, numbers, int(re.sub(r"\D", "", kernel.architecture))

    return sorted(kernels, key=order)


#: Bytes that a forward kernel may spill, where its state and its pairs leave too few registers.
_MAY_SPILL = {"DecayedKernel<bfloat16, 64": 160, "DecayedKernel<bfloat16, 128": 256, "DecayedKernel<float32, 64": 64}


def _spills_too_much(kernel: Kernel) -> bool:
    limits = [limit for name, limit in _MAY_SPILL.items() if name in str(kernel)]
    return kernel.spill_stores + kernel.spill_loads > max(limits, default=0)


def faults(kernels: list[Kernel]) -> list[str]:
    """Violations: local memory in forward kernels, and instantiations beyond the limits."""
    found = [f"{k} spills on sm_{k.architecture}" for k in kernels if k.is_forward and _spills_too_much(k)]
    # An array that is not indexed by constants lies there, without a spill.
    stacks = [k for k in kernels if k.is_forward and k.stack and not k.spills]
    found += [f"{k} has {k.stack} bytes of stack on sm_{k.architecture}" for k in stacks]
    counts = Counter((k.family, k.architecture) for k in kernels)
    for (family, architecture), count in counts.items():
        if re.search("(^|_)attention", family) and count > MAX_INSTANTIATIONS:
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
    lines.append(f"Attention kernels by dtype and head dimension, all families together: {budget}.")
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


def loop_table(kernels: list[Kernel], launches: dict[str, list[int]]) -> list[list[str]]:
    """A row for each loop that holds matrix instructions, below the figures of FlashAttention-2."""
    rows = [[
        "loop", "instructions", "longest pass", "HMMA", "LDSM", "MUFU", "branches", "local memory",
        "instructions / HMMA", "instructions / score and thread", "LDSM / HMMA", "registers", "blocks an SM x warps",
        "TF/s, serial / max",
    ]]  # fmt: skip
    for name, (slots, by_score, ldsm, registers, blocks, rates) in pipe_model.FLASH_ATTENTION_2.items():
        rows.append([
            f"FlashAttention-2 {name}", *[""] * 7, str(slots), str(by_score), str(ldsm), str(registers),
            f"{blocks[0]} x {blocks[1]}", f"{rates[0]} / {rates[1]}",
        ])  # fmt: skip
    for kernel in kernels:
        shared, threads = launches.get(str(kernel), (0, 0))
        resident = pipe_model.blocks_per_sm(kernel.registers, shared, threads) if threads else 0
        for loop in kernel.loops:
            serial, at_most = pipe_model.teraflops(loop)
            rows.append([
                f"`{kernel}`", str(len(loop.opcodes)), str(loop.longest),
                *(str(loop.count(*opcodes)) for opcodes in (["HMMA"], ["LDSM"], ["MUFU"], ["BRA"], ["LDL", "STL"])),
                f"{loop.slots_per_hmma:.1f}",
                f"{len(loop.opcodes) / loop.scores:.1f}" if loop.scores else "", f"{loop.ldsm_per_hmma:.2f}",
                str(kernel.registers), f"{resident} x {threads // 32}" if threads else "unknown",
                f"{serial:.0f} / {at_most:.0f}",
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
    programs = Programs.find()
    if programs is None:
        parser.error("no ptxas was found: set CUDACXX to nvcc's path")
    launches = json.loads(arguments.launches.read_text()) if arguments.launches else {}
    kernels = measure(programs, arguments.library, arguments.architectures)
    if not kernels:
        parser.error(f"{arguments.library} holds no kernels")
    version = subprocess.run([programs.ptxas, "--version"], capture_output=True, text=True).stdout.splitlines()[-2]
    loops = markdown(loop_table(kernels, launches)) if programs.nvdisasm else _WITHOUT_LOOPS
    text = "\n".join([markdown(table(kernels, launches)), "", _LOOPS, loops])
    lines = [f"ptxas: {version}", *summary(kernels)]
    print("\n".join([text, "", *lines, *(f"FAULT: {fault}" for fault in faults(kernels))]))
    if arguments.markdown:
        page = [_HEAD, "\n".join(f"- {line}" for line in lines), "", text, ""]
        arguments.markdown.write_text("\n".join(page))
    return int(bool(faults(kernels)))


if __name__ == "__main__":
    sys.exit(main())
