"""Entries of ``indexed_attention``: each query of each head attends to the keys with the largest products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.ours import vk
from benchmarks.registry import OURS, Call, Entry, Inputs, Peer, Target, register

_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class _Shape:
    tokens: int
    kept: int
    batch: int = 4
    heads: int = 6
    dim: int = 64

    def __str__(self) -> str:
        return f"b{self.batch}-n{self.tokens}-w{self.kept}-h{self.heads}-d{self.dim}"

    @property
    def elements(self) -> int:
        """Of one of query, key, value, out."""
        return self.batch * self.tokens * self.heads * self.dim


# Sparsifiner keeps a quarter of the keys; 577 tokens are an image of 384 x 384 in patches of 16.
_SHAPES = [_Shape(577, 144), _Shape(197, 49)]


def _inputs(shape: _Shape) -> Callable[[torch.dtype, torch.device], Inputs]:
    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        sizes = shape.batch, shape.tokens, 3, shape.heads, shape.dim
        qkv = torch.randn(*sizes, device=device, generator=generator)
        grad_out = torch.randn(shape.batch, shape.tokens, shape.heads, shape.dim, device=device, generator=generator)
        query, key, _ = (t.transpose(1, 2) for t in qkv.unbind(2))
        index = (query @ key.transpose(-1, -2)).topk(shape.kept).indices  # [B, heads, N, kept]
        return {"qkv": qkv.to(dtype), "grad_out": grad_out.to(dtype), "index": index}

    return make


_Form = Callable[[Sequence[Tensor], Tensor], Tensor]


def _indexed(qkv: Sequence[Tensor], index: Tensor) -> Tensor:
    query, key, value = qkv
    out: Tensor = vk.indexed_attention(query, key, value, index)
    return out


def _dense(qkv: Sequence[Tensor], index: Tensor) -> Tensor:
    out: Tensor = scaled_dot_product_attention(*(t.transpose(1, 2) for t in qkv)).transpose(1, 2)
    return out


def _masked(qkv: Sequence[Tensor], index: Tensor) -> Tensor:
    query, key, value = (t.transpose(1, 2) for t in qkv)
    seen = torch.zeros(*query.shape[:3], key.size(2), dtype=torch.bool, device=key.device)  # [B, heads, Nq, Nk]
    out: Tensor = scaled_dot_product_attention(query, key, value, attn_mask=seen.scatter(-1, index, True))
    return out.transpose(1, 2)


def _forward(form: _Form) -> Callable[[Inputs], Call]:
    return lambda inputs: lambda: (form(inputs["qkv"].unbind(2), inputs["index"]),)


def _backward(form: _Form) -> Callable[[Inputs], Call]:
    """Forward and backward."""

    def prepare(inputs: Inputs) -> Call:
        leaves = [t.detach().requires_grad_() for t in inputs["qkv"].unbind(2)]
        return lambda: torch.autograd.grad(form(leaves, inputs["index"]), leaves, inputs["grad_out"])

    return prepare


def _name(shape: _Shape, direction: str) -> str:
    return f"indexed_attention/{direction}/{shape}"


for _shape in _SHAPES:
    for _direction, _prepare, _products, _tensors in (("forward", _forward, 2, 4), ("backward", _backward, 7, 12)):
        register(
            Entry(
                name=_name(_shape, _direction),
                inputs=_inputs(_shape),
                peers=(
                    Peer(OURS, _prepare(_indexed)),
                    Peer("sdpa", _prepare(_dense)),
                    Peer("mask", _prepare(_masked)),
                ),
                flops=_products * 2.0 * _shape.elements * _shape.kept,
                elements=_tensors * _shape.elements,
                dtypes=_DTYPES,
                devices=("cpu",),
                same_results=False,  # SDPA attends to all keys
            )
        )

register(
    Target(
        "attention to a quarter of the keys at least 1.3 times as fast as to all of them",
        (_name(_SHAPES[0], "forward"),),
        peer="sdpa",
        each_at_least=1.3,
    )
)
