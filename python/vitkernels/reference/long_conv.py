"""The definition of the long convolution, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["long_conv"]


def long_conv(x: Tensor, filter: Tensor, *, is_causal: bool = True) -> Tensor:
    """Same arguments, shapes and results as :func:`vitkernels.long_conv`."""
    if x.numel() == 0:
        return x * filter[:, :1]  # transforms of no signal are an error
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32  # transforms take no other
    length, taps = x.shape[-1], filter.shape[-1]
    first = 0 if is_causal else taps // 2
    spectrum = torch.fft.rfft(x.to(dtype), length + taps) * torch.fft.rfft(filter.to(dtype), length + taps)
    out: Tensor = torch.fft.irfft(spectrum, length + taps)[..., first : first + length]
    return out.to(x.dtype)
