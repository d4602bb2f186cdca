"""The definition of the product with a Monarch matrix, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["blockdiag_butterfly_multiply"]


def blockdiag_butterfly_multiply(
    x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None = None, *, activation: str = "none"
) -> Tensor:
    """Same arguments, shapes and results as :func:`vitkernels.blockdiag_butterfly_multiply`."""
    k, _, p = w1.shape
    turns, _, r = w2.shape
    inner = torch.einsum("...kp,kqp->...kq", torch.unflatten(x, -1, (k, p)), w1).flatten(-2)
    out = torch.einsum("...rl,lsr->...sl", torch.unflatten(inner, -1, (r, turns)), w2).flatten(-2)
    if bias is not None:
        out = out + bias.to(out.dtype)
    return torch.nn.functional.gelu(out) if activation == "gelu" else out
