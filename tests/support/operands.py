"""Operands of attention as its 16-bit kernels take them, and the rounding of their dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def tokens(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(
    b: int = 1, q: int = 40, k: int = 50, h: int = 2, d: int = 32, v: int | None = None, kv_heads: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of batch ``b``, ``q`` queries, ``k`` keys and ``h`` heads with ``d`` columns, values with ``v``."""
    g = kv_heads or h
    return (
        tokens(b, q, h, d, dtype=dtype), tokens(b, k, g, d, dtype=dtype, seed=1),
        tokens(b, k, g, v or d, dtype=dtype, seed=2),
    )  # fmt: skip
