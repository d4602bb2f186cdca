"""Neighborhood attention: NATTEN's calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor

from vitkernels.axes import Neighborhood
from vitkernels.functional.spatial_attention import spatial_attention
from vitkernels.functional.windows import of_each_axis

__all__ = ["na1d", "na2d", "na3d"]


@overload
def na1d(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int | tuple[int], stride: int | tuple[int] = ...,
    dilation: int | tuple[int] = ..., is_causal: bool | tuple[bool] = ..., scale: float | Tensor | None = ...,
    additional_keys: Tensor | None = ..., additional_values: Tensor | None = ..., *, rpb: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def na1d(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int | tuple[int], stride: int | tuple[int] = ...,
    dilation: int | tuple[int] = ..., is_causal: bool | tuple[bool] = ..., scale: float | Tensor | None = ...,
    additional_keys: Tensor | None = ..., additional_values: Tensor | None = ..., *, rpb: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int],
    stride: int | tuple[int] = 1,
    dilation: int | tuple[int] = 1,
    is_causal: bool | tuple[bool] = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    rpb: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`vitkernels.na2d`, on a map of one axis: ``(B, length, heads, d)``."""
    axes = _axes("na1d", key, kernel_size=kernel_size, stride=stride, dilation=dilation, is_causal=is_causal)
    return spatial_attention(
        query, key, value, axes, scale=scale, additional_keys=additional_keys, additional_values=additional_values,
        bias_table=_by_offset("na1d", axes, rpb), return_lse=return_lse,
    )  # fmt: skip


@overload
def na2d(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int | tuple[int, int], stride: int | tuple[int, int] = ...,
    dilation: int | tuple[int, int] = ..., is_causal: bool | tuple[bool, bool] = ...,
    scale: float | Tensor | None = ..., additional_keys: Tensor | None = ..., additional_values: Tensor | None = ..., *,
    rpb: Tensor | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def na2d(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int | tuple[int, int], stride: int | tuple[int, int] = ...,
    dilation: int | tuple[int, int] = ..., is_causal: bool | tuple[bool, bool] = ...,
    scale: float | Tensor | None = ..., additional_keys: Tensor | None = ..., additional_values: Tensor | None = ..., *,
    rpb: Tensor | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    rpb: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Neighborhood attention on a map of two axes: a query attends to the ``kernel_size`` nearest keys on each.

    NATTEN's call. At the border the neighborhood is shifted inwards, so that every query sees equally many keys.

    Args:
        query: ``(B, height, width, heads, d)``.
        key: ``(B, height, width, kv_heads, d)``; ``heads`` must be a multiple of ``kv_heads``.
        value: ``(B, height, width, kv_heads, dv)``.
        kernel_size: keys of a neighborhood, one number or one for each axis. ``kernel_size * dilation`` may not exceed
            the map.
        stride: so many successive queries share a neighborhood; 1 is a sliding window, ``kernel_size`` are blocks.
        dilation: tokens from one key of a neighborhood to the next.
        is_causal: only keys at or before the query on an axis.
        scale: factor on the logits, a number or a differentiable ``(heads,)`` tensor. Default ``d ** -0.5``.
        additional_keys: ``(B, Na, kv_heads, d)`` keys that every query sees besides its neighborhood.
        additional_values: ``(B, Na, kv_heads, dv)``, their values.
        rpb: ``(heads, 2 kernel_size - 1 for each axis)``, added to the logits by the offset of the key from the query
            in steps of the dilation: entry ``key - query + kernel_size - 1``. Differentiable.
        return_lse: also return the natural log of each row's sum of exponentials.

    Returns:
        ``(B, height, width, heads, dv)`` in the dtype of ``query``; with ``return_lse`` also
        ``lse (B, height, width, heads)``, see :func:`vitkernels.spatial_attention`.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Source: Hassani et al., "Neighborhood Attention Transformer" (2023), eq. 2 to 4; ``dilation``: Hassani and Shi,
    "Dilated Neighborhood Attention Transformer" (2022), section 3.2; ``stride``: Hassani et al., "Generalized
    Neighborhood Attention" (2025), section 3.
    """
    axes = _axes("na2d", key, kernel_size=kernel_size, stride=stride, dilation=dilation, is_causal=is_causal)
    return spatial_attention(
        query, key, value, axes, scale=scale, additional_keys=additional_keys, additional_values=additional_values,
        bias_table=_by_offset("na2d", axes, rpb), return_lse=return_lse,
    )  # fmt: skip


@overload
def na3d(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int | tuple[int, int, int],
    stride: int | tuple[int, int, int] = ..., dilation: int | tuple[int, int, int] = ...,
    is_causal: bool | tuple[bool, bool, bool] = ..., scale: float | Tensor | None = ...,
    additional_keys: Tensor | None = ..., additional_values: Tensor | None = ..., *, rpb: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def na3d(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int | tuple[int, int, int],
    stride: int | tuple[int, int, int] = ..., dilation: int | tuple[int, int, int] = ...,
    is_causal: bool | tuple[bool, bool, bool] = ..., scale: float | Tensor | None = ...,
    additional_keys: Tensor | None = ..., additional_values: Tensor | None = ..., *, rpb: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int, int],
    stride: int | tuple[int, int, int] = 1,
    dilation: int | tuple[int, int, int] = 1,
    is_causal: bool | tuple[bool, bool, bool] = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    rpb: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`vitkernels.na2d`, on a map of three axes: ``(B, depth, height, width, heads, d)``."""
    axes = _axes("na3d", key, kernel_size=kernel_size, stride=stride, dilation=dilation, is_causal=is_causal)
    return spatial_attention(
        query, key, value, axes, scale=scale, additional_keys=additional_keys, additional_values=additional_values,
        bias_table=_by_offset("na3d", axes, rpb), return_lse=return_lse,
    )  # fmt: skip


def _axes(op: str, key: Tensor, **options: Any) -> list[Neighborhood]:
    """The pattern, from one value or one for each axis of every option."""
    num_axes = int(op[2])
    dims = num_axes + 3
    if key.dim() != dims:
        shape = tuple(key.shape)
        raise RuntimeError(f"vitkernels::{op}: key has shape {shape}, takes {dims} dimensions (B, *map, heads, d)")
    each = [of_each_axis(op, name, option, num_axes) for name, option in options.items()]
    axes = [Neighborhood(*of_axis) for of_axis in zip(*each, strict=True)]
    for i, (axis, length) in enumerate(zip(axes, key.shape[1:-2], strict=True)):
        if axis.kernel_size * axis.dilation > length > 0:
            times = f" times dilation {axis.dilation}" if axis.dilation > 1 else ""
            raise RuntimeError(
                f"vitkernels::{op}: kernel_size {axis.kernel_size}{times} exceeds the map's axis {i} ({length})"
            )
        if axis.stride > axis.kernel_size:
            raise RuntimeError(
                f"vitkernels::{op}: stride is {axis.stride}, takes at most kernel_size ({axis.kernel_size})"
            )
    return axes


def _by_offset(op: str, axes: Sequence[Neighborhood], rpb: Tensor | None) -> Tensor | None:
    """The operator's table, by the offset of the query from the key, from NATTEN's."""
    if rpb is None:
        return None
    offsets = [2 * axis.kernel_size - 1 for axis in axes]
    if rpb.dim() != len(axes) + 1 or list(rpb.shape[1:]) != offsets:
        raise RuntimeError(
            f"vitkernels::{op}: rpb has shape {tuple(rpb.shape)}, takes (heads, {', '.join(map(str, offsets))})"
        )
    return rpb.flip(tuple(range(1, rpb.dim())))
