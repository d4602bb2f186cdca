"""Entries of ``long_conv``, against the same convolution by PyTorch's transforms of padded signals."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.ours import vk
from benchmarks.registry import OURS, Call, Entry, Inputs, Peer, Target, register

Function = Callable[[Tensor, Tensor], Tensor]


class _Layer(NamedTuple):
    """A mixer of a batch of 8, with the channels of ViT-S and ViT-B."""

    length: int
    channels: int
    channels_last: bool
    batch: int = 8

    def __str__(self) -> str:
        return f"{self.channels}-of-{self.length}-{'tokens' if self.channels_last else 'signals'}"


_LAYERS = [_Layer(n, c, t) for n in (1024, 2048, 4096) for c in (384, 768) for t in (False, True)]


def _ours(x: Tensor, taps: Tensor) -> Tensor:
    out: Tensor = vk.long_conv(x, taps)
    return out


def _torch_fft(x: Tensor, taps: Tensor) -> Tensor:
    length = x.shape[-1]
    spectrum = torch.fft.rfft(x, 2 * length) * torch.fft.rfft(taps, 2 * length)
    out: Tensor = torch.fft.irfft(spectrum, 2 * length)[..., :length]
    return out


def _prepare(function: Function, *, grad: bool) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        x, taps = inputs["x"], inputs["taps"]
        if not grad:
            return lambda: (function(x, taps),)
        leaves = x.detach().requires_grad_(), taps.detach().requires_grad_()

        def call() -> tuple[Tensor, ...]:
            out = function(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, inputs["grad_out"]))

        return call

    return prepare


def _inputs(layer: _Layer) -> Callable[[torch.dtype, torch.device], Inputs]:
    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def signals() -> Tensor:
            sizes = (layer.length, layer.channels) if layer.channels_last else (layer.channels, layer.length)
            values = torch.randn(layer.batch, *sizes, device=device, generator=generator).to(dtype)
            return values.mT if layer.channels_last else values

        taps = torch.randn(layer.channels, layer.length, device=device, generator=generator) / layer.length**0.5
        return {"x": signals(), "taps": taps.to(dtype), "grad_out": signals()}

    return make


def _name(layer: _Layer, direction: str) -> str:
    return f"long_conv/{direction}/{layer}"


for _layer in _LAYERS:
    _elements = _layer.batch * _layer.channels * _layer.length
    for _direction, _grad in (("forward", False), ("backward", True)):
        register(
            Entry(
                name=_name(_layer, _direction),
                inputs=_inputs(_layer),
                peers=(
                    Peer(OURS, _prepare(_ours, grad=_grad)),
                    Peer("torch-fft", _prepare(_torch_fft, grad=_grad)),
                ),
                flops=2.0 * _elements * _layer.length * (3 if _grad else 1),  # of the sums that the transforms avoid
                elements=_elements * (4 if _grad else 2),
                dtypes=("float32",),
                devices=("cpu",),
            )
        )

register(
    *(
        Target(
            f"long convolution at least 1.5 times as fast as torch-fft, {direction}",
            tuple(_name(layer, direction) for layer in _LAYERS),
            dtype="float32",
            peer="torch-fft",
            each_at_least=1.5,
        )
        for direction in ("forward", "backward")
    )
)
