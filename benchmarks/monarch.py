"""Entries of ``blockdiag_butterfly_multiply``, against two products of batches of matrices and a dense linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.ours import vk
from benchmarks.prepare import prepared
from benchmarks.registry import OURS, Entry, Inputs, Peer, Target, register

Function = Callable[..., Tensor]
_DTYPES = ("float32", "bfloat16")


class _Layer(NamedTuple):
    """A layer of the MLP of ViT-B/16, for a batch of 8."""

    inputs: int
    outputs: int
    blocks: int
    rows: int = 1576

    def __str__(self) -> str:
        return f"{self.inputs}-{self.outputs}-of-{self.blocks}"

    @property
    def weights(self) -> int:
        return min(self.inputs, self.outputs) * (self.inputs + self.outputs) // self.blocks


_LAYERS = [_Layer(*sizes, blocks) for sizes in ((768, 3072), (3072, 768)) for blocks in (4, 16)]


def _ours(x: Tensor, w1: Tensor, w2: Tensor, dense: Tensor) -> Tensor:
    out: Tensor = vk.blockdiag_butterfly_multiply(x, w1, w2)
    return out


def _two_products(x: Tensor, w1: Tensor, w2: Tensor, dense: Tensor) -> Tensor:
    """With the copies that order the intermediate and the result."""
    k, _, p = w1.shape
    turns, s, r = w2.shape
    inner = torch.bmm(x.view(-1, k, p).transpose(0, 1), w1.mT).transpose(0, 1)  # [rows, k, q]
    in_turn = inner.reshape(-1, r, turns).permute(2, 0, 1).contiguous()  # [l, rows, r]
    return torch.bmm(in_turn, w2.mT).permute(1, 2, 0).reshape(-1, s * turns)


def _dense(x: Tensor, w1: Tensor, w2: Tensor, dense: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, dense)


def _inputs(layer: _Layer) -> Callable[[torch.dtype, torch.device], Inputs]:
    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            values = torch.randn(*size, device=device, generator=generator)
            return (values / size[-1] ** 0.5 if len(size) == 3 else values).to(dtype)

        n, inner = layer.blocks, min(layer.inputs, layer.outputs) // layer.blocks
        w1, w2 = randn(n, inner, layer.inputs // n), randn(n, layer.outputs // n, inner)
        every_column = torch.eye(layer.inputs, device=device)
        dense = vk.reference.blockdiag_butterfly_multiply(every_column, w1.float(), w2.float()).t().to(dtype)
        data = [randn(layer.rows, layer.inputs), w1, w2, dense.contiguous()]
        return {"data": data, "grad_out": randn(layer.rows, layer.outputs)}

    return make


def _name(layer: _Layer, direction: str) -> str:
    return f"blockdiag_butterfly_multiply/{direction}/{layer}"


for _layer in _LAYERS:
    for _direction, _grad in (("forward", False), ("backward", True)):
        register(
            Entry(
                name=_name(_layer, _direction),
                inputs=_inputs(_layer),
                peers=(
                    Peer(OURS, prepared(_ours, grad=_grad, learns=(0, 1, 2))),
                    Peer("two-bmm", prepared(_two_products, grad=_grad, learns=(0, 1, 2))),
                    Peer("linear", prepared(_dense, grad=_grad, learns=(0, 3))),
                ),
                flops=2.0 * _layer.rows * _layer.weights * (3 if _grad else 1),
                elements=_layer.rows * (_layer.inputs + _layer.outputs) * (2 if _grad else 1),
                dtypes=_DTYPES,
                devices=("cpu",),
                same_results=not _grad,  # a dense weight's gradient has another shape
            )
        )

_FIGURES = (("two-bmm", _LAYERS, 1.5), ("linear", _LAYERS[::2], 1.7), ("linear", _LAYERS[1::2], 4.0))
register(
    *(
        Target(
            f"Monarch product at least {at_least} times as fast as {peer}, {layers[0].blocks} blocks"
            f"{' and more' if len(layers) > 2 else ''}, {direction}, {dtype}",
            tuple(_name(layer, direction) for layer in layers),
            dtype=dtype,
            peer=peer,
            each_at_least=at_least,
        )
        for dtype in _DTYPES
        for direction in ("forward", "backward")
        for peer, layers, at_least in _FIGURES
    )
)
