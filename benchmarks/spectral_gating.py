"""Entries of ``spectral_gating``, against the same layer by PyTorch's transforms, as GFNet and SpectFormer have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.ours import vk
from benchmarks.prepare import prepared
from benchmarks.registry import OURS, Entry, Inputs, Peer, Target, register

_DTYPES = ("float32", "bfloat16")


class _Layer(NamedTuple):
    """A layer of GFNet-S (14 x 14), or of the first stages of its hierarchical ones."""

    channels: int
    height: int
    width: int
    batch: int = 8

    def __str__(self) -> str:
        return f"{self.channels}-{self.height}x{self.width}"


_LAYERS = [_Layer(384, 14, 14), _Layer(64, 56, 56), _Layer(128, 28, 28)]


def _ours(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = vk.spectral_gating(x, weight)
    return out


def _torch_fft(x: Tensor, weight: Tensor) -> Tensor:
    """With the casts of the published layer: transforms take no 16 bits."""
    spectrum = torch.fft.rfft2(x.float(), dim=(1, 2), norm="ortho")
    gated = spectrum * torch.view_as_complex(weight)
    out: Tensor = torch.fft.irfft2(gated, s=x.shape[1:3], dim=(1, 2), norm="ortho")
    return out.to(x.dtype)


def _inputs(layer: _Layer) -> Callable[[torch.dtype, torch.device], Inputs]:
    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=generator)

        shape = layer.batch, layer.height, layer.width, layer.channels
        weight = randn(layer.height, layer.width // 2 + 1, layer.channels, 2) * 0.02
        return {"data": [randn(*shape).to(dtype), weight], "grad_out": randn(*shape).to(dtype)}

    return make


def _name(layer: _Layer, direction: str) -> str:
    return f"spectral_gating/{direction}/{layer}"


for _layer in _LAYERS:
    _positions = _layer.height * _layer.width
    _elements = _layer.batch * _layer.channels * _positions
    for _direction, _grad in (("forward", False), ("backward", True)):
        register(
            Entry(
                name=_name(_layer, _direction),
                inputs=_inputs(_layer),
                peers=(
                    Peer(OURS, prepared(_ours, grad=_grad)),
                    Peer("torch-fft", prepared(_torch_fft, grad=_grad)),
                ),
                flops=2.0 * _elements * _positions * (3 if _grad else 1),  # of the sums that the transforms avoid
                elements=_elements * (4 if _grad else 2),
                dtypes=_DTYPES,
                devices=("cpu",),
            )
        )

register(
    *(
        Target(
            f"spectral gating at least 1.5 times as fast as torch-fft, {direction}, {dtype}",
            tuple(_name(layer, direction) for layer in _LAYERS),
            dtype=dtype,
            peer="torch-fft",
            each_at_least=1.5,
        )
        for dtype in _DTYPES
        for direction in ("forward", "backward")
    )
)
