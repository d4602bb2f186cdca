"""Entries of attention at sizes that fill a GPU, against what PyTorch offers there and FlashAttention-3.

``--only 'gpu/*'`` names them. Each moves more than a GPU's cache holds, so that repeated calls do not measure that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.ours import vk
from benchmarks.registry import OURS, Call, Entry, Inputs, Peer, Target, Unavailable, register

__all__ = ["Problem", "entry"]

# From query (B, Nq, H, D), key and value (B, Nk, H, D) and a bias (1, H, Nq, Nk) or None: out as query.
Implementation = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

ALL, HALF, BF16 = ("bfloat16", "float16", "float32", "tf32"), ("bfloat16", "float16"), ("bfloat16",)


@dataclass(frozen=True)
class Problem:
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int = 64

    def __str__(self) -> str:
        tokens = f"n{self.keys}" if self.queries == self.keys else f"q{self.queries}-k{self.keys}"
        return f"b{self.batch}-h{self.heads}-{tokens}-d{self.dim}"

    @property
    def product_flops(self) -> float:
        return 2.0 * self.batch * self.heads * self.queries * self.keys * self.dim

    @property
    def elements(self) -> int:
        """Of query and out, key and value."""
        return 2 * self.batch * self.heads * self.dim * (self.queries + self.keys)


def _ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = vk.attention(q, k, v, bias=bias)
    return out


def _sdpa(*backends: SDPBackend) -> Implementation:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if not backends:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)

    return run


def _fa3(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    out = _fa3_module().flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out


def _fa3_module() -> Any:
    try:
        import fa3_fwd_interface  # the wheel fa3-fwd: forward, bfloat16
    except ImportError as error:
        raise Unavailable(str(error)) from error
    return fa3_fwd_interface


def _arguments(inputs: Inputs, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, bias = inputs["query"], inputs.get("bias")
    # As a model holds it: a parameter in float32, which SDPA wants in the dtype of the query.
    return q, inputs["key"], inputs["value"], bias if bias is None or name == OURS else bias.to(q.dtype)


def _forward(name: str, run: Implementation) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        arguments = _arguments(inputs, name)
        return lambda: (run(*arguments),)

    return prepare


def _gradients(name: str, run: Implementation, *, with_forward: bool) -> Callable[[Inputs], Call]:
    """The gradients of query, key, value and, if there is one, of the bias; alone, or after the forward."""

    def prepare(inputs: Inputs) -> Call:
        *data, bias = _arguments(inputs, name)
        q, k, v = leaves = [t.detach().requires_grad_() for t in data if t is not None]
        if bias is not None:
            bias = bias.detach().requires_grad_()
            leaves.append(bias)
        grad_out = inputs["grad_out"]
        if with_forward:
            return lambda: torch.autograd.grad(run(q, k, v, bias), leaves, grad_out)
        out = run(q, k, v, bias)
        return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    return prepare


def _flex(inputs: Inputs) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    q, k, v = (inputs[name].transpose(1, 2) for name in ("query", "key", "value"))
    bias = inputs.get("bias")

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[0, h, i, j]

    score_mod = None if bias is None else add_bias
    return lambda: (compiled(q, k, v, score_mod=score_mod).transpose(1, 2),)


def _inputs(problem: Problem, *, bias: bool, grad: bool) -> Callable[[torch.dtype, torch.device], Inputs]:
    b, h, nq, nk, d = problem.batch, problem.heads, problem.queries, problem.keys, problem.dim

    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=generator)

        if nq == nk:  # as the projection of a model packs them
            query, key, value = randn(b, nq, 3, h, d).to(dtype).unbind(2)
        else:
            query, (key, value) = randn(b, nq, h, d).to(dtype), randn(b, nk, 2, h, d).to(dtype).unbind(2)
        inputs = {"query": query, "key": key, "value": value}
        if bias:
            inputs["bias"] = randn(1, h, nq, nk)
        if grad:
            inputs["grad_out"] = randn(b, nq, h, d).to(dtype)
        return inputs

    return make


# By what of the results is wanted: multiplications of N x N x D, and times that the tensors pass.
MODES = {"forward": (2, 1), "backward": (5, 2), "forward-backward": (7, 2)}
SDPA = {
    "sdpa-flash": (SDPBackend.FLASH_ATTENTION, HALF),
    "sdpa-efficient": (SDPBackend.EFFICIENT_ATTENTION, ALL),
    "sdpa-cudnn": (SDPBackend.CUDNN_ATTENTION, HALF),
    "sdpa-math": (SDPBackend.MATH, ALL),
}


def entry(
    mode: str, problem: Problem, *, bias: bool = False, dtypes: tuple[str, ...] = BF16, math: bool = False,
    flex: bool = False, group: str = "attention", devices: tuple[str, ...] = ("cuda",),
) -> Entry:  # fmt: skip
    """The baseline is SDPA's flash backend, or where that does not apply its memory-efficient one."""

    def wrap(name: str, run: Implementation) -> Callable[[Inputs], Call]:
        if mode == "forward":
            return _forward(name, run)
        return _gradients(name, run, with_forward=mode == "forward-backward")

    peers = [Peer(OURS, wrap(OURS, _ours), dtypes=ALL)]
    for name, (backend, takes) in SDPA.items():
        if (name == "sdpa-flash" and bias) or (name == "sdpa-math" and not math):
            continue
        peers.append(Peer(name, wrap(name, _sdpa(backend)), dtypes=takes, may_refuse=True))
    if mode == "forward" and not bias:
        peers.append(Peer("fa3", wrap("fa3", _fa3), dtypes=BF16, devices=("cuda",), may_refuse=True))
    if flex:
        peers.append(Peer("flex", _flex, dtypes=BF16, option="flex"))
    products, passes = MODES[mode]
    matrix = problem.heads * problem.queries * problem.keys * passes if bias else 0
    return Entry(
        name=f"gpu/{group}/{mode}{'-bias' if bias else ''}/{problem}",
        inputs=_inputs(problem, bias=bias, grad=mode != "forward"),
        peers=tuple(peers),
        flops=products * problem.product_flops,
        elements=passes * problem.elements + matrix,
        dtypes=dtypes,
        devices=devices,
        reference=wrap("reference", _sdpa()),
    )


