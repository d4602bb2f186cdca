"""Linear attention over sequences of different lengths, packed one after another."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vitkernels.feature_map import FeatureMap
from vitkernels.functional.arguments import check_tensors, whole_number
from vitkernels.functional.linear_attention import Options, linear
from vitkernels.ops.linear_attention import linear_attention_varlen as _linear_attention_varlen

__all__ = ["linear_attention_varlen"]


def linear_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    feature_map: str | FeatureMap = "relu",
    normalize: bool = True,
    eps: float = 1e-6,
    scale: float = 1.0,
    qk_norm: Literal["l2"] | None = None,
    residual_v: float = 0.0,
    head_map: Tensor | None = None,
) -> Tensor:
    """:func:`vitkernels.linear_attention` inside each of several packed sequences; no padding is stored or computed.

    Args:
        query: ``(tokens_q, heads, d)``, the sequences one after another.
        key: ``(tokens_k, kv_heads, d)``.
        value: ``(tokens_k, kv_heads, dv)``.
        cu_seqlens_q: ``(sequences + 1,)`` int32 or int64: where each sequence begins in ``query``, then its number
            of tokens.
        cu_seqlens_k: likewise for ``key`` and ``value``.
        max_seqlen_q: length of the longest sequence of queries, or more.
        max_seqlen_k: length of the longest sequence of keys, or more.
        feature_map: as in :func:`vitkernels.linear_attention`.
        normalize: as there.
        eps: as there.
        scale: as there.
        qk_norm: as there.
        residual_v: as there: times the row of ``value`` that has the query's place among all tokens.
        head_map: as in :func:`vitkernels.attention`.

    Returns:
        ``(tokens_q, heads, dv)`` in the dtype of ``query``, with the same bits in every run, gradients included.

    A NaN or infinity in a key or value reaches all queries of its sequence.

    Raises:
        RuntimeError: on a wrong rank, dtype, device, size or option, or offsets that are not increasing from 0 to the
            number of tokens, naming the argument and what it takes. Offsets on a GPU are checked so with
            ``VITKERNELS_CHECK=1`` in the environment alone; otherwise tokens that no sequence covers have an output
            and gradients of zero.

    Source: as :func:`vitkernels.linear_attention` and :func:`vitkernels.attention_varlen`.
    """
    op = "linear_attention_varlen"
    check_tensors(op, query=query, key=key, value=value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    longest = whole_number(op, "max_seqlen_q", max_seqlen_q), whole_number(op, "max_seqlen_k", max_seqlen_k)
    options = Options(feature_map, normalize, eps, scale, qk_norm, residual_v, head_map)
    return linear(op, _linear_attention_varlen, query, key, value, (cu_seqlens_q, cu_seqlens_k, *longest), options)
