"""Attention to keys that lists name: of clusters, of the most promising keys of each query."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from vitkernels.functional.arguments import check_flag, check_rank, check_tensors, is_readable
from vitkernels.functional.score import Score, operands
from vitkernels.ops import attention as _ops

__all__ = ["indexed_attention"]

_OP = "indexed_attention"


@overload
def indexed_attention(
    query: Tensor, key: Tensor, value: Tensor, key_index: Tensor, key_count: Tensor | None = ...,
    query_index: Tensor | None = ..., *, duplicates: Literal["mean", "sum"] = ..., scale: float | Tensor | None = ...,
    qk_norm: Literal["l2"] | None = ..., head_map: Tensor | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def indexed_attention(
    query: Tensor, key: Tensor, value: Tensor, key_index: Tensor, key_count: Tensor | None = ...,
    query_index: Tensor | None = ..., *, duplicates: Literal["mean", "sum"] = ..., scale: float | Tensor | None = ...,
    qk_norm: Literal["l2"] | None = ..., head_map: Tensor | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def indexed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_index: Tensor,
    key_count: Tensor | None = None,
    query_index: Tensor | None = None,
    *,
    duplicates: Literal["mean", "sum"] = "mean",
    scale: float | Tensor | None = None,
    qk_norm: Literal["l2"] | None = None,
    head_map: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention where each group of queries sees the keys that its list names.

    .. math::
        o_i = \sum_t \operatorname{softmax}_{t < n_g}(s_h \, q_i \cdot k_{I_{g,t}}) \, v_{I_{g,t}}, \qquad i \in g

    Keys and values are read where they are: nothing is gathered.

    Args:
        query: ``(B, Nq, heads, d)``.
        key: ``(B, Nk, kv_heads, d)``; ``heads`` must be a multiple of ``kv_heads`` (or see ``head_map``).
        value: ``(B, Nk, kv_heads, dv)``; ``dv`` may differ from ``d``.
        key_index: ``(B, heads or 1, groups, width)`` int64 or int32, the keys of each group. A key that is listed twice
            counts twice.
        key_count: ``(B, heads or 1, groups)`` int64 or int32, how many of them count, as many heads as ``key_index``.
        query_index: ``(B, heads or 1, groups, members)`` int64 or int32, the queries of each group. Default: ``groups``
            must divide ``Nq``, and a group is as many neighboring queries as that makes.
        duplicates: what a query in several groups gets, the ``"mean"`` or the ``"sum"`` of its results. One in no
            group gets zeros.
        scale: factor on the logits, a number or a differentiable tensor: ``(heads,)``, or one number for all heads.
            Default ``d ** -0.5``.
        qk_norm: ``"l2"`` divides every query and key by its Euclidean norm first (cosine attention).
        head_map: ``(heads,)`` integer tensor naming the kv head of each query head.
        return_lse: also return the natural log of each row's sum of exponentials; not with ``query_index``.

    ``query``, ``key`` and ``value`` may have any strides as long as the last one is 1. The dtypes are those of
    :func:`vitkernels.attention`. On the CPU.

    Returns:
        ``out (B, Nq, heads, dv)`` in the dtype of ``query``; with ``return_lse`` also ``lse (B, Nq, heads)`` in float32
        (float64 for float64), differentiable. A query that sees no key gets ``out = 0`` and ``lse = -inf``. Gradients
        of keys and values are added in a fixed order.

    A NaN or infinity in a key or a value reaches all queries of the groups that list it, and no others.

    Raises:
        RuntimeError: on a wrong rank, dtype, device, size or index, naming the argument and what it takes.

    Source: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers" (2021), section 4.1; Wei et
    al., "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers" (2023), eq. 7.
    """
    check_tensors(_OP, query=query, key=key, value=value, key_index=key_index)
    check_rank(_OP, query=query, key=key, value=value)
    check_flag(_OP, "return_lse", return_lse)
    if key_count is not None:
        check_tensors(_OP, key_count=key_count)
    if not (isinstance(duplicates, str) and duplicates in ("mean", "sum")):
        raise RuntimeError(f"vitkernels::{_OP}: duplicates is {duplicates!r}, takes 'mean' or 'sum'")
    if query_index is not None:
        check_tensors(_OP, query_index=query_index)
        if return_lse:
            raise RuntimeError(f"vitkernels::{_OP}: return_lse is True, takes False with query_index")
        _check_members(query, key_index, query_index)
    query, key, terms, keys, _ = operands(_OP, query, key, value, Score(scale, qk_norm, head_map=head_map))
    members = None if query_index is None else _members(query, query_index)
    listed = query if members is None else query.gather(1, members.expand(-1, -1, -1, query.size(-1)))
    found: tuple[Tensor, Tensor] = _ops.indexed_attention(
        listed, key, value, key_index, key_count, *terms, *keys, _ops.allow_tf32(query)
    )
    if members is not None:
        return _of_queries(found[0], members, query.size(1), duplicates)
    return (found[0], found[1]) if return_lse else found[0]


def _check_members(query: Tensor, key_index: Tensor, query_index: Tensor) -> None:
    heads = query.size(2)
    fits = query_index.dim() == 4 and query_index.size(1) in (1, heads) and query_index.size(0) == query.size(0)
    if not fits or (key_index.dim() == 4 and query_index.size(2) != key_index.size(2)):
        raise RuntimeError(
            f"vitkernels::{_OP}: query_index has shape {tuple(query_index.shape)}, takes (B, heads or 1, groups, "
            f"members) with B {query.size(0)}, {heads} heads and key_index's groups"
        )
    if query_index.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"vitkernels::{_OP}: query_index is {query_index.dtype}, takes int64 or int32")
    if query_index.device != query.device:
        raise RuntimeError(
            f"vitkernels::{_OP}: query_index is on {query_index.device}, takes query's device ({query.device})"
        )
    if is_readable(query_index) and query_index.numel() > 0:
        low, high = (int(n) for n in query_index.aminmax())
        if low < 0 or high >= query.size(1):
            wrong = low if low < 0 else high
            raise RuntimeError(f"vitkernels::{_OP}: query_index has query {wrong}, takes 0 to {query.size(1) - 1}")


def _members(query: Tensor, query_index: Tensor) -> Tensor:
    """``(B, groups * members, heads, 1)``."""
    return query_index.long().flatten(2).transpose(1, 2).unsqueeze(-1).expand(-1, -1, query.size(2), 1)


def _of_queries(found: Tensor, members: Tensor, num_queries: int, duplicates: Literal["mean", "sum"]) -> Tensor:
    """``(B, Nq, heads, dv)`` from the results of all groups' members, in the precision of statistics."""
    wide = found.to(_ops.statistics_dtype(found.dtype))
    shape = (found.size(0), num_queries, found.size(2))
    sums = wide.new_zeros(*shape, found.size(-1)).scatter_add(1, members.expand(-1, -1, -1, found.size(-1)), wide)
    if duplicates == "mean":
        counts = wide.new_zeros(*shape, 1).scatter_add(1, members, wide.new_ones(()).expand(members.shape))
        sums = sums / counts.clamp(min=1.0)
    return sums.to(found.dtype)
