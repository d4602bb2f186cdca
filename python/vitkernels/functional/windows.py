"""Attention within windows, grids and blocks with a halo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from vitkernels.axes import Axis, Block, Full, Halo
from vitkernels.functional.score import Options, Outside
from vitkernels.functional.spatial_attention import spatial_attention

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["grid_attention", "halo_attention", "of_each_axis", "window_attention"]

Size = int | Sequence[int]


@overload
def window_attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: Size, shift: Size = ..., *, bias_table: Tensor | None = ...,
    is_shared_query: bool = ..., return_lse: Literal[False] = ..., **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip


@overload
def window_attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: Size, shift: Size = ..., *, bias_table: Tensor | None = ...,
    is_shared_query: bool = ..., return_lse: Literal[True], **options: Unpack[Options],
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
        is_shared_query: one query window serves all windows of the map.
        return_lse: also return the natural log of each row's sum of exponentials.
        options: ``scale``, ``qk_norm``, ``key_bias``, ``multiplier_table``, ``rel_pos``, ``head_map``,
            ``additional_keys``, ``additional_values``, as in :func:`vitkernels.spatial_attention`.

    Returns:
        ``(B, *map, heads, dv)`` in the dtype of ``query``; with ``return_lse`` also ``lse (B, *map, heads)``.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Source: Liu et al., "Swin Transformer" (2021), section 3.2 and eq. 4; ``is_shared_query``: Hatamizadeh et al.,
    "Global Context Vision Transformers" (2023), section 3.2.
    """
    op, key_map = "window_attention", key.shape[1:-2]
    query_map = key_map if is_shared_query else query.shape[1:-2]
    sizes = of_each_axis(op, "window_size", window_size, key.dim() - 3)
    shifts = of_each_axis(op, "shift", shift, key.dim() - 3)
    axes = [
        Block(size, offset, None if nq == nk else _of_keys(op, size, nq, nk))
        for size, offset, nq, nk in zip(sizes, shifts, query_map, key_map, strict=False)
    ]
    table = in_axes(op, bias_table, [2 * size - 1 for size in sizes])
    return spatial_attention(
        query, key, value, axes, bias_table=table, is_shared_query=is_shared_query, return_lse=return_lse, **options
    )


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

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Source: Tu et al., "MaxViT: Multi-Axis Vision Transformer" (2022), section 3.2; with ``n // interval`` for
    ``grid_size``, the long-distance attention of Wang et al., "CrossFormer" (2022), section 3.2.
    """
    op = "grid_attention"
    sizes = of_each_axis(op, "grid_size", grid_size, key.dim() - 3)
    for i, (size, n) in enumerate(zip(sizes, key.shape[1:-2], strict=False)):
        if size < 1 or n % size != 0:
            raise RuntimeError(f"vitkernels::{op}: grid_size is {size}, takes a divisor of the map's axis {i} ({n})")
    axes = [Full(step=max(n // size, 1)) for n, size in zip(key.shape[1:-2], sizes, strict=False)]
    table = in_axes(op, bias_table, [2 * size - 1 for size in sizes])
    return spatial_attention(query, key, value, axes, bias_table=table, return_lse=return_lse, **options)


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

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Source: Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones" (2021), section
    2.2; Chen et al., "Activating More Pixels in Image Super-Resolution Transformer" (2023), section 3.2.
    """
    op = "halo_attention"
    sizes = of_each_axis(op, "block_size", block_size, key.dim() - 3)
    halos = of_each_axis(op, "halo_size", halo_size, key.dim() - 3)
    axes: list[Axis] = [
        Halo(size if nq == nk else _of_keys(op, size, nk, nq), halo, size)
        for size, halo, nq, nk in zip(sizes, halos, query.shape[1:-2], key.shape[1:-2], strict=False)
    ]
    table = in_axes(op, bias_table, [2 * (size + halo) - 1 for size, halo in zip(sizes, halos, strict=True)])
    return spatial_attention(
        query, key, value, axes, bias_table=table, outside=outside, return_lse=return_lse, **options
    )


def of_each_axis(op: str, name: str, option: Any, num_axes: int) -> list[Any]:
    """``option`` for each axis of the map: one value stands for all."""
    if not isinstance(option, (list, tuple)):
        return [option] * num_axes
    if len(option) != num_axes:
        raise RuntimeError(
            f"vitkernels::{op}: {name} is {option!r}, takes one value or one for each of {num_axes} axes"
        )
    return list(option)


def in_axes(op: str, table: Tensor | None, offsets: Sequence[int]) -> Tensor | None:
    """A table of Swin's shape, ``(product of the offsets, heads)``, as the operator takes it; others as they are."""
    if table is None or table.dim() != 2:
        return table
    if table.size(0) != math.prod(offsets):
        by_axis = " * ".join(map(str, offsets))
        raise RuntimeError(f"vitkernels::{op}: bias_table has shape {tuple(table.shape)}, takes ({by_axis}, heads)")
    return table.t().reshape(-1, *offsets)


def _of_keys(op: str, size: int, n: int, other_n: int) -> int:
    """How many tokens of a map of ``other_n`` lie where one of ``n`` has ``size``."""
    if n == 0 or size * other_n % n != 0:
        raise RuntimeError(
            f"vitkernels::{op}: {size} tokens of {n} are not a whole number of those of {other_n} on the other map"
        )
    return size * other_n // n
