"""What this installation computes with: the text of ``python -m vitkernels info``."""

from __future__ import annotations

import os

import torch

import vitkernels
from vitkernels import _library

__all__ = ["describe"]


def describe() -> str:
    """Versions, the library's path, instruction sets, backends and threads, one a line."""
    override = os.environ.get("VITKERNELS_ISA")
    used = _library.isa() + (f" (VITKERNELS_ISA={override})" if override else "")
    rows = {
        "vitkernels": vitkernels.__version__,
        "torch": torch.__version__,
        "library": str(_library.cpu_library_path()),
        "built for": ", ".join(_library.isas_built()),
        "this CPU has": ", ".join(_library.isas_supported()),
        "used": used,
        "threads": str(torch.get_num_threads()),
        **{p.stem: f"{p} ({_library.cuda_architectures(p)})" for p in _library.cuda_library_paths()},
        **{f"backend {device}": state for device, state in _library.backends().items()},
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
