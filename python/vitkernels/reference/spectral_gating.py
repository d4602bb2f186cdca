"""The definition of spectral gating, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["spectral_gating"]


def spectral_gating(x: Tensor, weight: Tensor) -> Tensor:
    """Same arguments, shapes and results as :func:`vitkernels.spectral_gating`."""
    if x.numel() == 0:
        return x * weight[0, 0, :, 0].to(x.dtype)  # transforms of no map are an error
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32  # transforms take no other
    spectrum = torch.fft.rfft2(x.to(dtype), dim=(1, 2), norm="ortho")  # [B, H, W // 2 + 1, C]
    gated = spectrum * torch.view_as_complex(weight.to(dtype).contiguous())  # [B, H, W // 2 + 1, C]
    out: Tensor = torch.fft.irfft2(gated, s=x.shape[1:3], dim=(1, 2), norm="ortho")  # [B, H, W, C]
    return out.to(x.dtype)
