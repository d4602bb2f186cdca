"""Entries of ``na2d`` and ``na3d``: against SDPA under the mask of the neighborhoods, NATTEN, and one another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ours import vk
from benchmarks.registry import OURS, Call, Entry, Inputs, Peer, Target, Unavailable, register


@dataclass(frozen=True)
class Shape:
    batch: int
    map: tuple[int, ...]
    kernel: tuple[int, ...]
    heads: int
    dim: int
    dilation: int = 1

    def __str__(self) -> str:
        sizes = ["x".join(map(str, t)) for t in (self.map, self.kernel)]
        dilation = f"-dilation{self.dilation}" if self.dilation > 1 else ""
        return f"b{self.batch}-{sizes[0]}-k{sizes[1]}{dilation}-h{self.heads}-d{self.dim}"

    @property
    def elements(self) -> int:
        """Of one of query, key, value, out."""
        return self.batch * math.prod(self.map) * self.heads * self.dim

    @property
    def product_flops(self) -> float:
        return 2.0 * self.elements * math.prod(self.kernel)


def _inputs(shape: Shape) -> Callable[[torch.dtype, torch.device], Inputs]:
    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        size = shape.batch, *shape.map
        qkv = torch.randn(*size, 3, shape.heads, shape.dim, device=device, generator=generator)
        grad_out = torch.randn(*size, shape.heads, shape.dim, device=device, generator=generator)
        return {"qkv": qkv.to(dtype), "grad_out": grad_out.to(dtype)}

    return make


def _attend(shape: Shape, qkv: Sequence[Tensor]) -> Tensor:
    function = {1: vk.na1d, 2: vk.na2d, 3: vk.na3d}[len(shape.map)]
    out: Tensor = function(*qkv, shape.kernel, dilation=shape.dilation)
    return out


def _forward(shape: Shape) -> Callable[[Inputs], Call]:
    return lambda inputs: lambda: (_attend(shape, inputs["qkv"].unbind(-3)),)


def _backward(shape: Shape) -> Callable[[Inputs], Call]:
    """The gradients of query, key and value alone, of one forward pass."""

    def prepare(inputs: Inputs) -> Call:
        leaves = [t.detach().requires_grad_() for t in inputs["qkv"].unbind(-3)]
        out = _attend(shape, leaves)
        return lambda: torch.autograd.grad(out, leaves, inputs["grad_out"], retain_graph=True)

    return prepare


def _mask(shape: Shape) -> Tensor:
    """``(N, N)``: the pairs that see one another."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for n, size in zip(shape.map, shape.kernel, strict=True):
        begin = (torch.arange(n) - size // 2).clamp(0, n - size)[:, None]
        near = (torch.arange(n) >= begin) & (torch.arange(n) < begin + size)
        mask = (mask[:, None, :, None] & near[None, :, None]).flatten(2).flatten(0, 1)
    return mask


def _sdpa(shape: Shape) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        mask = _mask(shape).to(inputs["qkv"].device)
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in inputs["qkv"].unbind(-3))

        def call() -> tuple[Tensor, ...]:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return (out.transpose(1, 2).unflatten(1, shape.map),)

        return call

    return prepare


def _natten(shape: Shape) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        try:
            from natten import functional
        except ImportError as error:
            raise Unavailable(f"natten: {error}") from error
        function = getattr(functional, f"na{len(shape.map)}d")
        q, k, v = (t.contiguous() for t in inputs["qkv"].unbind(-3))
        return lambda: (function(q, k, v, shape.kernel, dilation=shape.dilation),)

    return prepare


def _entry(shape: Shape, dtypes: tuple[str, ...] = ("float32",), *, once: bool = False) -> Entry:
    return Entry(
        name=f"neighborhood_attention/forward/{shape}",
        inputs=_inputs(shape),
        peers=(
            Peer(OURS, _forward(shape)),
            Peer("sdpa", _sdpa(shape)),
            Peer("natten", _natten(shape), dtypes=("float32",), may_refuse=True),
        ),
        flops=2 * shape.product_flops,
        elements=4 * shape.elements,
        dtypes=dtypes,
        once=once,
        devices=("cpu",),
    )


NA2D = Shape(1, (56, 56), (7, 7), 3, 32)
NA3D = Shape(1, (16, 28, 28), (3, 5, 5), 2, 32)
DILATED = replace(NA2D, dilation=8)
_TWO_DTYPES = ("float32", "bfloat16")
_2D, _3D = _entry(NA2D, _TWO_DTYPES), _entry(NA3D, once=True)

_DILATION = Entry(
    name=f"neighborhood_attention/dilation/{DILATED}",
    inputs=_inputs(NA2D),
    peers=(Peer(OURS, _forward(DILATED)), Peer("dilation 1", _forward(NA2D))),
    flops=2 * NA2D.product_flops,
    elements=4 * NA2D.elements,
    dtypes=_TWO_DTYPES,
    devices=("cpu",),
    same_results=False,
)
_BACKWARD = Entry(
    name=f"neighborhood_attention/backward/{NA2D}",
    inputs=_inputs(NA2D),
    peers=(Peer(OURS, _backward(NA2D)), Peer("forward", _forward(NA2D))),
    flops=5 * NA2D.product_flops,
    elements=8 * NA2D.elements,
    dtypes=_TWO_DTYPES,
    devices=("cpu",),
    same_results=False,
)

register(
    _2D,
    _3D,
    _DILATION,
    _BACKWARD,
    Target("neighborhoods of 7 x 7, 56 x 56, against NATTEN", (_2D.name,), peer="natten", each_at_least=200.0),
    Target("neighborhoods of 7 x 7, 56 x 56, against SDPA with a mask", (_2D.name,), each_at_least=12.0),
    Target("neighborhoods of 3 x 5 x 5, against NATTEN", (_3D.name,), peer="natten", each_at_least=50.0),
    *(
        target
        for dtype in _TWO_DTYPES
        for target in (
            Target(
                f"neighborhoods of dilation 8 in at most 1.3 times that of 1, {dtype}", (_DILATION.name,), dtype=dtype,
                each_at_least=1 / 1.3,
            ),
            Target(
                f"backward of neighborhoods in at most 3 times that of forward, {dtype}", (_BACKWARD.name,),
                dtype=dtype, each_at_least=1 / 3,
            ),
        )
    ),
)  # fmt: skip
