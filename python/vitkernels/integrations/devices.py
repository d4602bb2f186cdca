"""Where the kernels exist: decided once, read in every forward."""

from __future__ import annotations

import torch
from torch import nn

from vitkernels._library import why_no_kernel

__all__ = ["KERNEL_DTYPES", "conditions"]

_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


#: Operator -> device type -> dtypes that have kernels for whatever a module asks; a device without them is absent.
KERNEL_DTYPES = {
    operator: {device: dtypes for device, dtypes in _DTYPES.items() if why_no_kernel(operator, device) is None}
    for operator in ("attention", "channel_attention", "spatial_attention")
}


def conditions(module: nn.Module, dropout: float, operator: str = "attention") -> list[str]:
    """When a replaced ``module`` will compute as before: what its Report entry says."""
    found = []
    parameter = next(module.parameters(), None)
    device = "cpu" if parameter is None else parameter.device.type
    dtypes = KERNEL_DTYPES[operator]
    if device not in dtypes:
        found.append(f"stock path on {device}: {why_no_kernel(operator, device)}")
    elif parameter is not None and parameter.dtype not in dtypes[device]:
        found.append(f"stock path in {str(parameter.dtype).removeprefix('torch.')} on {device}: no kernels for it")
    if dropout > 0.0:
        found.append(f"stock path in training: attention dropout {dropout:g}")
    return found
