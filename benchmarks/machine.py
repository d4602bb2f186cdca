"""The machine and the build that a measurement belongs to."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import vitkernels
from vitkernels import _library

__all__ = ["describe", "line"]

_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    for text in path.read_text().splitlines() if path.exists() else []:
        name, _, value = text.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _git(*arguments: str) -> str | None:
    here = Path(__file__).parent
    try:
        run = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def describe(device: torch.device) -> dict[str, Any]:
    """Everything that a reader needs to judge the figures; goes into the JSON file."""
    flags = set(_cpuinfo("flags").split())
    status = _git("status", "--porcelain")
    return {
        "cpu": _cpuinfo("model name") or platform.processor(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "affinity": os.environ.get("GOMP_CPU_AFFINITY"),
        "device": str(device)
        if device.type == "cpu"
        else torch.get_device_module(device).get_device_name(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vitkernels": vitkernels.__version__,
        "isa": _library.isa(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def line(machine: dict[str, Any]) -> str:
    """The same in one line, for people."""
    commit = (machine["commit"] or "no commit")[:10] + (" (modified)" if machine["dirty"] else "")
    place = "" if machine["device"] == "cpu" else f", {machine['device']}"
    return (
        f"{machine['cpu']} ({' '.join(machine['flags'])}), {machine['cores']} cores, "
        f"{machine['threads']} threads{place}; torch {machine['torch']}, vitkernels {machine['vitkernels']} "
        f"[{machine['isa']}], {commit}, {machine['date']}"
    )
