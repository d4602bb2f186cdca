"""Relative logits: products of the queries with an embedding of each offset."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from vitkernels.ops.attention import in_statistics_dtype
from vitkernels.ops.registration import check_same_device, statistics_dtype

__all__ = ["axis_biases"]

_MOST_AXES = 3


def axis_biases(
    op: str, query: Tensor, rel_pos: Sequence[Tensor] | None, num_prefix_tokens: int
) -> list[Tensor | None]:
    """The operator's ``depth_bias, height_bias, width_bias``: ``(B, tokens on the grid, heads, 2 n - 1)`` each."""
    none: list[Tensor | None] = [None] * _MOST_AXES
    if rel_pos is None or query.dim() != 4 or query.layout != torch.strided:  # the operator has the error
        return none
    takes = "takes a sequence of one table for each of one to three axes"
    if not isinstance(rel_pos, (list, tuple)) or not all(isinstance(t, Tensor) for t in rel_pos):
        raise RuntimeError(f"vitkernels::{op}: rel_pos is a {type(rel_pos).__name__}, {takes}")
    if not 1 <= len(rel_pos) <= _MOST_AXES:
        raise RuntimeError(f"vitkernels::{op}: rel_pos has {len(rel_pos)} tables, {takes}")
    named = {f"rel_pos[{i}]": table for i, table in enumerate(rel_pos)}
    for name, table in named.items():
        _check_table(op, name, table, query)
    tables = in_statistics_dtype(op, query, named)
    check_same_device(op, query=query, **named)
    if not query.is_floating_point():
        return none
    on_grid = query[:, num_prefix_tokens:].to(statistics_dtype(query.dtype))
    # Autocast would round the logits.
    device = query.device.type
    known = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if known else nullcontext():
        return none[len(tables) :] + [_product(on_grid, table) for table in tables if table is not None]


def _check_table(op: str, name: str, table: Tensor, query: Tensor) -> None:
    heads, dim = query.shape[2:]
    if table.layout != torch.strided:
        raise RuntimeError(f"vitkernels::{op}: {name} is a {table.layout} tensor, takes a strided one")
    fits = table.dim() in (2, 3) and table.size(-1) == dim and (table.dim() == 2 or table.size(0) == heads)
    if not fits:
        raise RuntimeError(
            f"vitkernels::{op}: {name} has shape {tuple(table.shape)}, takes (2 n - 1, {dim}) or "
            f"({heads}, 2 n - 1, {dim}) = (heads, offsets, d)"
        )


def _product(query: Tensor, table: Tensor) -> Tensor:
    if table.dim() == 2:
        return query @ table.mT  # [B, N, H, 2n - 1]
    return torch.einsum("bnhd,hkd->bnhk", query, table)
