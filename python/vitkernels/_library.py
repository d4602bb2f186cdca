"""Finds and loads the operator libraries, and says why one is absent."""

from __future__ import annotations

import ctypes
import functools
import os
import re
from importlib import resources
from pathlib import Path

import torch

from vitkernels._torch_private import has_kernel

MINIMUM_TORCH = (2, 10)
_CPU_LIBRARY = "libvitkernels_cpu.so"


def _check_torch() -> None:
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < MINIMUM_TORCH:
        needed = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(f"vitkernels needs torch >= {needed}, found {torch.__version__}: pip install -U torch")


def cpu_library_path() -> Path:
    """Where the CPU library lies; ``VITKERNELS_LIBRARY`` names another build (sanitizers)."""
    override = os.environ.get("VITKERNELS_LIBRARY")
    if override:
        return Path(override)
    # An editable install keeps compiled files apart from the sources: only the package's loader knows where.
    return Path(str(resources.files("vitkernels") / _CPU_LIBRARY))


def _load() -> ctypes.CDLL:
    _check_torch()
    path = cpu_library_path()
    if not path.exists():
        raise ImportError(f"vitkernels: the CPU library is not at {path}; reinstall the package")
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    library = ctypes.CDLL(str(path))
    for name in ("vitkernels_isa", "vitkernels_isas_built", "vitkernels_isas_supported"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


_cpu = _load()


def cuda_library_paths() -> list[Path]:
    """The CUDA libraries beside the CPU library, one for each major version of CUDA.

    ``VITKERNELS_CUDA_LIBRARY`` names one elsewhere: the stable ABI lets it come from another build.
    """
    override = os.environ.get("VITKERNELS_CUDA_LIBRARY")
    if override:
        return [Path(override)]
    return sorted(cpu_library_path().parent.glob("libvitkernels_cuda[0-9]*.so"))


def cuda_architectures(path: Path) -> str:
    """What a CUDA library holds code for, as in ``sm_80, compute_80 (PTX)``; the library need not be loaded."""
    found = re.search(rb"vitkernels_cuda_architectures=([^;]*);", path.read_bytes() if path.exists() else b"")
    names = [name.split("-") for name in found[1].decode().split()] if found else []
    return ", ".join(f"sm_{number}" if kind == "real" else f"compute_{number} (PTX)" for number, kind in names)


def _load_cuda() -> str:
    """Load the library for torch's CUDA; returns ``"loaded"`` or the reason why not."""
    paths = cuda_library_paths()
    if not paths:
        return "this build has no CUDA library"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    major = torch.version.cuda.split(".")[0]
    path = next((p for p in paths if p.name == f"libvitkernels_cuda{major}.so"), None)
    if path is None:
        return f"torch has CUDA {torch.version.cuda}, this build has {', '.join(p.name for p in paths)}"
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return str(error.__cause__ or error)
    return "loaded"


_cuda = _load_cuda()


def isa() -> str:
    """The instruction set in use: the best one supported, or what ``VITKERNELS_ISA`` names."""
    return str(_cpu.vitkernels_isa().decode())


def isas_built() -> list[str]:
    """The instruction sets that the library holds kernels for."""
    return str(_cpu.vitkernels_isas_built().decode()).split()


def isas_supported() -> list[str]:
    """Those of them that this CPU can run."""
    return str(_cpu.vitkernels_isas_supported().decode()).split()


@functools.cache  # asked first before Python registers an error in the place of a kernel
def why_no_kernel(op: str, device: str) -> str | None:
    """The reason why ``vitkernels::op`` cannot run on ``device``, or ``None`` if a library has it."""
    state = backends().get(device, "no kernels for it")
    if state != "loaded":
        return state
    is_there = has_kernel(f"vitkernels::{op}", device.upper())
    return None if is_there else f"this version has no {device} kernels for {op}"


def backends() -> dict[str, str]:
    """Each device type with ``"loaded"`` or the reason why its kernels are not."""
    return {"cpu": "loaded", "cuda": _cuda}
