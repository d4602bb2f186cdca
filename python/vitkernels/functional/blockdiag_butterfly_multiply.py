"""Products with Monarch matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkernels._library import multiplies_bfloat16
from vitkernels.functional.arguments import check_stored, check_tensors
from vitkernels.ops.attention import allow_tf32
from vitkernels.ops.monarch import blockdiag_butterfly_multiply as _multiply

__all__ = ["blockdiag_butterfly_multiply"]

_OP = "blockdiag_butterfly_multiply"
_ACTIVATIONS = ("none", "gelu")  # Activation in csrc/monarch/monarch.h


def blockdiag_butterfly_multiply(
    x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None = None, *, activation: str = "none"
) -> Tensor:
    r"""Product with a Monarch matrix: two block-diagonal matrices with a permutation between them and behind them.

    .. math::
        t_{iq + a} = \sum_b w^1_{iab} \, x_{ip + b}, \qquad
        y_{sl + j} = \sigma \big( \mathrm{bias}_{sl + j} + \sum_r w^2_{jsr} \, t_{rl + j} \big)

    Blocks of the first matrix read neighbors. Those of the second take turns, both in what they read and in what they
    write. The forward permutes nothing in memory. It leaves ``t`` there only where a gradient is recorded that would
    have to repeat the first product otherwise, and ``t`` is in the dtype of ``x``.

    Args:
        x: ``(..., k * p)``. Leading dimensions that are no single stride apart are copied.
        w1: ``(k, q, p)``, the blocks of the first matrix.
        w2: ``(l, s, r)`` with ``l * r == k * q``, those of the second. The numbers of blocks may differ.
        bias: ``(s * l)``, in the dtype of ``x`` or in float32 (float64 for float64).
        activation: :math:`\sigma`, ``"none"`` or ``"gelu"``, :math:`x \, \Phi(x)`. The backward computes its argument
            again: less memory than GELU apart, and a fifth more time of both directions.

    The dtypes are float64, float32, bfloat16 and float16, the same for x, w1 and w2. Products are added up in float32
    (float64 for float64). For bfloat16 the intermediate is rounded to it where the CPU multiplies bfloat16; elsewhere
    on the CPU it stays float32. On CUDA it is rounded to the dtype of ``x``; float64 is not taken there, and a weight
    has less than ``2 ** 31`` elements. float32 is multiplied as TF32 where PyTorch allows it.

    Returns:
        ``(..., s * l)`` in the dtype of ``x``, with the same bits in every run, gradients included.

    A NaN or infinity in a row of ``x`` reaches that row alone.

    Raises:
        RuntimeError: on a wrong rank, dtype, device, size or activation, naming the argument and what it takes.

    Source: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training" (2022), section 3.
    """
    return multiply(x, w1, w2, bias, activation)


def multiply(
    x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None, activation: str, packed: Tensor | None = None
) -> Tensor:
    """The same; ``packed``, by ``vitkernels::blockdiag_butterfly_pack``, is read instead of both weights."""
    check_tensors(_OP, x=x, w1=w1, w2=w2)
    if bias is not None:
        check_tensors(_OP, bias=bias)
    if x.dim() == 0:
        raise RuntimeError(f"vitkernels::{_OP}: x has shape (), takes at least 1 dimension (..., k * p)")
    if x.dim() > 2:
        check_stored(_OP, x=x)
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    keeps_inner = _keeps_inner(activation, x, w1, w2, bias)
    out, _ = _multiply(rows, w1, w2, bias, _number_of(activation), allow_tf32(x), keeps_inner, packed)
    return out[0] if x.dim() == 1 else torch.unflatten(out, 0, x.shape[:-1])


def _keeps_inner(activation: str, x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None) -> bool:
    """Whether a backward will read the intermediate, to our knowledge: without it, it computes it again."""
    if torch.compiler.is_exporting() or not torch.is_grad_enabled():
        return False
    is_cast = x.is_cpu and torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if is_cast else x.dtype
    # Where kernels have it in float32, it would lose bits and range in the dtype of x.
    if x.is_cpu and (dtype == torch.float16 or (dtype == torch.bfloat16 and not multiplies_bfloat16)):
        return False
    needed_by = (w2,) if activation == "none" else (x, w1, w2, bias)
    return any(t is not None and t.requires_grad for t in needed_by)


def _number_of(activation: Any) -> int:
    if isinstance(activation, str) and activation in _ACTIVATIONS:
        return _ACTIVATIONS.index(activation)
    takes = " or ".join(map(repr, _ACTIVATIONS))
    raise RuntimeError(f"vitkernels::{_OP}: activation is {activation!r}, takes {takes}")
