"""Entries of ``window_attention``: Swin's shifted windows, between the projections.

timm's block is run as it is, but for its projections: in place of the first one stands its result, in windows. Its mask
of -100 leaves probabilities that are denormal numbers, with which processors are slow. A mask of -inf leaves none, and
takes the time that the block takes where ``torch.set_flush_denormal`` is on: that is the baseline.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.models import _import
from benchmarks.ours import vk
from benchmarks.registry import OURS, Call, Entry, Inputs, Peer, Target, register

Implementation = Callable[[Tensor, Tensor], Tensor]
"""From a projection, of the map or of its windows, and the table."""


@dataclass(frozen=True)
class Shape:
    batch: int
    side: int
    window: int
    shift: int
    heads: int
    dim: int

    def __str__(self) -> str:
        return f"b{self.batch}-{self.side}x{self.side}-w{self.window}-s{self.shift}-h{self.heads}-d{self.dim}"

    @property
    def elements(self) -> int:
        """Of one of query, key, value, out."""
        return self.batch * self.side**2 * self.heads * self.dim

    def partition(self, x: Tensor) -> Tensor:
        """``(B, H, W, channels)`` to ``(B * windows, window ** 2, channels)``, after the cyclic shift."""
        n, w = self.side // self.window, self.window
        x = x.roll((-self.shift, -self.shift), (1, 2))
        return x.view(-1, n, w, n, w, x.size(-1)).transpose(2, 3).reshape(-1, w * w, x.size(-1))


def _inputs(shape: Shape) -> Callable[[torch.dtype, torch.device], Inputs]:
    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        _import("timm")  # without it there is nothing to compare with
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=generator).to(dtype)

        grid = shape.batch, shape.side, shape.side
        qkv = randn(*grid, 3, shape.heads, shape.dim)
        return {
            "qkv": qkv,
            "windows": shape.partition(qkv.flatten(3)),
            "x": randn(*grid, shape.heads * shape.dim),
            "table": randn((2 * shape.window - 1) ** 2, shape.heads),
            "grad_out": randn(*grid, shape.heads, shape.dim),
        }

    return make


def _ours(shape: Shape, inputs: Inputs) -> Implementation:
    return lambda qkv, table: vk.window_attention(*qkv.unbind(3), shape.window, shape.shift, bias_table=table)


class _Given(nn.Module):
    """A projection whose result is there already."""

    result: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.result


def _timm(shape: Shape, inputs: Inputs, masked: float = -torch.inf) -> Implementation:
    swin = importlib.import_module("timm.models.swin_transformer")
    size, x = (shape.side, shape.side), inputs["x"]
    block = swin.SwinTransformerBlock(
        x.size(-1), size, shape.heads, window_size=shape.window, shift_size=shape.shift
    ).to(x.device, x.dtype)
    block.attn_mask.masked_fill_(block.attn_mask != 0.0, masked)
    projection = block.attn.qkv = _Given()
    block.attn.proj = nn.Identity()
    del block.attn.relative_position_bias_table  # a parameter: the tensor that follows has its place

    def run(windows: Tensor, table: Tensor) -> Tensor:
        projection.result, block.attn.relative_position_bias_table = windows, table
        return block._attn(x).unflatten(-1, (shape.heads, shape.dim))

    return run


def _timm_as_it_is(shape: Shape, inputs: Inputs) -> Implementation:
    return _timm(shape, inputs, -100.0)


def _peer(
    name: str, mode: str, shape: Shape, projection: str, implementation: Callable[[Shape, Inputs], Implementation]
) -> Peer:
    def prepare(inputs: Inputs) -> Call:
        run, leaves = implementation(shape, inputs), [inputs[projection], inputs["table"]]
        if mode == "forward":
            return lambda: (run(*leaves),)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]

        def call() -> tuple[Tensor, ...]:
            out = run(*leaves)
            gradients = torch.autograd.grad(out, leaves, inputs["grad_out"])
            return out.detach(), gradients[1]  # the other one is a map here and windows there

        return call

    return Peer(name, prepare)


def _entry(mode: str, shape: Shape, dtypes: tuple[str, ...] = ("float32",)) -> Entry:
    # Backward recomputes the logits: five products after the two of the forward pass.
    products, tensors = (7, 8) if mode == "backward" else (2, 4)
    return Entry(
        name=f"window_attention/{mode}/{shape}",
        inputs=_inputs(shape),
        peers=(
            _peer(OURS, mode, shape, "qkv", _ours),
            _peer("timm", mode, shape, "windows", _timm),
            _peer("timm, denormals", mode, shape, "windows", _timm_as_it_is),
        ),
        flops=products * 2.0 * shape.elements * shape.window**2,
        elements=tensors * shape.elements,
        dtypes=dtypes,
        devices=("cpu",),
    )


STAGE_1 = Shape(4, 56, 7, 3, 3, 32)  # of Swin-T at 224 pixels
STAGE_3 = Shape(4, 14, 7, 3, 12, 32)
_TWO_DTYPES = ("float32", "bfloat16")
FORWARD = [_entry("forward", shape, _TWO_DTYPES) for shape in (STAGE_1, STAGE_3)]
BACKWARD = [_entry("backward", shape, _TWO_DTYPES) for shape in (STAGE_1, STAGE_3)]
# Output and log-sum-exp in MB, and a tenth more for what threads work with.
_MOST_MB = 1.1 * 4 * (STAGE_1.elements + STAGE_1.elements / STAGE_1.dim) / 1e6

register(
    *FORWARD,
    *BACKWARD,
    Target("shifted windows forward, 56 x 56", (FORWARD[0].name,), each_at_least=3.5),
    Target("shifted windows forward, 14 x 14", (FORWARD[1].name,), each_at_least=3.0),
    Target("shifted windows forward, 56 x 56, bfloat16", (FORWARD[0].name,), dtype="bfloat16", each_at_least=4.0),
    Target(
        "shifted windows forward + backward with the table's gradient, 56 x 56", (BACKWARD[0].name,), each_at_least=2.5
    ),
    Target(
        "peak extra memory of shifted windows, 56 x 56, MB", (FORWARD[0].name,), quantity="peak_mb", each_below=_MOST_MB
    ),
)
