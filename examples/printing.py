"""What the examples print."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import vitkernels as vk

__all__ = ["machine", "mebibytes", "table"]


def machine(threads: int, libraries: Sequence[str]) -> str:
    """The CPU, the threads and the versions of what is measured."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    packages = ", ".join(f"{name} {version(name)}" for name in libraries)
    return f"{cpu}, {threads} thread{'s' * (threads > 1)}, vitkernels {vk.__version__}, {packages}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they need, aligned to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines)


def mebibytes(value: int | None) -> str:
    """Bytes as MiB, ``None`` as what is not known."""
    return "?" if value is None else f"{value / 2**20:.1f}"
