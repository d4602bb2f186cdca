"""Long convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels.functional.arguments import check_flag, check_stored, check_tensors
from vitkernels.ops.monarch import long_conv as _long_conv

__all__ = ["long_conv"]

_OP = "long_conv"


def long_conv(x: Tensor, filter: Tensor, *, is_causal: bool = True) -> Tensor:
    r"""Convolution of each channel with a filter of its own that may be as long as the sequence.

    .. math::
        y_{ct} = \sum_l h_{cl} \, x_{c, t - l}

    With ``is_causal``, the lags are :math:`0 \le l < M`, those of the taps in order. Without, they are
    :math:`-m \le l \le m` for :math:`2m + 1` taps: the same number of positions ahead and behind. Positions beyond the
    sequence are zeros, not those at its other end.

    The cost is that of fast Fourier transforms, :math:`O(N \log N)`. Each is factored as a Monarch matrix is: first
    over columns, then over rows, of the sequence as a matrix. What lies between reading ``x`` and writing ``y`` stays
    in the cache. Any length is fine; the fastest are :math:`2^a` and :math:`3 \cdot 2^a`, to which shorter ones are
    padded; on a GPU :math:`2^a`. There, more than 8192 positions take 8 bytes of global memory each, in ``x`` and in
    its gradient, while the operator runs; the most are :math:`2^{28}`.

    Args:
        x: ``(..., channels, N)`` of any strides. Two layouts are fast and are kept in the result: contiguous, and
            ``tokens.transpose(-1, -2)`` of contiguous tokens ``(..., N, channels)``.
        filter: ``(channels, M)`` with ``1 <= M <= N``; without ``is_causal`` an odd number of taps up to ``2 * N - 1``.
            The two filters of M2-BERT are ``torch.cat((k_rev[:, : N - 1].flip(-1), k), -1)``: ``k`` has the lags from
            0 on, ``k_rev`` those from -1 down.
        is_causal: whether ``y[t]`` depends on ``x[: t + 1]`` alone.

    The dtypes are float64 (on the CPU only), float32, bfloat16 and float16, the same for both. Everything between the
    inputs and the rounded result is float32 (float64 for float64).

    Returns:
        ``(..., channels, N)`` in the dtype of ``x``, with the same bits in every run, gradients included.

    A NaN or infinity in ``x`` reaches all positions of its channel in its batch, and no other: it has no position in a
    spectrum. Likewise rounding errors are relative to the largest values of the channel, at every position.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Sources: Fu et al., "Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture" (2023), section 4; Poli et al.,
    "Hyena Hierarchy: Towards Larger Convolutional Language Models" (2023), section 3; Fu et al., "FlashFFTConv:
    Efficient Convolutions for Long Sequences with Tensor Cores" (2023), section 3.
    """
    check_tensors(_OP, x=x, filter=filter)
    check_flag(_OP, "is_causal", is_causal)
    if x.dim() < 2:
        raise RuntimeError(
            f"vitkernels::{_OP}: x has shape {tuple(x.shape)}, takes at least 2 dimensions (..., channels, N)"
        )
    check_stored(_OP, x=x)
    batch = x[None] if x.dim() == 2 else x.flatten(0, -3)
    channels_last = batch.stride(-2) == 1 and batch.stride(-1) != 1
    if channels_last:
        batch = batch.transpose(1, 2)
    out: Tensor = _long_conv(batch, filter, channels_last, is_causal)
    if channels_last:
        out = out.transpose(1, 2)
    return out[0] if x.dim() == 2 else torch.unflatten(out, 0, x.shape[:-2])
