"""Entries of ``attention_transposed``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.attention import DINOV2_518, VIT_224, VIT_384, Shape
from benchmarks.ours import vk
from benchmarks.registry import OURS, Call, Entry, Inputs, Peer, Target, register


def _map(query: Tensor, key: Tensor) -> Tensor:
    """The attention map in memory, ``(B, H, N, N)``, as models have it that use more than its product with values."""
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    return ((query * query.size(-1) ** -0.5) @ key.transpose(-2, -1)).softmax(-1)


def _column_sums(inputs: Inputs) -> Call:
    query, key, value = inputs["qkv"].unbind(2)
    _, lse = vk.attention(query, key, value, return_lse=True)  # a model has it from its attention
    ones = query.new_ones(()).expand(*lse.shape, 1)
    return lambda: (vk.attention_transposed(query, key, ones, lse),)


def _column_sums_eager(inputs: Inputs) -> Call:
    query, key, _ = inputs["qkv"].unbind(2)
    return lambda: (_map(query, key).sum(2).transpose(1, 2).unsqueeze(-1),)


def _attention(inputs: Inputs) -> Call:
    """The attention whose map it is. It is here for its time; what it returns are the sums, computed before."""
    query, key, value = inputs["qkv"].unbind(2)
    sums = _column_sums_eager(inputs)()

    def call() -> tuple[Tensor, ...]:
        vk.attention(query, key, value)
        return sums

    return call


def _read_write(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    read, lse = vk.attention(query, key, value, return_lse=True)
    return vk.attention_transposed(query, key, read, lse)


def _read_write_eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    probabilities = _map(query, key)
    return (probabilities.transpose(-2, -1) @ (probabilities @ value.transpose(1, 2))).transpose(1, 2)


def _backward(implementation: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Inputs], Call]:
    """Forward, then the gradients of query, key and value."""

    def prepare(inputs: Inputs) -> Call:
        leaves = [t.detach().requires_grad_() for t in inputs["qkv"].unbind(2)]

        def call() -> tuple[Tensor, ...]:
            out = implementation(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, inputs["grad_out"]))

        return call

    return prepare


def _inputs(shape: Shape, *, grad: bool) -> Callable[[torch.dtype, torch.device], Inputs]:
    b, h, n, d = shape.batch, shape.heads, shape.tokens, shape.dim

    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=generator).to(dtype)

        return {"qkv": randn(b, n, 3, h, d)} | ({"grad_out": randn(b, n, h, d)} if grad else {})

    return make


def sums_entry(shape: Shape) -> Entry:
    """How much attention each key receives, against the attention's own time."""
    return Entry(
        name=f"attention_transposed/column-sums/{shape}",
        inputs=_inputs(shape, grad=False),
        peers=(
            Peer(OURS, _column_sums),
            Peer("attention", _attention),
            Peer("eager", _column_sums_eager, dtypes=("float32",)),
        ),
        flops=shape.product_flops,
        elements=2 * shape.elements + shape.elements / shape.dim,
    )


def _read_write_entry(shape: Shape) -> Entry:
    # Each direction: two products forward, five backward.
    return Entry(
        name=f"attention_transposed/read-write-backward/{shape}",
        inputs=_inputs(shape, grad=True),
        peers=(Peer(OURS, _backward(_read_write)), Peer("eager", _backward(_read_write_eager))),
        flops=14 * shape.product_flops,
        elements=8 * shape.elements,
    )


_SUMS = (VIT_224, VIT_384, DINOV2_518)

register(*map(sums_entry, _SUMS), *map(_read_write_entry, (VIT_224, VIT_384)))
register(
    Target(
        "column sums of the map in at most 0.6 of the attention's time",
        tuple(f"attention_transposed/column-sums/{shape}" for shape in _SUMS),
        each_at_least=1 / 0.6,
    )
)
