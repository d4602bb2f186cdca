"""Finds and loads the operator libraries, and says why one is absent."""

from __future__ import annotations

import ctypes
import os
from importlib import resources
from pathlib import Path

import torch

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


def isa() -> str:
    """The instruction set in use: the best one supported, or what ``VITKERNELS_ISA`` names."""
    return str(_cpu.vitkernels_isa().decode())


def isas_built() -> list[str]:
    """The instruction sets that the library holds kernels for."""
    return str(_cpu.vitkernels_isas_built().decode()).split()


def isas_supported() -> list[str]:
    """Those of them that this CPU can run."""
    return str(_cpu.vitkernels_isas_supported().decode()).split()


def backends() -> dict[str, str]:
    """Each device type with ``"loaded"`` or the reason why its kernels are not."""
    return {"cpu": "loaded", "cuda": "this version has no CUDA kernels"}
