"""Entries of ``attention`` with a bias by the offset of two patches: a table, or a matrix gathered from it per call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ours import vk
from benchmarks.registry import OURS, Call, Entry, Inputs, Peer, register

# From query, key, value (B, N, H, D), the table (H, 2 n - 1, 2 n - 1), and its entry of every pair of tokens (N, N).
Implementation = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    side: int
    dim: int

    @property
    def tokens(self) -> int:
        return self.side**2

    def __str__(self) -> str:
        return f"b{self.batch}-h{self.heads}-n{self.tokens}-d{self.dim}"


VIT_224 = Shape(8, 6, 14, 64)
STAGE_1 = Shape(1, 3, 56, 32)  # the whole map of a first stage


def _gathered(table: Tensor, index: Tensor) -> Tensor:
    return table.flatten(1)[:, index][None]  # [1, H, N, N]


def _ours(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor) -> Tensor:
    return vk.attention(q, k, v, bias_table=table)


def _ours_gathered(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor) -> Tensor:
    return vk.attention(q, k, v, bias=_gathered(table, index))


def _sdpa_gathered(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_gathered(table, index).to(q.dtype)).transpose(1, 2)


def _forward(implementation: Implementation) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        q, k, v = inputs["qkv"].unbind(2)
        return lambda: (implementation(q, k, v, inputs["table"], inputs["index"]),)

    return prepare


def _backward(implementation: Implementation) -> Callable[[Inputs], Call]:
    """Forward, then the gradients of query, key, value and of the table."""

    def prepare(inputs: Inputs) -> Call:
        leaves = [t.detach().requires_grad_() for t in (*inputs["qkv"].unbind(2), inputs["table"])]

        def call() -> tuple[Tensor, ...]:
            out = implementation(*leaves, inputs["index"])
            return (out.detach(), *torch.autograd.grad(out, leaves, inputs["grad_out"]))

        return call

    return prepare


def _inputs(shape: Shape) -> Callable[[torch.dtype, torch.device], Inputs]:
    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=generator)

        offsets = 2 * shape.side - 1
        axis = torch.arange(shape.side, device=device)
        place = torch.cartesian_prod(axis, axis)  # [N, 2]
        offset = place[:, None] - place + shape.side - 1
        tokens = (shape.batch, shape.tokens)
        return {
            "qkv": randn(*tokens, 3, shape.heads, shape.dim).to(dtype),
            "table": randn(shape.heads, offsets, offsets),
            "index": offset[..., 0] * offsets + offset[..., 1],
            "grad_out": randn(*tokens, shape.heads, shape.dim).to(dtype),
        }

    return make


def _entry(mode: str, shape: Shape) -> Entry:
    backward = mode == "backward"
    wrap = _backward if backward else _forward
    product = 2.0 * shape.batch * shape.heads * shape.tokens**2 * shape.dim
    data = shape.batch * shape.tokens * shape.heads * shape.dim
    table = shape.heads * (2 * shape.side - 1) ** 2
    return Entry(
        name=f"attention/{mode}-table/{shape}",
        inputs=_inputs(shape),
        peers=(
            Peer(OURS, wrap(_ours)),
            Peer("sdpa", wrap(_sdpa_gathered)),
            Peer("vitkernels, gathered", wrap(_ours_gathered)),
        ),
        flops=(7 if backward else 2) * product,
        elements=(8 if backward else 4) * data + (2 if backward else 1) * table,
    )


register(*(_entry(mode, shape) for shape in (VIT_224, STAGE_1) for mode in ("forward", "backward")))
