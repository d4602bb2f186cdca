"""Attention within windows, grids and blocks with a halo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from vitkernels._torch_private import sizes_are_tensors
from vitkernels.axes import Axis, Block, Full, Halo
from vitkernels.functional.arguments import (
    check_flag,
    check_maps,
    check_stored,
    check_tensors,
    held_in_trace,
    integers,
    map_of,
)
from vitkernels.functional.partition import attend_to_gathered_grids
from vitkernels.functional.score import Options, Outside, Score, in_options
from vitkernels.functional.spatial_attention import attend_on_map
from vitkernels.functional.words import Words

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["grid_attention", "halo_attention", "window_attention"]

Size = int | Sequence[int]

_WINDOW = Words("window_attention", rules={"size": "window_size", "key_size": "window_size"})
_GRID = Words("grid_attention")
_HALO = Words("halo_attention", rules={"size": "block_size", "key_size": "block_size", "halo": "halo_size"})


@overload
def window_attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: Size, shift: Size = ..., *, bias_table: Tensor | None = ...,
    is_shared_query: bool = ..., shift_size: Size | None = ..., return_lse: Literal[False] = ...,
    **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip


@overload
def window_attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: Size, shift: Size = ..., *, bias_table: Tensor | None = ...,
    is_shared_query: bool = ..., shift_size: Size | None = ..., return_lse: Literal[True], **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Size,
    shift: Size = 0,
    *,
    bias_table: Tensor | None = None,
    is_shared_query: bool = False,
    shift_size: Size | None = None,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention within windows of a map, shifted if wanted.

    A ``shift`` cuts an axis into ``[0, shift), [shift, shift + window_size), ...``: what Swin's cyclic shift, its
    windows and its mask come to where the window divides the map. Where it does not, the last windows are smaller, and
    nothing is padded.

    Args:
        query: ``(B, *map, heads, d)`` with a map of one to three axes; with ``is_shared_query`` one window,
            ``(B, *window_size, heads, d)``.
        key: ``(B, *map, kv_heads, d)``; ``heads`` must be a multiple of ``kv_heads`` (or see ``head_map``). Where the
            maps differ, ``window_size`` and ``shift`` count queries, and a window has as many keys as are in its place.
        value: ``(B, *map, kv_heads, dv)``.
        window_size: queries of a window, one number or one for each axis. More than the map has are taken as all.
        shift: where the first whole window begins, one number or one for each axis, less than the window.
        bias_table: :math:`T`, by the offset of the query from the key, in Swin's shape
            ``((2 window - 1) * ..., heads)``, the offsets of the last axis next to each other, or in that of
            :func:`vitkernels.spatial_attention`, ``(heads or 1, 2 window - 1, ...)`` (a map of one axis: Swin's).
        is_shared_query: one query window serves all windows of the map, which they divide.
        shift_size: Swin's name of ``shift``, which is 0 then.
        return_lse: also return the natural log of each row's sum of exponentials.
        options: ``scale``, ``qk_norm``, ``key_bias``, ``multiplier_table``, ``rel_pos``, ``head_map``,
            ``additional_keys``, ``additional_values``, as in :func:`vitkernels.spatial_attention`.

    Returns:
        ``(B, *map, heads, dv)`` in the dtype of ``query``; with ``return_lse`` also ``lse (B, *map, heads)``.

    A NaN or infinity in a key, a value or a table may reach queries that do not see it: they share a tile.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Source: Liu et al., "Swin Transformer" (2021), section 3.2 and eq. 4; ``is_shared_query``: Hatamizadeh et al.,
    "Global Context Vision Transformers" (2023), section 3.2.
    """
    op = _WINDOW.function
    check_flag(op, "is_shared_query", is_shared_query)
    check_flag(op, "return_lse", return_lse)
    query_map, key_map = check_maps(op, query, key, value, is_same=False)
    query = held_in_trace(op, query, window_size=window_size, shift=shift, shift_size=shift_size)
    sizes = integers(op, "window_size", window_size, len(key_map))
    if shift_size is not None and shift != 0:
        raise RuntimeError(f"vitkernels::{op}: shift is {shift!r}, takes 0 where shift_size is given ({shift_size!r})")
    named = ("shift", shift) if shift_size is None else ("shift_size", shift_size)
    shifts = integers(op, *named, len(key_map), at_least=0)
    for own_shift, size in zip(shifts, sizes, strict=True):
        if own_shift >= size:
            raise RuntimeError(f"vitkernels::{op}: {named[0]} is {own_shift}, takes less than window_size ({size})")
    if is_shared_query:
        _check_shared_query(query, sizes, shifts, key_map)
        query_map = key_map
    axes = [
        Block(size, offset, None if nq == nk else _of_keys(op, "window_size", size, nq, nk))
        for size, offset, nq, nk in zip(sizes, shifts, query_map, key_map, strict=True)
    ]
    table = in_axes(op, bias_table, [2 * size - 1 for size in sizes])
    score = Score(**in_options(op, options), bias_table=table)
    found = attend_on_map(_WINDOW, query, key, value, axes, score, is_shared_query)
    return found if return_lse else found[0]


