"""Entries of ``regional_routing_attention``, against its paper's plain form, which gathers keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ours import vk
from benchmarks.registry import OURS, Call, Entry, Inputs, Peer, Target, register

_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class _Stage:
    """A stage of BiFormer: a square map of 7 x 7 regions."""

    side: int
    topk: int
    heads: int
    batch: int = 4
    dim: int = 32
    regions: int = 7

    def __str__(self) -> str:
        return f"b{self.batch}-{self.side}x{self.side}-k{self.topk}-h{self.heads}-d{self.dim}"

    @property
    def region(self) -> int:
        return self.side // self.regions

    @property
    def elements(self) -> int:
        """Of one of query, key, value, out."""
        return self.batch * self.side**2 * self.heads * self.dim

    @property
    def product_flops(self) -> float:
        return 2.0 * self.elements * self.topk * self.region**2


_STAGES = [_Stage(56, 4, 2), _Stage(28, 4, 4), _Stage(14, 16, 8)]


def _inputs(stage: _Stage) -> Callable[[torch.dtype, torch.device], Inputs]:
    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        size = stage.batch, stage.side, stage.side
        qkv = torch.randn(*size, 3, stage.heads, stage.dim, device=device, generator=generator)
        grad_out = torch.randn(*size, stage.heads, stage.dim, device=device, generator=generator)
        graph = vk.bilevel_route(qkv[..., 0, :, :], qkv[..., 1, :, :], stage.region, stage.topk)
        return {"qkv": qkv.to(dtype), "grad_out": grad_out.to(dtype), "graph": graph}

    return make


def _routed(stage: _Stage, qkv: Sequence[Tensor], graph: Tensor) -> Tensor:
    query, key, value = qkv
    out: Tensor = vk.regional_routing_attention(query, key, value, None, graph, stage.region)
    return out


def _gathered(stage: _Stage, qkv: Sequence[Tensor], graph: Tensor) -> Tensor:
    per_side, size = stage.regions, stage.region

    def regions(t: Tensor) -> Tensor:
        t = t.unflatten(1, (per_side, size)).unflatten(3, (per_side, size))
        return t.permute(0, 1, 3, 5, 2, 4, 6).reshape(stage.batch, per_side**2, stage.heads, size**2, stage.dim)

    def listed(t: Tensor) -> Tensor:
        index = graph[:, 0, :, :, None, None, None].expand(-1, -1, -1, *t.shape[2:])
        found = t.unsqueeze(1).expand(-1, per_side**2, -1, -1, -1, -1).gather(2, index)
        return found.permute(0, 1, 3, 2, 4, 5).flatten(3, 4)  # [B, regions, heads, keys, d]

    q, k, v = map(regions, qkv)
    probs = ((q * stage.dim**-0.5) @ listed(k).transpose(-1, -2)).softmax(-1)
    out = (probs @ listed(v)).view(stage.batch, per_side, per_side, stage.heads, size, size, stage.dim)
    return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(stage.batch, stage.side, stage.side, stage.heads, stage.dim)


_Form = Callable[[_Stage, Sequence[Tensor], Tensor], Tensor]


def _forward(stage: _Stage, form: _Form) -> Callable[[Inputs], Call]:
    return lambda inputs: lambda: (form(stage, inputs["qkv"].unbind(-3), inputs["graph"]),)


def _backward(stage: _Stage, form: _Form) -> Callable[[Inputs], Call]:
    """Forward and backward."""

    def prepare(inputs: Inputs) -> Call:
        leaves = [t.detach().requires_grad_() for t in inputs["qkv"].unbind(-3)]
        return lambda: torch.autograd.grad(form(stage, leaves, inputs["graph"]), leaves, inputs["grad_out"])

    return prepare


def _name(stage: _Stage, direction: str) -> str:
    return f"regional_routing_attention/{direction}/{stage}"


for _stage in _STAGES:
    for _direction, _prepare, _products, _tensors in (("forward", _forward, 2, 4), ("backward", _backward, 7, 12)):
        register(
            Entry(
                name=_name(_stage, _direction),
                inputs=_inputs(_stage),
                peers=(Peer(OURS, _prepare(_stage, _routed)), Peer("gather", _prepare(_stage, _gathered))),
                flops=_products * _stage.product_flops,
                elements=_tensors * _stage.elements,
                dtypes=_DTYPES,
                devices=("cpu",),
            )
        )

register(
    *(
        Target(
            f"routed attention at least 3 times as fast as with gathered keys, {direction}",
            (_name(_STAGES[0], direction),),
            peer="gather",
            each_at_least=3.0,
        )
        for direction in ("forward", "backward")
    )
)
