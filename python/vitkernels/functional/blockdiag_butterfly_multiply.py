"""Products with Monarch matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels.functional.arguments import check_stored, check_tensors
from vitkernels.ops.attention import allow_tf32
from vitkernels.ops.monarch import blockdiag_butterfly_multiply as _multiply

__all__ = ["blockdiag_butterfly_multiply"]

_OP = "blockdiag_butterfly_multiply"


def blockdiag_butterfly_multiply(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    r"""Product with a Monarch matrix: two block-diagonal matrices with a permutation between them and behind them.

    .. math::
        t_{iq + a} = \sum_b w^1_{iab} \, x_{ip + b}, \qquad y_{sl + j} = \sum_r w^2_{jsr} \, t_{rl + j}

    Blocks of the first matrix read neighbors. Those of the second take turns, both in what they read and in what they
    write. The forward leaves no intermediate ``t`` in memory, and permutes nothing there; the backward computes ``t``
    again.

    Args:
        x: ``(..., k * p)``. Leading dimensions that are no single stride apart are copied.
        w1: ``(k, q, p)``, the blocks of the first matrix.
        w2: ``(l, s, r)`` with ``l * r == k * q``, those of the second. The numbers of blocks may differ.

    The dtypes are float64, float32, bfloat16 and float16, the same for all three. Products are added up in float32
    (float64 for float64). For bfloat16 the intermediate is rounded to it where the CPU multiplies bfloat16; elsewhere
    it stays float32. There are no CUDA kernels yet.

    Returns:
        ``(..., s * l)`` in the dtype of ``x``, with the same bits in every run, gradients included.

    A NaN or infinity in a row of ``x`` reaches that row alone.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Source: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training" (2022), section 3.
    """
    check_tensors(_OP, x=x, w1=w1, w2=w2)
    if x.dim() == 0:
        raise RuntimeError(f"vitkernels::{_OP}: x has shape (), takes at least 1 dimension (..., k * p)")
    if x.dim() > 2:
        check_stored(_OP, x=x)
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    out: Tensor = _multiply(rows, w1, w2, allow_tf32(x))
    return out[0] if x.dim() == 1 else torch.unflatten(out, 0, x.shape[:-1])
