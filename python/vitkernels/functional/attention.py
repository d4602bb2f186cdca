"""Dense softmax attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from vitkernels.functional.arguments import check_flag, check_tensors
from vitkernels.functional.score import Score, ScoreOptions, operands, with_additional_keys
from vitkernels.functional.words import Words
from vitkernels.ops import attention as _ops

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["attention"]

_WORDS = Words("attention")


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = ..., return_lse: Literal[False] = ...,
    **score: Unpack[ScoreOptions],
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = ..., return_lse: Literal[True],
    **score: Unpack[ScoreOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | Tensor | None = None,
    qk_norm: Literal["l2"] | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    bias_table: Tensor | None = None,
    multiplier_table: Tensor | None = None,
    rel_pos: Sequence[Tensor] | None = None,
    num_prefix_tokens: int = 0,
    head_map: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention of every query over every key, without an N x N matrix in memory.

    .. math::
        \ell_{ij} = s_h \, (q_i \cdot k_j) \, m_{ij} \, M_{i-j} + b_{ij} + c_j + T_{i-j}
        + \sum_a q_i \cdot R^a_{i_a - j_a}, \qquad
        o_i = \sum_j \operatorname{softmax}_j(\ell_{ij}) \, v_j

    The terms with an offset :math:`i - j` are for tokens on a grid of one to three axes, in row-major order, with
    ``Nq == Nk``. They are read from tables, which the grid's size follows from: an axis of ``n`` tokens has ``2 n - 1``
    offsets, and query coordinate ``i`` and key coordinate ``j`` share the entry ``i - j + n - 1`` (Swin's
    ``relative_position_index``). No matrix of size ``N x N`` is made of them, nor of their gradients.

    Args:
        query: ``(B, Nq, heads, d)``, or batch size 1 to share one query among all batches of ``key``.
        key: ``(B, Nk, kv_heads, d)``; ``heads`` must be a multiple of ``kv_heads`` (or see ``head_map``).
        value: ``(B, Nk, kv_heads, dv)``; ``dv`` may differ from ``d``.
        scale: factor on the logits, a number or a differentiable tensor: ``(heads,)``, or one number for all heads,
            ``()`` or ``(1,)``. Default ``d ** -0.5``.
        qk_norm: ``"l2"`` divides every query and key by its Euclidean norm first (cosine attention).
        bias: added to the logits, broadcastable to ``(B, heads, Nq, Nk)``. Its gradient is reduced, in a fixed
            order, straight into its own shape. ``-inf`` removes a key.
        key_bias: added to the logits of one key for all queries, broadcastable to ``(B, heads, Nk)``.
        multiplier: multiplied to the scaled logits before the bias, broadcastable to ``(B, heads, Nq, Nk)``.
        bias_table: ``(heads or 1, 2 n - 1 for each axis)``, :math:`T`: added to the logits by offset. A model that
            stores a table of unsigned offsets, or makes one from coordinates, computes this one from it. Its gradient
            is summed over the batch, and all pairs of tokens, in a fixed order.
        multiplier_table: likewise, :math:`M`: multiplied to the scaled product of query and key, as ``multiplier``.
        rel_pos: :math:`R^a`, for each axis an embedding of its offsets, ``(2 n - 1, d)`` or ``(heads, 2 n - 1, d)``,
            whose product with the query is added to the logits. The query is not scaled (but normalised, with
            ``qk_norm``); where a paper scales it, multiply the tables with ``scale``. A GPU holds the products of
            each query by the coordinates of the keys: ``h + w`` of them for a query on a grid of ``h x w``, but as
            many as logits on a grid of a single axis.
        num_prefix_tokens: how many of the first tokens (class token, registers) have no place on the grid: for their
            rows and columns, tables have bias 0 and multiplier 1.
        head_map: ``(heads,)`` integer tensor naming the kv head of each query head; uneven groups, and kv heads
            that nobody reads, are fine. On a GPU, a head that does not exist is as one without keys, unless
            ``VITKERNELS_CHECK=1`` in the environment has it raise.
        additional_keys: ``(B, Na, kv_heads, d)`` keys that every query sees besides ``key``; they get none of the
            terms above but the scale.
        additional_values: ``(B, Na, kv_heads, dv)``, their values.
        is_causal: query ``i`` sees the keys ``j <= i`` (aligned at the top left, as SDPA).
        return_lse: also return the natural log of each row's sum of exponentials.

    All of ``query``, ``key`` and ``value`` may have any strides as long as the last one is 1: a packed
    ``(B, N, 3, heads, d)`` projection is three views, no copy.

    Dtypes: float32, bfloat16, float16, and on the CPU float64; the accumulation and the statistics are float32
    (float64 for float64). All terms of the score and a tensor ``scale`` are float32 (float64 for
    float64); other floating dtypes are converted. Products of float32 on a GPU have full precision, or are of numbers
    rounded to TF32 where PyTorch's may be: ``torch.set_float32_matmul_precision("high")`` (or ``"medium"``) at the
    time of the call. The backward goes by the setting of its forward.

    Returns:
        ``out (B, Nq, heads, dv)`` in the dtype of ``query``; with ``return_lse`` also
        ``lse (B, Nq, heads)`` in float32 (float64 for float64), differentiable. A query that sees no key gets
        ``out = 0`` and ``lse = -inf``.

    A NaN or infinity in a key or value may reach queries that do not see it: they share a tile.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Limit: the backward gets the probabilities from ``lse``. Where that is beyond about 1e7 in magnitude (a row whose
    every key is masked with ``finfo.min``, say), float32 cannot hold the part of it that counts tied keys: the output
    is right, the gradient of such a row is not.

    Source: Vaswani et al., "Attention Is All You Need", eq. 1; computed with the online softmax of Milakov and
    Gimelshein (2018) and the recomputing backward of Dao et al., "FlashAttention" (2022), algorithm 4.
    ``bias_table``: Liu et al., "Swin Transformer" (2021), eq. 4; ``rel_pos``: Huang et al., "Music Transformer"
    (2019), eq. 3, and for several axes Li et al., "MViTv2" (2022), eq. 4.
    """
    score = Score(
        scale, qk_norm, bias, key_bias, multiplier, bias_table, multiplier_table, rel_pos, num_prefix_tokens, head_map,
        additional_keys, additional_values,
    )  # fmt: skip
    check_tensors("attention", query=query, key=key, value=value)
    check_flag("attention", "is_causal", is_causal)
    check_flag("attention", "return_lse", return_lse)
    given = operands("attention", query, key, value, score)
    query, key, terms, keys, _ = given
    found: tuple[Tensor, Tensor]
    try:
        found = _ops.attention(query, key, value, *terms, *keys, is_causal, _ops.allow_tf32(query))
    except RuntimeError as error:
        raise _WORDS.of(error, "attention", rel_pos) from None
    if additional_values is not None:
        found = with_additional_keys(_WORDS, found, given, additional_values)
    return found if return_lse else found[0]