@overload
def grid_attention(
    query: Tensor, key: Tensor, value: Tensor, grid_size: Size, *, bias_table: Tensor | None = ...,
    return_lse: Literal[False] = ..., **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip


@overload
def grid_attention(
    query: Tensor, key: Tensor, value: Tensor, grid_size: Size, *, bias_table: Tensor | None = ...,
    return_lse: Literal[True], **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def grid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid_size: Size,
    *,
    bias_table: Tensor | None = None,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention among tokens that are spread evenly over the map: every ``n // grid_size``-th of an axis of ``n``.

    Args:
        query: ``(B, *map, heads, d)`` with a map of one to three axes.
        key: ``(B, *map, kv_heads, d)``; ``heads`` must be a multiple of ``kv_heads`` (or see ``head_map``).
        value: ``(B, *map, kv_heads, dv)``.
        grid_size: keys that a query sees on an axis, one number or one for each; it divides the map.
        bias_table: :math:`T`, by the offset of the query from the key counted in tokens of the grid; the shapes of
            :func:`vitkernels.window_attention` with ``grid_size`` for the window.
        return_lse: also return the natural log of each row's sum of exponentials.
        options: as in :func:`vitkernels.window_attention`.

    Returns:
        ``(B, *map, heads, dv)`` in the dtype of ``query``; with ``return_lse`` also ``lse (B, *map, heads)``.

    A NaN or infinity in a key, a value or a table may reach queries that do not see it: they share a tile.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Source: Tu et al., "MaxViT: Multi-Axis Vision Transformer" (2022), section 3.2; with ``n // interval`` for
    ``grid_size``, the long-distance attention of Wang et al., "CrossFormer" (2022), section 3.2.
    """
    op = _GRID.function
    check_flag(op, "return_lse", return_lse)
    _, sizes_of_map = check_maps(op, query, key, value)
    query = held_in_trace(op, query, grid_size=grid_size)
    sizes = integers(op, "grid_size", grid_size, len(sizes_of_map))
    for i, (size, n) in enumerate(zip(sizes, sizes_of_map, strict=True)):
        if n % size != 0:
            raise RuntimeError(f"vitkernels::{op}: grid_size is {size}, takes a divisor of the map's axis {i} ({n})")
    table = in_axes(op, bias_table, [2 * size - 1 for size in sizes])
    score = Score(**in_options(op, options), bias_table=table)
    if sizes_are_tensors():
        found = attend_to_gathered_grids(_GRID, query, key, value, sizes, score)
    else:
        axes = [Full(step=max(n // size, 1)) for n, size in zip(sizes_of_map, sizes, strict=True)]
        found = attend_on_map(_GRID, query, key, value, axes, score)
    return found if return_lse else found[0]


@overload
def halo_attention(
    query: Tensor, key: Tensor, value: Tensor, block_size: Size, halo_size: Size, *, bias_table: Tensor | None = ...,
    outside: Outside | None = ..., return_lse: Literal[False] = ..., **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip


@overload
def halo_attention(
    query: Tensor, key: Tensor, value: Tensor, block_size: Size, halo_size: Size, *, bias_table: Tensor | None = ...,
    outside: Outside | None = ..., return_lse: Literal[True], **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: Size,
    halo_size: Size,
    *,
    bias_table: Tensor | None = None,
    outside: Outside | None = None,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention of a block of queries to the keys of the block and of a halo around it.

    Args:
        query: ``(B, *map, heads, d)`` with a map of one to three axes. It may be coarser than the map of the keys
            (strided HaloNet): a block then has ``block_size * n // key_n`` queries on an axis.
        key: ``(B, *key_map, kv_heads, d)``; ``heads`` must be a multiple of ``kv_heads`` (or see ``head_map``).
        value: ``(B, *key_map, kv_heads, dv)``.
        block_size: keys of a block without its halo, one number or one for each axis.
        halo_size: keys on either side of it, one number or one for each axis.
        bias_table: :math:`T`, by the offset of the query from the key, in the shapes of
            :func:`vitkernels.window_attention` with ``block_size + halo_size`` for the window.
        outside: what lies beyond the border of the map, as in :func:`vitkernels.spatial_attention`. HaloNet and HAT
            have ``"zero"``.
        return_lse: also return the natural log of each row's sum of exponentials.
        options: as in :func:`vitkernels.window_attention`.

    Returns:
        ``(B, *map, heads, dv)`` in the dtype of ``query``; with ``return_lse`` also ``lse (B, *map, heads)``.

    A NaN or infinity in a key, a value or a table may reach queries that do not see it: they share a tile.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Source: Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones" (2021), section
    2.2; Chen et al., "Activating More Pixels in Image Super-Resolution Transformer" (2023), section 3.2.
    """
    op = _HALO.function
    check_flag(op, "return_lse", return_lse)
    query_map, key_map = check_maps(op, query, key, value, is_same=False)
    query = held_in_trace(op, query, block_size=block_size, halo_size=halo_size)
    sizes = integers(op, "block_size", block_size, len(key_map))
    halos = integers(op, "halo_size", halo_size, len(key_map), at_least=0)
    axes: list[Axis] = [
        Halo(size if nq == nk else _of_keys(op, "block_size", size, nk, nq), halo, size)
        for size, halo, nq, nk in zip(sizes, halos, query_map, key_map, strict=True)
    ]
    table = in_axes(op, bias_table, [2 * (size + halo) - 1 for size, halo in zip(sizes, halos, strict=True)])
    score = Score(**in_options(op, options), bias_table=table, outside=outside)
    found = attend_on_map(_HALO, query, key, value, axes, score)
    return found if return_lse else found[0]


def in_axes(op: str, table: Tensor | None, offsets: Sequence[int]) -> Tensor | None:
    """A table of Swin's shape, ``(product of the offsets, heads)``, as the operator takes it; others as they are."""
    if table is None:
        return None
    check_tensors(op, bias_table=table)
    if table.dim() != 2:
        return table
    if table.size(0) != math.prod(offsets):
        by_axis = " * ".join(map(str, offsets))
        raise RuntimeError(f"vitkernels::{op}: bias_table has shape {tuple(table.shape)}, takes ({by_axis}, heads)")
    check_stored(op, bias_table=table)
    return table.t().reshape(-1, *offsets)


def _of_keys(op: str, name: str, size: int, n: int, other_n: int) -> int:
    """How many tokens of a map of ``other_n`` lie where one of ``n`` has ``size``."""
    if n == 0 or other_n == 0 or size * other_n % n != 0:
        raise RuntimeError(
            f"vitkernels::{op}: {name} is {size}, but {size} tokens of {n} are not a whole number of those of "
            f"{other_n} on the other map"
        )
    return size * other_n // n


def _check_shared_query(query: Tensor, sizes: Sequence[int], shifts: Sequence[int], key_map: Sequence[int]) -> None:
    op = _WINDOW.function
    for i, (size, n) in enumerate(zip(sizes, key_map, strict=True)):
        if n % size != 0:
            raise RuntimeError(
                f"vitkernels::{op}: window_size is {size}, takes a divisor of the map's axis {i} ({n}) with a shared "
                "query"
            )
    if any(shifts):
        raise RuntimeError(f"vitkernels::{op}: shift is {tuple(shifts)}, takes 0 with a shared query")
    if tuple(map_of(query)) != tuple(sizes):
        raise RuntimeError(
            f"vitkernels::{op}: query has shape {tuple(query.shape)}, takes one window {tuple(sizes)} with "
            "is_shared_query"
        )
