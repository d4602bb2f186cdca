"""Softmax attention over sequences of different lengths, packed one after another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from vitkernels.functional.arguments import check_flag, check_tensors, whole_number
from vitkernels.functional.score import PackedOptions, Score, operands
from vitkernels.ops import attention as _ops

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["attention_varlen"]


@overload
def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, is_causal: bool = ..., return_lse: Literal[False] = ..., **score: Unpack[PackedOptions],
) -> Tensor: ...  # fmt: skip


@overload
def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, is_causal: bool = ..., return_lse: Literal[True], **score: Unpack[PackedOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | Tensor | None = None,
    qk_norm: Literal["l2"] | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    head_map: Tensor | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`vitkernels.attention` inside each of several packed sequences; no padding is stored or computed.

    Args:
        query: ``(tokens_q, heads, d)``, the sequences one after another.
        key: ``(tokens_k, kv_heads, d)``.
        value: ``(tokens_k, kv_heads, dv)``.
        cu_seqlens_q: ``(sequences + 1,)`` int32 or int64: where each sequence begins in ``query``, then its number
            of tokens.
        cu_seqlens_k: likewise for ``key`` and ``value``.
        max_seqlen_q: length of the longest sequence of queries, or more.
        max_seqlen_k: length of the longest sequence of keys, or more.
        scale: as in :func:`vitkernels.attention`.
        qk_norm: as in :func:`vitkernels.attention`.
        bias: broadcastable to ``(sequences, heads, max_seqlen_q, max_seqlen_k)``, indexed by positions inside a
            sequence.
        key_bias: broadcastable to ``(sequences, heads, max_seqlen_k)``.
        multiplier: as ``bias``.
        head_map: as in :func:`vitkernels.attention`.
        is_causal: inside each sequence, query ``i`` sees the keys ``j <= i``.
        return_lse: also return the natural log of each row's sum of exponentials.

    Returns:
        ``out (tokens_q, heads, dv)``; with ``return_lse`` also ``lse (tokens_q, heads)``.

    A NaN or infinity in a key or value may reach queries that do not see it: they share a tile.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, or offsets that are not increasing from 0 to the number
            of tokens, naming the argument and what it takes. Offsets on a GPU are checked so with
            ``VITKERNELS_CHECK=1`` in the environment alone; otherwise tokens that no sequence covers have an ``out``
            of zero, an ``lse`` of minus infinity and gradients of zero.

    Source: the packed layout of Dao et al., "FlashAttention" (2022), in which NaViT (Dehghani et al., 2023) and
    Qwen2.5-VL (2025) hold images of different sizes.
    """
    score = Score(scale, qk_norm, bias, key_bias, multiplier, head_map=head_map)
    op = "attention_varlen"
    check_tensors(op, query=query, key=key, value=value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_flag(op, "is_causal", is_causal)
    check_flag(op, "return_lse", return_lse)
    query, key, terms, keys, _ = operands(op, query, key, value, score)
    longest = whole_number(op, "max_seqlen_q", max_seqlen_q), whole_number(op, "max_seqlen_k", max_seqlen_k)
    packing = (cu_seqlens_q, cu_seqlens_k, *longest)
    found: tuple[Tensor, Tensor] = _ops.attention_varlen(
        query, key, value, *packing, *terms, *keys, is_causal, _ops.allow_tf32(query)
    )
    return found if return_lse else found[0]
