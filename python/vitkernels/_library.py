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
_CPU_VARIABLE, _CUDA_VARIABLE = "VITKERNELS_LIBRARY", "VITKERNELS_CUDA_LIBRARY"
_TAKES = {_CPU_VARIABLE: _CPU_LIBRARY, _CUDA_VARIABLE: "libvitkernels_cuda<major>.so"}


def _check_torch() -> None:
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < MINIMUM_TORCH:
        needed = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(f"vitkernels needs torch >= {needed}, found {torch.__version__}: pip install -U torch")


def cpu_library_path() -> Path:
    """Where the CPU library lies; ``VITKERNELS_LIBRARY`` names another build (sanitizers)."""
    override = os.environ.get(_CPU_VARIABLE)
    if override:
        return Path(override).absolute()
    # An editable install keeps compiled files apart from the sources: only the package's loader knows where.
    return Path(str(resources.files("vitkernels") / _CPU_LIBRARY))


def _refusal(variable: str, path: Path, why: str) -> ImportError:
    """Blames whoever chose the library: the environment, or the installation."""
    if value := os.environ.get(variable):
        return ImportError(f"vitkernels: {variable} is {value!r}, takes the path of a {_TAKES[variable]}: {why}")
    return ImportError(f"vitkernels: {path}: {why}; reinstall the package")


def _why_no_file(path: Path) -> str | None:
    if path.is_file():
        return None
    return "this is no file" if path.exists() else "there is no such file"


def _load_operators(path: Path) -> str | None:
    """Load a library; returns the reason where that fails."""
    if why := _why_no_file(path):
        return why
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return str(error.__cause__ or error)
    return None


def _load() -> ctypes.CDLL:
    _check_torch()
    path = cpu_library_path()
    if why := _load_operators(path):
        raise _refusal(_CPU_VARIABLE, path, why)
    library = ctypes.CDLL(str(path))
    for name in ("vitkernels_isa", "vitkernels_isas_built", "vitkernels_isas_supported"):
        if not hasattr(library, name):
            raise _refusal(_CPU_VARIABLE, path, f"this one has no {name}")
        getattr(library, name).restype = ctypes.c_char_p
    return library


_cpu = _load()


def cuda_library_paths() -> list[Path]:
    """The CUDA libraries beside the CPU library, one for each major version of CUDA.

    ``VITKERNELS_CUDA_LIBRARY`` names one elsewhere: the stable ABI lets it come from another build.
    """
    override = os.environ.get(_CUDA_VARIABLE)
    if override:
        return [Path(override).absolute()]
    return sorted(cpu_library_path().parent.glob("libvitkernels_cuda[0-9]*.so"))


def cuda_architectures(path: Path) -> str:
    """What a CUDA library holds code for, as in ``sm_80, compute_80 (PTX)``; the library need not be loaded."""
    found = re.search(rb"vitkernels_cuda_architectures=([^;]*);", path.read_bytes() if path.is_file() else b"")
    names = [name.split("-") for name in found[1].decode().split()] if found else []
    return ", ".join(f"sm_{number}" if kind == "real" else f"compute_{number} (PTX)" for number, kind in names)


def _check_cuda_override() -> None:
    """Refuse a ``VITKERNELS_CUDA_LIBRARY`` that no torch could load."""
    if not os.environ.get(_CUDA_VARIABLE):
        return
    (path,) = cuda_library_paths()
    why = _why_no_file(path)
    if why is None and not re.fullmatch(r"libvitkernels_cuda\d+\.so", path.name):
        why = "this is named otherwise"
    elif why is None and not cuda_architectures(path):
        why = "this one names no GPU architectures"
    if why:
        raise _refusal(_CUDA_VARIABLE, path, why)


def _load_cuda() -> str:
    """Load the library for torch's CUDA; returns ``"loaded"`` or the reason why not."""
    _check_cuda_override()
    paths = cuda_library_paths()
    if not paths:
        return "this build has no CUDA library"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    major = torch.version.cuda.split(".")[0]
    path = next((p for p in paths if p.name == f"libvitkernels_cuda{major}.so"), None)
    if path is None:
        return f"torch has CUDA {torch.version.cuda}, this build has {', '.join(p.name for p in paths)}"
    why = _load_operators(path)
    if why and os.environ.get(_CUDA_VARIABLE):
        raise _refusal(_CUDA_VARIABLE, path, why)
    return why or "loaded"


_cuda = _load_cuda()


def isa() -> str:
    """The instruction set in use: the best one supported, or what ``VITKERNELS_ISA`` names.

    Raises:
        RuntimeError: as every operator does, if that is none which this CPU can run.
    """
    name = str(_cpu.vitkernels_isa().decode())
    if name == "none":
        wanted, taken = os.environ.get("VITKERNELS_ISA"), " ".join(isas_supported())
        raise RuntimeError(f"vitkernels: VITKERNELS_ISA is '{wanted}', this CPU takes {taken}")
    return name


#: Whether kernels in use multiply bfloat16 as such, and do not make it float32 first.
multiplies_bfloat16 = bytes(_cpu.vitkernels_isa()) in (b"avx512_bf16", b"amx_bf16")


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
