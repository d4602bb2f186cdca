"""The transpose of an attention map, applied to values of the queries."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vitkernels.functional.arguments import check_flag, check_tensors, in_statistics_dtype
from vitkernels.functional.score import Score, operands
from vitkernels.ops import attention as _ops

__all__ = ["attention_transposed"]


def attention_transposed(
    query: Tensor,
    key: Tensor,
    value_q: Tensor,
    lse: Tensor,
    *,
    query_weight: Tensor | None = None,
    scale: float | Tensor | None = None,
    qk_norm: Literal["l2"] | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    head_map: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    r"""From the queries back to the keys through the map of an attention, without an N x N matrix in memory.

    .. math::
        P_{ij} = e^{\ell_{ij} - \mathrm{lse}_i}, \qquad o_j = \sum_i w_i \, P_{ij} \, v'_i

    with the logits :math:`\ell` of :func:`vitkernels.attention`. Given the same arguments and the ``lse`` that it
    returned, ``P`` is its softmax. Values of one (``torch.ones(1, 1, 1, 1).expand(B, Nq, heads, 1)``) give the column
    sums of ``P``: how much attention each key receives. With a single query that is the query's row of ``P``.

    Args:
        query: ``(B, Nq, heads, d)``, or batch size 1 to share one query among all batches of ``key``.
        key: ``(B, Nk, kv_heads, d)``; ``heads`` must be a multiple of ``kv_heads`` (or see ``head_map``).
        value_q: ``(B, Nq, heads, dv)``, a value for each query and head.
        lse: ``(B, Nq, heads)``, float32 (float64 for float64): the log-sum-exp of each row. A row with ``-inf``
            contributes nothing.
        query_weight: factor on what a query contributes, broadcastable to ``(B, Nq, heads)``; float32 (float64 for
            float64), other floating dtypes are converted. Its gradient is reduced, in a fixed order, straight into
            its own shape.
        scale: as in :func:`vitkernels.attention`.
        qk_norm: as in :func:`vitkernels.attention`.
        bias: as in :func:`vitkernels.attention`.
        key_bias: as in :func:`vitkernels.attention`.
        multiplier: as in :func:`vitkernels.attention`.
        head_map: as in :func:`vitkernels.attention`.
        is_causal: as in :func:`vitkernels.attention`.

    ``query``, ``key`` and ``value_q`` may have any strides as long as the last one is 1. The dtypes are those of
    :func:`vitkernels.attention`.

    Returns:
        ``(B, Nk, heads, dv)`` in the dtype of ``query``: every query head has a result of its own, also where several
        share a kv head. Differentiable in every floating-point argument, ``lse`` included: through both operators
        together the gradients are those of the softmax.

    A NaN or infinity in a row of ``value_q`` may reach keys that its query does not see: they share a tile.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Source: Koner et al., "LookupViT: Compressing visual information to a limited number of tokens" (2024), where the
    map of a cross-attention is used in both directions.
    """
    op = "attention_transposed"
    score = Score(scale, qk_norm, bias, key_bias, multiplier, head_map=head_map)
    check_tensors(op, query=query, key=key, value_q=value_q, lse=lse)
    check_flag(op, "is_causal", is_causal)
    query, key, terms, keys, _ = operands(op, query, key, value_q, score)
    if query_weight is not None:
        check_tensors(op, query_weight=query_weight)
        query_weight = in_statistics_dtype(op, query, "query_weight", query_weight)
    out: Tensor = _ops.attention_transposed(
        query, key, value_q, lse, query_weight, *terms, *keys, is_causal, _ops.allow_tf32(query)
    )
    return out
