"""Entries of ``merge_attentions``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.attention import VIT_384, Shape
from benchmarks.ours import vk
from benchmarks.registry import OURS, Call, Entry, Inputs, Peer, register


def _inputs(shape: Shape, parts: int) -> Callable[[torch.dtype, torch.device], Inputs]:
    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        size = (parts, shape.batch, shape.tokens, shape.heads)
        outs = torch.randn(*size, shape.dim, device=device, generator=generator)
        return {"outs": outs.to(dtype), "lses": torch.randn(size, device=device, generator=generator)}

    return make


def _forward(
    implementation: Callable[[list[Tensor], list[Tensor]], tuple[Tensor, Tensor]],
) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        outs, lses = list(inputs["outs"].unbind()), list(inputs["lses"].unbind())
        return lambda: implementation(outs, lses)

    return prepare


_PARTS = 2

register(
    Entry(
        name=f"merge_attentions/forward/{_PARTS}-parts-{VIT_384}",
        inputs=_inputs(VIT_384, _PARTS),
        peers=(
            Peer(OURS, _forward(vk.merge_attentions)),
            Peer("eager", _forward(vk.reference.merge_attentions)),
        ),
        flops=2.0 * _PARTS * VIT_384.elements,
        elements=(_PARTS + 1) * (VIT_384.elements + VIT_384.elements / VIT_384.dim),
        dtypes=("float32", "bfloat16"),
    )
)