LONG = (Problem(32, 12, 1024, 1024), Problem(16, 12, 2048, 2048), Problem(8, 12, 4096, 4096))
VIT = tuple(Problem(64, 12, n, n) for n in (197, 257, 577))
TINY = Problem(4096, 3, 49, 49, dim=32)  # the windows of a Swin-T stage, 64 images
FEW = Problem(64, 12, 16, 4096)

register(
    *(entry("forward", p, dtypes=ALL if p is LONG[0] else BF16, flex=p is LONG[0], math=p is LONG[0]) for p in LONG),
    *(entry("forward", p, dtypes=ALL if p is VIT[2] else BF16) for p in VIT),
    *(entry("forward", p) for p in (TINY, FEW)),
    *(entry("forward", Problem(16, 12, 2048, 2048, dim)) for dim in (32, 128, 256)),
    *(entry("forward", p, bias=True, flex=p is VIT[2], math=p is VIT[2]) for p in (*VIT, LONG[0])),
    *(entry("backward", p) for p in (*LONG[:2], *VIT)),
    entry("backward", VIT[2], bias=True),
    *(entry("backward", p, bias=True) for p in (VIT[0], LONG[0])),
    *(entry("forward-backward", p, dtypes=ALL) for p in (VIT[2],)),
    entry("forward-backward", VIT[0]),
    entry("forward-backward", TINY),
    entry("forward-backward", VIT[0], bias=True),
)


def _names(mode: str, *problems: Problem) -> tuple[str, ...]:
    return tuple(f"gpu/attention/{mode}/{problem}" for problem in problems)


def _target(label: str, names: tuple[str, ...], limit: float, **options: Any) -> Target:
    return Target(f"GPU: {label}", names, dtype="bfloat16", device="cuda", each_at_least=limit, **options)


register(
    _target("forward, TFLOP/s", _names("forward", *LONG), 300.0, quantity="tflops"),
    _target("forward, over SDPA flash", _names("forward", *LONG), 0.95, peer="sdpa-flash"),
    _target("forward of ViTs, over SDPA flash", _names("forward", *VIT), 1.0, peer="sdpa-flash"),
    _target("forward with a dense bias, over SDPA efficient", _names("forward-bias", *VIT, LONG[0]), 2.0,
            peer="sdpa-efficient"),
    _target("backward, over SDPA flash", _names("backward", *LONG[:2], *VIT), 0.7, peer="sdpa-flash"),
    _target("backward with the bias gradient, over SDPA efficient",
            _names("backward-bias", VIT[0], VIT[2], LONG[0]), 1.5, peer="sdpa-efficient"),
)  # fmt: skip
