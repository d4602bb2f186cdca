"""The machine and the build that a measurement belongs to."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import TOLERANCE
from benchmarks.floor import matmul_rates
from benchmarks.ours import about

__all__ = ["describe", "gpu_state", "line", "warnings"]

_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    for text in path.read_text().splitlines() if path.exists() else []:
        name, _, value = text.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _cpu() -> str:
    """The name, and what tells apart the CPUs that have the same one."""
    numbers = [f"{field} {_cpuinfo(name)}" for field, name in (("family", "cpu family"), ("model", "model"))]
    name = _cpuinfo("model name")
    return f"{name}, {', '.join(numbers)}" if name else platform.processor()


def _git(*arguments: str) -> str | None:
    here = Path(__file__).parent
    try:
        run = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def _matmul_gflops(device: torch.device) -> dict[str, float]:
    return {name: round(rate, 1) for dtype in _dtypes(device) for name, rate in matmul_rates(dtype, device).items()}


def _dtypes(device: torch.device) -> list[str]:
    return [dtype for dtype in TOLERANCE if dtype != "tf32" or device.type == "cuda"]


_STATE = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw", "power.limit")


def gpu_state() -> dict[str, str] | None:
    """Clocks, temperature and power of the first GPU at this moment, as the driver's tool prints them."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu=driver_version,{','.join(_STATE)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(("driver", *_STATE), (text.strip() for text in found.split(",")), strict=False))


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cache_mb": round(properties.L2_cache_size / 1e6, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "before": gpu_state(),
        }
    }


def describe(device: torch.device) -> dict[str, Any]:
    """Everything that a reader needs to judge the figures; goes into the JSON file."""
    flags = set(_cpuinfo("flags").split())
    status = _git("status", "--porcelain")
    return {
        "cpu": _cpu(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "affinity": os.environ.get("GOMP_CPU_AFFINITY"),
        "device": str(device) if device.type == "cpu" else torch.get_device_module(device).get_device_name(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **about(),
        "matmul_gflops": _matmul_gflops(device),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **(_gpu(device) if device.type == "cuda" else {}),
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


def warnings(machine: dict[str, Any]) -> list[str]:
    """What makes the figures of this machine mislead."""
    found = []
    if machine["device"] == "cpu" and not machine["affinity"]:
        found.append("GOMP_CPU_AFFINITY is not set: threads may share a core, and times may jump.")
    slow = [f"{share:.0%} ({dtype})" for dtype, share in _torch_mm_shares(machine).items() if share < 0.8]
    if slow:
        found.append(
            f"torch.mm reaches {', '.join(slow)} of the best matmul rate measured here. Peers built on it "
            "(SDPA, eager) suffer, and the speed-ups over them are larger than on other CPUs."
        )
    return found


def _torch_mm_shares(machine: dict[str, Any]) -> dict[str, float]:
    """For each dtype, the rate of ``torch.mm`` relative to the best way to multiply such values."""
    shares = {}
    for dtype in (d for d in TOLERANCE if f"torch.mm {d}" in machine["matmul_gflops"]):
        rates = {n: r for n, r in machine["matmul_gflops"].items() if n.endswith((f" {dtype}", " float32"))}
        shares[dtype] = rates[f"torch.mm {dtype}"] / max(rates.values())
    return shares
