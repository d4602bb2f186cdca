"""Where the kernels exist: decided once, read in every forward."""

from __future__ import annotations

import torch
from torch import nn

from vitkernels._library import backends

__all__ = ["KERNEL_DTYPES", "conditions"]

_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

#: Device type -> dtypes that have kernels; a device without a loaded library is absent.
KERNEL_DTYPES = {device: _DTYPES[device] for device, state in backends().items() if state == "loaded"}


def conditions(module: nn.Module, dropout: float) -> list[str]:
    """When a replaced ``module`` will compute as before: what its Report entry says."""
    found = []
    device = next((p.device.type for p in module.parameters()), "cpu")
    if device not in KERNEL_DTYPES:
        found.append(f"stock path on {device}: {backends().get(device, 'no kernels for it')}")
    if dropout > 0.0:
        found.append(f"stock path in training: attention dropout {dropout:g}")
    return found
