"""Softmax attention on a map, by a rule for each of its axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from vitkernels.axes import Axis, encode
from vitkernels.functional.arguments import check_flag, check_tensors, held_in_trace
from vitkernels.functional.score import (
    Outside,
    Score,
    SpatialOptions,
    norms_in_operator,
    operands,
    with_additional_keys,
)
from vitkernels.functional.words import Words
from vitkernels.ops import attention as _ops

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["attend_on_map", "spatial_attention"]

_WORDS = Words("spatial_attention")


@overload
def spatial_attention(
    query: Tensor, key: Tensor, value: Tensor, axes: Sequence[Axis], *, is_shared_query: bool = ...,
    return_lse: Literal[False] = ..., **score: Unpack[SpatialOptions],
) -> Tensor: ...  # fmt: skip


@overload
def spatial_attention(
    query: Tensor, key: Tensor, value: Tensor, axes: Sequence[Axis], *, is_shared_query: bool = ...,
    return_lse: Literal[True], **score: Unpack[SpatialOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def spatial_attention(
    query: Tensor, key: Tensor, value: Tensor, axes: Sequence[Axis], *, is_shared_query: bool = ...,
    return_lse: bool = ..., **score: Unpack[SpatialOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def spatial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: Sequence[Axis],
    *,
    scale: float | Tensor | None = None,
    qk_norm: Literal["l2"] | None = None,
    key_bias: Tensor | None = None,
    bias_table: Tensor | None = None,
    multiplier_table: Tensor | None = None,
    rel_pos: Sequence[Tensor] | None = None,
    head_map: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    outside: Outside | None = None,
    radius: float | None = None,
    is_shared_query: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention on a map of one to three axes: a query sees a contiguous range of keys on each of them.

    .. math::
        \ell_{ij} = s_h \, (q_i \cdot k_j) \, M_{i-j} + c_j + T_{i-j} + \sum_a q_i \cdot R^a_{i_a - j_a}, \qquad
        o_i = \sum_{j \in K(i)} \operatorname{softmax}_{j \in K(i)}(\ell_{ij}) \, v_j, \qquad
        K(i) = \prod_a K_a(i_a)

    Windows, grids, stripes, halos and neighborhoods are such patterns: see :class:`vitkernels.Full`,
    :class:`vitkernels.Block`, :class:`vitkernels.Halo`, :class:`vitkernels.Neighborhood` and
    :class:`vitkernels.Sliding`. The map is read and written where it is: nothing is rolled, partitioned, padded or
    gathered, and no mask is made.

    Args:
        query: ``(B, *map, heads, d)``, or batch size 1 to share one query among all batches of ``key``.
        key: ``(B, *key_map, kv_heads, d)``; ``heads`` must be a multiple of ``kv_heads`` (or see ``head_map``). The
            map of the keys may be finer or coarser than that of the queries: query ``u`` of ``n`` is at
            ``u * key_n // n``.
        value: ``(B, *key_map, kv_heads, dv)``; ``dv`` may differ from ``d``.
        axes: the rule of each axis of the map.
        scale: factor on the logits, a number or a differentiable tensor: ``(heads,)``, or one number for all heads,
            ``()`` or ``(1,)``. Default ``d ** -0.5``.
        qk_norm: ``"l2"`` divides every query and key by its Euclidean norm first (cosine attention).
        key_bias: :math:`c`, added to the logits of one key for all queries, broadcastable to
            ``(B, heads, *key_map)``. ``-inf`` removes a key.
        bias_table: :math:`T`, ``(heads or 1, offsets for each axis)``, added to the logits by the offset of the query
            from the key, counted on the axis' residue class. The number of offsets is odd, the middle one is 0, and
            none that the pattern has may lie beyond: ``2 size - 1`` for a block, ``2 (size + halo) - 1`` with a halo,
            ``2 kernel_size - 1`` for a neighborhood, ``2 (kernel_size // 2) + 1`` for a sliding window. Its gradient
            is summed, in a fixed order, straight into its own shape.
        multiplier_table: likewise, :math:`M`: multiplied to the scaled product of query and key.
        rel_pos: :math:`R^a`, for each axis an embedding of its offsets, ``(offsets, d)`` or ``(heads, offsets, d)``,
            whose product with the query is added to the logits. The query is not scaled (but normalised, with
            ``qk_norm``).
        head_map: ``(heads,)`` integer tensor naming the kv head of each query head.
        additional_keys: ``(B, Na, kv_heads, d)`` keys that every query sees besides its own; they get none of the
            terms above but the scale.
        additional_values: ``(B, Na, kv_heads, dv)``, their values.
        outside: what a rule finds beyond the border of the map: ``None``, no keys; ``"zero"``, keys and values of
            zeros, which get the terms by offset; or such a key and value for each head,
            ``((kv_heads, d), (kv_heads, dv))``, both differentiable. Causal axes have no keys outside.
        radius: only keys at most this far from the query, in tokens of the map along a straight line.
        is_shared_query: ``query`` is one window, ``(B, *window, heads, d)``, for all windows of the map. All axes are
            then blocks of its size without shift that divide the map.
        return_lse: also return the natural log of each row's sum of exponentials.

    ``query``, ``key`` and ``value`` may have any strides as long as the last one is 1. The dtypes are those of
    :func:`vitkernels.attention`.

    Returns:
        ``out (B, *map, heads, dv)`` in the dtype of ``query``; with ``return_lse`` also ``lse (B, *map, heads)`` in
        float32 (float64 for float64), differentiable. A query that sees no key gets ``out = 0`` and ``lse = -inf``.

    A NaN or infinity in a key, a value or a table may reach queries that do not see it: they share a tile.

    Raises:
        RuntimeError: on a wrong rank, dtype, device, size or rule, naming the argument and what it takes.

    Source: Liu et al., "Swin Transformer" (2021), section 3.2; Vaswani et al., "Scaling Local Self-Attention for
    Parameter Efficient Visual Backbones" (2021), section 2.2; Hassani et al., "Neighborhood Attention Transformer"
    (2023), eq. 2 to 4; Tu et al., "MaxViT" (2022), section 3.2.
    """
    op = _WORDS.function
    if not isinstance(axes, (list, tuple)) or not all(isinstance(axis, Axis) for axis in axes):
        raise RuntimeError(f"vitkernels::{op}: axes is {axes!r}, takes a sequence of vitkernels.Full, Block, ...")
    check_tensors(op, query=query, key=key, value=value)
    check_flag(op, "is_shared_query", is_shared_query)
    check_flag(op, "return_lse", return_lse)
    for axis in axes:
        query = held_in_trace(op, query, **axis.traced)
    score = Score(
        scale, qk_norm, None, key_bias, None, bias_table, multiplier_table, rel_pos, 0, head_map, additional_keys,
        additional_values, outside, radius,
    )  # fmt: skip
    found = attend_on_map(_WORDS, query, key, value, axes, score, is_shared_query)
    return found if return_lse else found[0]


def attend_on_map(
    words: Words,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: Sequence[Axis],
    score: Score,
    is_shared_query: bool = False,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse``, for the function of ``words``."""
    given = operands(words.function, query, key, value, score, len(axes))
    query, key, terms, keys, _ = given
    qk_norm = score.qk_norm is not None and norms_in_operator(score, len(axes))
    found: tuple[Tensor, Tensor]
    try:
        found = _ops.spatial_attention(
            query, key, value, encode(axes), is_shared_query, qk_norm, *terms, *keys, _ops.allow_tf32(query)
        )
    except RuntimeError as error:
        raise words.of(error, "spatial_attention", score.rel_pos) from None
    if score.additional_values is not None:
        found = with_additional_keys(words, found, given, score.additional_values)
    return found
