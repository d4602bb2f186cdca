"""Bi-level routing attention: a region of queries attends to the few regions of keys that are most alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from vitkernels.functional.arguments import (
    check_flag,
    check_maps,
    check_stored,
    check_tensors,
    held_in_trace,
    integers,
    whole_number,
)
from vitkernels.functional.score import Score, operands
from vitkernels.functional.words import Words
from vitkernels.ops import attention as _ops

__all__ = ["bilevel_route", "regional_routing_attention"]

_WORDS = Words("regional_routing_attention")


@overload
def regional_routing_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | Tensor | None, region_graph: Tensor,
    region_size: int | Sequence[int], kv_region_size: int | Sequence[int] | None = ..., *,
    qk_norm: Literal["l2"] | None = ..., head_map: Tensor | None = ..., outside: Literal["zero"] | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def regional_routing_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | Tensor | None, region_graph: Tensor,
    region_size: int | Sequence[int], kv_region_size: int | Sequence[int] | None = ..., *,
    qk_norm: Literal["l2"] | None = ..., head_map: Tensor | None = ..., outside: Literal["zero"] | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def regional_routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | Tensor | None,
    region_graph: Tensor,
    region_size: int | Sequence[int],
    kv_region_size: int | Sequence[int] | None = None,
    *,
    qk_norm: Literal["l2"] | None = None,
    head_map: Tensor | None = None,
    outside: Literal["zero"] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention on a map where each region of queries sees the regions of keys that a graph lists.

    .. math::
        o_i = \sum_{j \in K(r(i))} \operatorname{softmax}_{j \in K(r(i))}(s_h \, q_i \cdot k_j) \, v_j, \qquad
        K(r) = \biguplus_t \mathrm{region}(G_{b,h,r,t})

    The maps are cut into regions of ``region_size`` tokens from the first token on, numbered in row-major order. Keys
    and values are read where they are: nothing is gathered or padded.

    Args:
        query: ``(B, *map, heads, d)``, one to three axes.
        key: ``(B, *key_map, kv_heads, d)``; ``heads`` must be a multiple of ``kv_heads`` (or see ``head_map``).
        value: ``(B, *key_map, kv_heads, dv)``; ``dv`` may differ from ``d``.
        scale: factor on the logits, a number or a differentiable tensor: ``(heads,)``, or one number for all heads.
            ``None`` is ``d ** -0.5``.
        region_graph: ``(B, heads or 1, regions, topk)`` int64 or int32, for each region of queries the numbers of the
            regions of keys that it sees, as :func:`vitkernels.bilevel_route` finds them. A region that is listed twice
            counts twice.
        region_size: tokens of a region along each axis, one number or one for each axis. The last regions of an axis
            are shorter where it does not divide the map, and a map may be smaller than its regions.
        kv_region_size: that of the keys' map, if it differs.
        qk_norm: ``"l2"`` divides every query and key by its Euclidean norm first (cosine attention).
        head_map: ``(heads,)`` integer tensor naming the kv head of each query head.
        outside: what a region holds beyond the border of the keys' map: ``None``, nothing; ``"zero"``, keys and values
            of zeros, as if the map had been padded, which is what BiFormer's published weights have seen.
        return_lse: also return the natural log of each row's sum of exponentials.

    ``query``, ``key`` and ``value`` may have any strides as long as the last one is 1; the tokens of a map that are
    not evenly spaced are copied. The dtypes are those of :func:`vitkernels.attention`. On the CPU.

    Returns:
        ``out (B, *map, heads, dv)`` in the dtype of ``query``; with ``return_lse`` also ``lse (B, *map, heads)`` in
        float32 (float64 for float64), differentiable. A query that sees no key gets ``out = 0`` and ``lse = -inf``.
        Gradients of keys and values are added in a fixed order.

    A NaN or infinity in a key or a value reaches all queries of the regions that see it, and no others.

    Raises:
        RuntimeError: on a wrong rank, dtype, device, size or region, naming the argument and what it takes.

    Source: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention" (2023), eq. 4 to 6.
    """
    op = _WORDS.function
    check_tensors(op, region_graph=region_graph)
    check_flag(op, "return_lse", return_lse)
    check_maps(op, query, key, value, is_same=False)
    if outside is not None and not (isinstance(outside, str) and outside == "zero"):
        raise RuntimeError(f"vitkernels::{op}: outside is {outside!r}, takes None or 'zero'")
    num_axes = query.dim() - 3
    query = held_in_trace(op, query, region_size=region_size, kv_region_size=kv_region_size)
    regions = integers(op, "region_size", region_size, num_axes)
    kv_regions = regions if kv_region_size is None else integers(op, "kv_region_size", kv_region_size, num_axes)
    score = Score(scale, qk_norm, head_map=head_map, outside=outside)
    query, key, terms, keys, _ = operands(op, query, key, value, score)
    found: tuple[Tensor, Tensor] = _ops.regional_routing_attention(
        query, key, value, region_graph, regions, kv_regions, *terms, *keys, _ops.allow_tf32(query)
    )
    return (found[0], found[1]) if return_lse else found[0]


def bilevel_route(
    query: Tensor,
    key: Tensor,
    region_size: int | Sequence[int],
    topk: int,
    kv_region_size: int | Sequence[int] | None = None,
) -> Tensor:
    r"""For each region of queries, the regions of keys whose means have the largest products with its own mean.

    .. math::
        G_r = \operatorname{topk}_t\Big(\sum_h \bar q_{r,h} \cdot \bar k_{t,h}\Big)

    Means are over the tokens of a region on the map, products are summed over the heads, all in float32 (float64 for
    float64), under autocast too. Without a gradient. On the CPU.

    Args:
        query: ``(B, *map, heads, d)``, one to three axes.
        key: ``(B, *key_map, heads, d)``.
        region_size: tokens of a region along each axis, as :func:`vitkernels.regional_routing_attention` takes them.
        topk: regions of keys for each region of queries, at most as many as there are.
        kv_region_size: that of the keys' map, if it differs.

    Returns:
        ``(B, 1, regions, topk)`` int64, the most alike first; of equal ones the region with the lower number. It does
        not depend on the number of threads.

    A NaN in a token reaches all products with its region's mean: a region of keys that has one comes first.

    Raises:
        RuntimeError: on a wrong rank, size or number, naming the argument and what it takes.

    Source: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention" (2023), eq. 1 to 3.
    """
    op = "bilevel_route"
    check_maps(op, query, key, key, is_same=False)
    check_stored(op, query=query, key=key)
    if query.shape[-2:] != key.shape[-2:] or query.size(0) != key.size(0):
        raise RuntimeError(
            f"vitkernels::{op}: key has shape {tuple(key.shape)}, takes query's batch size, heads and head dimension "
            f"{(query.size(0), *query.shape[-2:])}"
        )
    num_axes = query.dim() - 3
    regions = integers(op, "region_size", region_size, num_axes)
    kv_regions = regions if kv_region_size is None else integers(op, "kv_region_size", kv_region_size, num_axes)
    topk = whole_number(op, "topk", topk)
    query, key = query.detach(), key.detach()
    graph: Tensor = _ops.bilevel_route(query, key, regions, kv_regions, topk)
    return graph
