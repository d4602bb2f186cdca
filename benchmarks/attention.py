"""Entries of ``attention``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.ours import vk
from benchmarks.registry import OURS, Call, Entry, Inputs, Peer, Target, register

# From query, key, value (B, N, H, D), views of a packed projection, and a bias (1, H, N, N) or None.
Implementation = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    tokens: int
    dim: int

    def __str__(self) -> str:
        return f"b{self.batch}-h{self.heads}-n{self.tokens}-d{self.dim}"

    @property
    def product_flops(self) -> float:
        """Of one of the N x N x D products of all heads."""
        return 2.0 * self.batch * self.heads * self.tokens**2 * self.dim

    @property
    def elements(self) -> int:
        """Of one of query, key, value, out."""
        return self.batch * self.tokens * self.heads * self.dim

    @property
    def bias_elements(self) -> int:
        return self.heads * self.tokens**2


VIT_224 = Shape(8, 6, 197, 64)  # ViT-S/16
DINOV2_224 = Shape(8, 6, 257, 64)  # ViT-S/14
VIT_384 = Shape(4, 12, 577, 64)  # ViT-B/16
DINOV2_518 = Shape(1, 6, 1370, 64)  # ViT-S/14
LARGE = Shape(1, 12, 4096, 64)  # 1024 x 1024 pixels in patches of 16
FIVE = (VIT_224, DINOV2_224, VIT_384, DINOV2_518, LARGE)
TINY = Shape(64, 3, 49, 32)  # the windows of a Swin-T stage
LONG = Shape(1, 1, 50_176, 64)  # every pixel of 224 x 224


def _ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return vk.attention(q, k, v, bias=bias)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def _sdpa_math(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return _sdpa(q, k, v, bias)


def _eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    logits = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    return (logits.softmax(-1) @ v).transpose(1, 2)


def _flex(inputs: Inputs) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    # One size per compilation, as the other peers have it, and an error instead of a silent eager run.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    q, k, v = (t.transpose(1, 2) for t in inputs["qkv"].unbind(2))
    bias = inputs.get("bias")

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[0, h, i, j]

    score_mod = None if bias is None else add_bias
    return lambda: (compiled(q, k, v, score_mod=score_mod).transpose(1, 2),)


def _forward(implementation: Implementation) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        q, k, v = inputs["qkv"].unbind(2)
        return lambda: (implementation(q, k, v, inputs.get("bias")),)

    return prepare


def _backward(implementation: Implementation) -> Callable[[Inputs], Call]:
    """Forward, then the gradients of query, key, value and, if there is one, of the bias."""

    def prepare(inputs: Inputs) -> Call:
        q, k, v = leaves = [t.detach().requires_grad_() for t in inputs["qkv"].unbind(2)]
        bias = inputs["bias"].detach().requires_grad_() if "bias" in inputs else None
        if bias is not None:
            leaves.append(bias)

        def call() -> tuple[Tensor, ...]:
            out = implementation(q, k, v, bias)
            return (out.detach(), *torch.autograd.grad(out, leaves, inputs["grad_out"]))

        return call

    return prepare


def _inputs(shape: Shape, *, bias: bool, grad: bool) -> Callable[[torch.dtype, torch.device], Inputs]:
    b, h, n, d = shape.batch, shape.heads, shape.tokens, shape.dim

    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=generator).to(dtype)

        inputs = {"qkv": randn(b, n, 3, h, d)}
        if bias:
            inputs["bias"] = randn(1, h, n, n)
        if grad:
            inputs["grad_out"] = randn(b, n, h, d)
        return inputs

    return make


def _entry(
    mode: str,
    shape: Shape,
    *,
    dtypes: tuple[str, ...] = ("float32",),
    quadratic_peers: bool = True,
    once: bool = False,
) -> Entry:
    backward, bias = mode.startswith("backward"), mode.endswith("bias")
    wrap = _backward if backward else _forward
    peers = [Peer(OURS, wrap(_ours)), Peer("sdpa", wrap(_sdpa))]
    if quadratic_peers:
        # In low precision the N x N matrices of these are converted back and forth on most CPUs.
        peers.append(Peer("sdpa-math", wrap(_sdpa_math), dtypes=("float32",)))
        peers.append(Peer("eager", wrap(_eager), dtypes=("float32",)))
    if not backward and not once:
        peers.append(Peer("flex", _flex, option="flex", in_fresh_process=False))
    # Backward recomputes the logits: five products after the two of the forward pass.
    products = 7 if backward else 2
    tensors = 8 if backward else 4
    biases = 2 if backward and bias else int(bias)
    return Entry(
        name=f"attention/{mode}/{shape}",
        inputs=_inputs(shape, bias=bias, grad=backward),
        peers=tuple(peers),
        flops=products * shape.product_flops,
        elements=tensors * shape.elements + biases * shape.bias_elements,
        dtypes=dtypes,
        once=once,
    )


_THREE_DTYPES = ("float32", "bfloat16", "float16")
_TWO_DTYPES = ("float32", "bfloat16")

register(
    _entry("forward", VIT_224, dtypes=_THREE_DTYPES),
    _entry("forward", DINOV2_224, dtypes=_TWO_DTYPES),
    _entry("forward", VIT_384, dtypes=_TWO_DTYPES),
    _entry("forward", DINOV2_518, dtypes=_THREE_DTYPES),
    _entry("forward", LARGE, dtypes=_TWO_DTYPES, quadratic_peers=False),
    _entry("forward", TINY, dtypes=_TWO_DTYPES),
    *(_entry("forward-bias", shape, quadratic_peers=shape is VIT_224) for shape in (*FIVE, TINY)),
    _entry("backward", VIT_224, dtypes=_THREE_DTYPES),
    _entry("backward", DINOV2_224, dtypes=_TWO_DTYPES, quadratic_peers=False),
    _entry("backward", VIT_384, dtypes=_TWO_DTYPES),
    _entry("backward", DINOV2_518, dtypes=_TWO_DTYPES, quadratic_peers=False),
    _entry("backward", LARGE, dtypes=_TWO_DTYPES, quadratic_peers=False),
    _entry("backward", TINY),
    _entry("backward-bias", VIT_224),
    _entry("backward-bias", VIT_384),
    _entry("forward", LONG, quadratic_peers=False, once=True),
    _entry("backward", LONG, quadratic_peers=False, once=True),
)


def _names(mode: str, *shapes: Shape) -> tuple[str, ...]:
    return tuple(f"attention/{mode}/{shape}" for shape in shapes)


register(
    Target("forward", _names("forward", *FIVE), mean_at_least=1.5, each_at_least=1.25),
    Target("forward, many tiny problems", _names("forward", TINY), each_at_least=2.0),
    Target("forward with a dense bias", _names("forward-bias", *FIVE), mean_at_least=1.5),
    Target("forward + backward", _names("backward", *FIVE), mean_at_least=1.25),
    Target("forward, bfloat16", _names("forward", *FIVE), dtype="bfloat16", mean_at_least=2.0, each_at_least=1.7),
    Target("forward + backward, bfloat16", _names("backward", *FIVE), dtype="bfloat16", mean_at_least=2.0),
    Target(
        "forward + backward with the bias gradient, N 197",
        _names("backward-bias", VIT_224),
        each_at_least=1.5,
    ),
    Target(
        "forward + backward with the bias gradient, N 577",
        _names("backward-bias", VIT_384),
        each_at_least=2.0,
    ),
    Target(
        "peak extra memory at N 50,176, MB",
        (*_names("forward", LONG), *_names("backward", LONG)),
        quantity="peak_mb",
        each_below=100.0,
    ),
)
