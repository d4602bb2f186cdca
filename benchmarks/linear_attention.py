"""Entries of ``linear_attention``, ``channel_attention`` and ``agent_attention``, against their papers' plain forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.attention import Shape
from benchmarks.ours import vk
from benchmarks.prepare import prepared
from benchmarks.registry import OURS, Entry, Inputs, Peer, Target, register

Function = Callable[..., Tensor]
_DIMS = (Shape(4, 2, 3136, 32), Shape(4, 2, 3136, 64))
_AGENTS = 49
# Attention between channels in small models of timm at 224 pixels, stage by stage.
_NORMED = {
    "xcit": (Shape(1, 4, 196, 48), Shape(4, 4, 196, 48)),
    "edgenext": (Shape(1, 8, 784, 12), Shape(1, 8, 196, 20), Shape(1, 8, 49, 38), Shape(4, 8, 196, 20)),
}
_FEW = (Shape(64, 6, 49, 64), Shape(64, 6, 16, 32))  # windows
_DTYPES = ("float32", "bfloat16")
_GROUPED = (
    Shape(1, 3, 3136, 32), Shape(1, 6, 784, 32), Shape(1, 12, 196, 32), Shape(1, 24, 49, 32), Shape(4, 6, 784, 32),
)  # fmt: skip


def _relu_eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Two products of batches of matrices, and their denominator."""
    q, k, v = (t.transpose(1, 2) for t in (query.relu(), key.relu(), value))
    sums = q @ k.sum(-2).unsqueeze(-1) + 1e-6
    return (q @ (k.transpose(-1, -2) @ v) / sums).transpose(1, 2)


def _channels(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out: Tensor = vk.channel_attention(query, key, value, qk_norm="l2")
    return out


def _channels_eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """XCiT's module, between its projections."""
    q, k, v = (t.permute(0, 2, 3, 1) for t in (query, key, value))
    q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
    weights = (q @ k.transpose(-2, -1) * query.size(-1) ** -0.5).softmax(-1)
    return (weights @ v).permute(0, 3, 1, 2)


def _groups(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out: Tensor = vk.channel_attention(key, value, query)
    return out


def _groups_eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """DaViT's module, between its projections."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    weights = ((k * query.size(-1) ** -0.5).transpose(-1, -2) @ v).softmax(-1)
    return (weights @ q.transpose(-1, -2)).permute(0, 3, 1, 2)


def _agents_eager(
    query: Tensor, key: Tensor, value: Tensor, agent: Tensor, agent_bias: Tensor, query_bias: Tensor
) -> Tensor:
    q, k, v, a = (t.transpose(1, 2) for t in (query, key, value, agent))
    scale = query.size(-1) ** -0.5
    of_agents = ((a * scale) @ k.transpose(-2, -1) + agent_bias).softmax(-1) @ v
    return (((q * scale) @ a.transpose(-2, -1) + query_bias).softmax(-1) @ of_agents).transpose(1, 2)


def _agents(query: Tensor, key: Tensor, value: Tensor, agent: Tensor, agent_bias: Tensor, query_bias: Tensor) -> Tensor:
    out: Tensor = vk.agent_attention(query, key, value, agent, agent_bias=agent_bias, query_bias=query_bias)
    return out


def _linear(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out: Tensor = vk.linear_attention(query, key, value)
    return out


def _inputs(shape: Shape, *, agents: int = 0) -> Callable[[torch.dtype, torch.device], Inputs]:
    b, h, n, d = shape.batch, shape.heads, shape.tokens, shape.dim

    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=generator).to(dtype)

        data = list(randn(b, n, 3, h, d).unbind(2))
        if agents:
            data += [randn(b, agents, h, d), randn(h, agents, n), randn(h, n, agents)]
        return {"data": data, "grad_out": randn(b, n, h, d)}

    return make


def _entries(name: str, shape: Shape, ours: Function, eager: Function, *, flops: float, agents: int = 0) -> list[Entry]:
    """Forward, and forward with backward, which does twice as much again."""
    return [
        Entry(
            name=f"{name}/{direction}/{shape}",
            inputs=_inputs(shape, agents=agents),
            peers=(Peer(OURS, prepared(ours, grad=grad)), Peer("eager", prepared(eager, grad=grad))),
            flops=flops * (3 if grad else 1),
            elements=shape.elements * (7 if grad else 4),
        )
        for direction, grad in (("forward", False), ("backward", True))
    ]


def _of_state(shape: Shape) -> float:
    """Two products with a state of d times d for each token."""
    return 4.0 * shape.batch * shape.heads * shape.tokens * shape.dim**2


_AGENT_SHAPE = _DIMS[0]
for _shape in _FEW:
    register(*_entries("linear_attention", _shape, _linear, _relu_eager, flops=_of_state(_shape)))
for _shape in _DIMS:
    register(*_entries("linear_attention", _shape, _linear, _relu_eager, flops=_of_state(_shape)))
    register(*_entries("channel_attention", _shape, _channels, _channels_eager, flops=_of_state(_shape)))
_of_channels = [
    *(
        replace(entry, dtypes=_DTYPES)
        for model, shapes in _NORMED.items()
        for shape in shapes
        for entry in _entries(f"channel_attention/{model}", shape, _channels, _channels_eager, flops=_of_state(shape))
    ),
    *(
        replace(entry, dtypes=_DTYPES)
        for shape in _GROUPED
        for entry in _entries("channel_attention/davit", shape, _groups, _groups_eager, flops=_of_state(shape))
    ),
]
register(*_of_channels)
register(
    *_entries(
        "agent_attention",
        _AGENT_SHAPE,
        _agents,
        _agents_eager,
        agents=_AGENTS,
        flops=8.0 * _AGENT_SHAPE.batch * _AGENT_SHAPE.heads * _AGENT_SHAPE.tokens * _AGENTS * _AGENT_SHAPE.dim,
    )
)
register(
    Target(
        "linear attention at least 1.5 times as fast as its two products of matrices",
        tuple(f"linear_attention/{direction}/{shape}" for direction in ("forward", "backward") for shape in _DIMS),
        each_at_least=1.5,
    ),
    *(
        Target(
            f"channel attention never slower than XCiT's, EdgeNeXt's and DaViT's modules, {dtype}",
            tuple(entry.name for entry in _of_channels),
            dtype=dtype,
            each_at_least=1.0,
        )
        for dtype in _DTYPES
    ),
    Target(
        "agent attention at least twice as fast as its paper's plain form",
        tuple(f"agent_attention/{direction}/{_AGENT_SHAPE}" for direction in ("forward", "backward")),
        each_at_least=2.0,
    ),
)
