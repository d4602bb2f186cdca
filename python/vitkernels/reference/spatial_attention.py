"""The definition of attention by a spatial pattern, in plain PyTorch: dense attention under a boolean mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from vitkernels.axes import Axis
from vitkernels.reference.attention import attention, normalized
from vitkernels.reference.pattern import AxisPattern, axis_pattern

__all__ = ["spatial_attention"]


def spatial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: Sequence[Axis],
    *,
    scale: float | Tensor | None = None,
    qk_norm: str | None = None,
    key_bias: Tensor | None = None,
    bias_table: Tensor | None = None,
    multiplier_table: Tensor | None = None,
    rel_pos: Sequence[Tensor] | None = None,
    head_map: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    outside: Literal["zero"] | tuple[Tensor, Tensor] | None = None,
    radius: float | None = None,
    is_shared_query: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Same arguments, shapes and results as :func:`vitkernels.spatial_attention`."""
    key_map, heads = key.shape[1:-2], query.size(-2)
    query = query.expand(key.size(0), *query.shape[1:])
    if is_shared_query:
        windows = [n // size for n, size in zip(key_map, query.shape[1:-2], strict=True)]
        query = query.repeat(1, *windows, 1, 1)
    query_map = query.shape[1:-2]
    sizes = zip(axes, query_map, key_map, strict=True)
    patterns = [axis_pattern(axis, nq, nk, outside is not None).on(key.device) for axis, nq, nk in sizes]
    margins = [(-p.first, p.visible.size(1) + p.first - n) for p, n in zip(patterns, key_map, strict=True)]

    inside = _surrounded(torch.ones(key_map, dtype=torch.bool, device=key.device), 0, margins)
    fills = (None, None) if outside is None or isinstance(outside, str) else outside
    key, value = (
        t if fill is None else torch.where(inside[..., None, None], t, fill.to(t.dtype))
        for t, fill in zip((_surrounded(key, 1, margins), _surrounded(value, 1, margins)), fills, strict=True)
    )
    query, key, value = (t.flatten(1, -3) for t in (query, key, value))  # [B, N, H, D]

    bias = query.new_zeros((), dtype=torch.promote_types(query.dtype, torch.float32))
    if bias_table is not None:
        bias = bias + _by_offset(bias_table, patterns)
    if rel_pos is not None:
        bias = bias + _relative_logits(query, rel_pos, patterns, qk_norm)
    if key_bias is not None:
        each = _surrounded(key_bias.expand(key.size(0), heads, *key_map), 2, margins)
        bias = bias + each.flatten(2).unsqueeze(-2)
    visible = _pairs([p.visible for p in patterns], torch.logical_and)  # [Nq, Nk]
    if radius is not None:
        steps = [axis.encoded()[1] for axis in axes]
        squares = [(p.offset * step).double() ** 2 for p, step in zip(patterns, steps, strict=True)]
        visible = visible & (_pairs(squares, torch.add) <= radius**2)
    bias = bias.masked_fill(~visible, -torch.inf)  # [(B, H), Nq, Nk]
    found = attention(
        query, key, value, scale=scale, qk_norm=qk_norm, bias=bias, head_map=head_map,
        multiplier=None if multiplier_table is None else _by_offset(multiplier_table, patterns),
        additional_keys=additional_keys, additional_values=additional_values, return_lse=return_lse,
    )  # fmt: skip
    on_map = [t.reshape(t.size(0), *query_map, *t.shape[2:]) for t in ([found] if isinstance(found, Tensor) else found)]
    return (on_map[0], on_map[1]) if return_lse else on_map[0]


def _surrounded(t: Tensor, first_dim: int, margins: Sequence[tuple[int, int]]) -> Tensor:
    """``t`` with zeros around the map, whose axes are its dimensions from ``first_dim`` on."""
    after = t.dim() - first_dim - len(margins)
    return pad(t, [0, 0] * after + [n for margin in reversed(margins) for n in margin])


def _pairs(by_axis: Sequence[Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``(Nq, Nk)`` from the ``(queries, keys)`` of each axis."""

    def both(a: Tensor, b: Tensor) -> Tensor:
        return combine(a[:, None, :, None], b[None, :, None, :]).flatten(2).flatten(0, 1)

    return reduce(both, by_axis)


def _index(pattern: AxisPattern, size: int) -> Tensor:
    """The entry of each pair's offset in a table of ``size`` offsets. Pairs that no query sees have any."""
    return (pattern.offset + size // 2).clamp(0, size - 1)


def _by_offset(table: Tensor, patterns: Sequence[AxisPattern]) -> Tensor:
    """``(heads or 1, Nq, Nk)`` from ``(heads or 1, offsets of each axis)``."""
    sizes = table.shape[1:]
    index = reduce(
        lambda rows, axis: _pairs([rows * axis[1], _index(*axis)], torch.add),
        zip(patterns[1:], sizes[1:], strict=True),
        _index(patterns[0], sizes[0]),
    )
    return table.flatten(1)[:, index]


def _relative_logits(
    query: Tensor, rel_pos: Sequence[Tensor], patterns: Sequence[AxisPattern], qk_norm: str | None
) -> Tensor:
    """``(B, heads, Nq, Nk)``: products of the query with the embeddings of the offsets."""
    if qk_norm == "l2":
        query = normalized(query)
    total = query.new_zeros(())
    for axis, table in enumerate(rel_pos):
        size, heads = table.size(-2), query.size(2)
        zeros = [torch.zeros_like(p.offset) for p in patterns]
        zeros[axis] = _index(patterns[axis], size)
        index = _pairs(zeros, torch.add)  # [Nq, Nk]
        products = torch.einsum("bihd,htd->bhit", query, table.to(query.dtype).expand(heads, -1, -1))
        total = total + products.gather(-1, index.expand(*products.shape[:2], -1, -1))
    return total
