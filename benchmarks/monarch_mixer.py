"""Entries of ``nn.MonarchMixer``, against the same layers around PyTorch's transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.ours import vk
from benchmarks.registry import OURS, Call, Entry, Inputs, Peer, Target, register

_BATCH, _LENGTH, _CHANNELS = 8, 1024, 384  # of ViT-S/16 on images of 512 pixels
_DTYPES = ("float32", "bfloat16")


def _ours(mixer: Any, x: Tensor) -> Tensor:
    out: Tensor = mixer(x)
    return out


def _torch_fft(mixer: Any, x: Tensor) -> Tensor:
    n = x.shape[1]
    x1, x2, v = mixer.short_filter(mixer.in_linear(x)).mT.chunk(3, 1)  # [B, C, N]
    taps = mixer.filter_fn(n)  # [C, 2 N - 1]
    circular = torch.cat((taps[:, n - 1 :], taps.new_zeros(len(taps), 1), taps[:, : n - 1]), -1)  # [C, 2 N]
    spectrum = torch.fft.rfft((x1 * v).to(taps.dtype), 2 * n) * torch.fft.rfft(circular)  # [B, C, N + 1]
    convolved = torch.fft.irfft(spectrum, 2 * n)[..., :n].to(x2.dtype)  # [B, C, N]
    out: Tensor = mixer.out_linear((convolved * x2).mT)  # [B, N, C]
    return out


def _inputs(dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = vk.nn.MonarchMixer(_CHANNELS, _LENGTH, device=device).to(dtype)

    def tokens() -> Tensor:
        return torch.randn(_BATCH, _LENGTH, _CHANNELS, device=device, generator=generator).to(dtype)

    return {"mixer": mixer, "x": tokens(), "grad_out": tokens()}


def _prepare(function: Callable[[Any, Tensor], Tensor], *, grad: bool) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        mixer, x = inputs["mixer"], inputs["x"].detach().requires_grad_(grad)

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(mixer, x),)

        def forward_and_backward() -> tuple[Tensor, ...]:
            out = function(mixer, x)
            return (out.detach(), *torch.autograd.grad(out, (x, *mixer.parameters()), inputs["grad_out"]))

        return forward_and_backward if grad else forward

    return prepare


def _name(direction: str) -> str:
    return f"monarch_mixer/{direction}/{_CHANNELS}-of-{_LENGTH}"


for _direction, _grad in (("forward", False), ("backward", True)):
    _tokens = _BATCH * _LENGTH
    register(
        Entry(
            name=_name(_direction),
            inputs=_inputs,
            peers=(Peer(OURS, _prepare(_ours, grad=_grad)), Peer("torch-fft", _prepare(_torch_fft, grad=_grad))),
            flops=8.0 * _tokens * _CHANNELS**2 * (3 if _grad else 1),  # of the projections
            elements=2 * _tokens * _CHANNELS * (2 if _grad else 1),
            dtypes=_DTYPES,
            devices=("cpu",),
        )
    )

register(
    *(
        Target(
            f"Monarch Mixer at least 1.3 times as fast as with torch-fft, {direction}, {dtype}",
            (_name(direction),),
            dtype=dtype,
            peer="torch-fft",
            each_at_least=1.3,
        )
        for dtype in _DTYPES
        for direction in ("forward", "backward")
    )
)
