"""Entries for a GPU that are not square and dense: packed sequences, and the map of an attention transposed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention import Shape
from benchmarks.attention_transposed import sums_entry
from benchmarks.gpu import BF16, _fa3_module
from benchmarks.ours import vk
from benchmarks.registry import OURS, Call, Entry, Inputs, Peer, Unavailable, register

__all__ = ["Sequences", "varlen_entry"]


@dataclass(frozen=True)
class Sequences:
    """``count`` images of ``shortest`` to ``longest`` tokens, packed."""

    count: int
    shortest: int
    longest: int
    heads: int = 12
    dim: int = 64

    @property
    def lengths(self) -> list[int]:
        generator = random.Random(0)
        return [generator.randint(self.shortest, self.longest) for _ in range(self.count)]

    def __str__(self) -> str:
        return f"s{self.count}-n{self.shortest}-{self.longest}-h{self.heads}-d{self.dim}"


def _inputs(sequences: Sequences) -> Callable[[torch.dtype, torch.device], Inputs]:
    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        ends = torch.tensor([0, *sequences.lengths]).cumsum(0)
        size = (int(ends[-1]), 3, sequences.heads, sequences.dim)
        qkv = torch.randn(*size, device=device, generator=generator).to(dtype)
        return {"qkv": qkv, "ends": ends.to(device, torch.int32), "lengths": sequences.lengths}

    return make


def _longest(inputs: Inputs) -> int:
    return max(inputs["lengths"])


def _ours(inputs: Inputs) -> Call:
    ends, longest = inputs["ends"], _longest(inputs)
    q, k, v = inputs["qkv"].unbind(1)
    return lambda: (vk.attention_varlen(q, k, v, ends, ends, longest, longest),)


def _torch_varlen(inputs: Inputs) -> Call:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unavailable(str(error)) from error
    ends, longest = inputs["ends"], _longest(inputs)
    q, k, v = inputs["qkv"].unbind(1)
    return lambda: (varlen_attn(q, k, v, ends, ends, longest, longest),)


def _fa3(inputs: Inputs) -> Call:
    run, ends, longest = _fa3_module().flash_attn_varlen_func, inputs["ends"], _longest(inputs)
    q, k, v = inputs["qkv"].unbind(1)

    def call() -> tuple[Tensor, ...]:
        out = run(q, k, v, ends, ends, longest, longest)
        return out if isinstance(out, tuple) else (out,)

    return call


def _one_by_one(inputs: Inputs) -> Call:
    def call() -> tuple[Tensor, ...]:
        parts = inputs["qkv"].split(inputs["lengths"])
        triples = ([t.transpose(0, 1)[None] for t in part.unbind(1)] for part in parts)
        return (torch.cat([F.scaled_dot_product_attention(*t)[0].transpose(0, 1) for t in triples]),)

    return call


def varlen_entry(sequences: Sequences, devices: tuple[str, ...] = ("cuda",)) -> Entry:
    """Against PyTorch's attention over packed sequences, by FlashAttention-2."""
    lengths, width = sequences.lengths, sequences.heads * sequences.dim
    return Entry(
        name=f"gpu/attention_varlen/forward/{sequences}",
        inputs=_inputs(sequences),
        peers=(
            Peer(OURS, _ours),
            Peer("torch-varlen", _torch_varlen, devices=("cuda",), may_refuse=True),
            Peer("fa3", _fa3, dtypes=BF16, devices=("cuda",), may_refuse=True),
            Peer("one by one", _one_by_one),
        ),
        flops=4.0 * width * sum(n * n for n in lengths),
        elements=4 * width * sum(lengths),
        dtypes=BF16,
        devices=devices,
        reference=_one_by_one,
    )


def _flash_time(inputs: Inputs) -> Call:
    """The attention whose map it is, for its time; what it returns are the sums, computed before."""
    q, k, v = (t.transpose(1, 2) for t in inputs["qkv"].unbind(2))
    weights = ((q.float() * q.size(-1) ** -0.5) @ k.float().transpose(-2, -1)).softmax(-1)
    sums = weights.sum(2).transpose(1, 2).unsqueeze(-1).to(q.dtype)

    def call() -> tuple[Tensor, ...]:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            F.scaled_dot_product_attention(q, k, v)
        return (sums,)

    return call


def transposed_entry(shape: Shape, devices: tuple[str, ...] = ("cuda",)) -> Entry:
    """Column sums of the map against the time of the attention itself."""
    usual = sums_entry(shape)
    ours, _, eager = usual.peers
    return replace(
        usual,
        name=f"gpu/{usual.name}",
        peers=(
            ours,
            Peer("sdpa-flash", _flash_time, dtypes=("bfloat16", "float16"), may_refuse=True),
            replace(eager, dtypes=BF16),
        ),
        dtypes=BF16,
        devices=devices,
        reference=eager.prepare,
    )


register(
    varlen_entry(Sequences(256, 64, 577)),
    varlen_entry(Sequences(1024, 16, 128)),
    transposed_entry(Shape(64, 12, 577, 64)),
    transposed_entry(Shape(32, 12, 1024, 64)),
)
