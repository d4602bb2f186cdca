"""Neighborhood attention: NATTEN's calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor

from vitkernels.axes import Axis, Full, Neighborhood
from vitkernels.functional.arguments import (
    check_flag,
    check_maps,
    check_stored,
    check_tensors,
    held_in_trace,
    in_statistics_dtype,
    integers,
)
from vitkernels.functional.score import Score
from vitkernels.functional.spatial_attention import attend_on_map
from vitkernels.functional.words import Words

__all__ = ["na1d", "na2d", "na3d"]

_WORDS = {n: Words(f"na{n}d", {"bias_table": "rpb"}) for n in (1, 2, 3)}


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
    check_flag("na1d", "return_lse", return_lse)
    score = Score(scale, additional_keys=additional_keys, additional_values=additional_values)
    found = _attend(1, (query, key, value), (kernel_size, stride, dilation, is_causal), score, rpb)
    return found if return_lse else found[0]


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
        scale: factor on the logits, a number or a differentiable tensor, ``(heads,)``, ``(1,)`` or ``()``. Default
            ``d ** -0.5``.
        additional_keys: ``(B, Na, kv_heads, d)`` keys that every query sees besides its neighborhood.
        additional_values: ``(B, Na, kv_heads, dv)``, their values.
        rpb: ``(heads, 2 kernel_size - 1 for each axis)``, added to the logits by the offset of the key from the query
            in steps of the dilation: entry ``key - query + kernel_size - 1``. Differentiable.
        return_lse: also return the natural log of each row's sum of exponentials.

    Returns:
        ``(B, height, width, heads, dv)`` in the dtype of ``query``; with ``return_lse`` also
        ``lse (B, height, width, heads)``, see :func:`vitkernels.spatial_attention`.

    A NaN or infinity in a key, a value or a table may reach queries that do not see it: they share a tile.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Source: Hassani et al., "Neighborhood Attention Transformer" (2023), eq. 2 to 4; ``dilation``: Hassani and Shi,
    "Dilated Neighborhood Attention Transformer" (2022), section 3.2; ``stride``: Hassani et al., "Generalized
    Neighborhood Attention" (2025), section 3.
    """
    check_flag("na2d", "return_lse", return_lse)
    score = Score(scale, additional_keys=additional_keys, additional_values=additional_values)
    found = _attend(2, (query, key, value), (kernel_size, stride, dilation, is_causal), score, rpb)
    return found if return_lse else found[0]


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
    check_flag("na3d", "return_lse", return_lse)
    score = Score(scale, additional_keys=additional_keys, additional_values=additional_values)
    found = _attend(3, (query, key, value), (kernel_size, stride, dilation, is_causal), score, rpb)
    return found if return_lse else found[0]


def _attend(
    num_axes: int, data: tuple[Tensor, Tensor, Tensor], options: tuple[Any, Any, Any, Any], score: Score,
    rpb: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``out`` and ``lse``, from one value or one for each axis of ``kernel_size, stride, dilation, is_causal``."""
    words = _WORDS[num_axes]
    op = words.function
    _, sizes = check_maps(op, *data, num_axes)
    names = ("kernel_size", "stride", "dilation")
    held = dict(zip(names, options, strict=False))
    data = (held_in_trace(op, data[0], **held), *data[1:])
    counts = [integers(op, name, option, num_axes) for name, option in zip(names, options[:3], strict=True)]
    flags = list(options[3]) if isinstance(options[3], (list, tuple)) else [options[3]] * num_axes
    if len(flags) != num_axes:
        raise RuntimeError(
            f"vitkernels::{op}: is_causal is {options[3]!r}, takes one value or one for each of {num_axes} axes"
        )
    axes: list[Axis] = []
    for i, (n, size, stride, dilation, is_causal) in enumerate(zip(sizes, *counts, flags, strict=True)):
        check_flag(op, "is_causal", is_causal)
        if size * dilation > n > 0:
            times = f" times dilation {dilation}" if dilation > 1 else ""
            raise RuntimeError(f"vitkernels::{op}: kernel_size {size}{times} exceeds the map's axis {i} ({n})")
        if stride > size:
            raise RuntimeError(f"vitkernels::{op}: stride is {stride}, takes at most kernel_size ({size})")
        # An axis without keys has no nearest ones.
        axes.append(Neighborhood(size, stride, dilation, is_causal) if n > 0 else Full())
    if rpb is not None:
        score = score._replace(bias_table=_by_offset(op, data[0], counts[0], rpb))
    return attend_on_map(words, *data, axes, score)


def _by_offset(op: str, query: Tensor, sizes: Sequence[int], rpb: Tensor) -> Tensor:
    """The operator's table, by the offset of the query from the key, from NATTEN's."""
    check_tensors(op, rpb=rpb)
    offsets = [2 * size - 1 for size in sizes]
    if rpb.dim() != len(offsets) + 1 or list(rpb.shape[1:]) != offsets:
        raise RuntimeError(
            f"vitkernels::{op}: rpb has shape {tuple(rpb.shape)}, takes (heads, {', '.join(map(str, offsets))})"
        )
    rpb = in_statistics_dtype(op, query, "rpb", rpb)
    check_stored(op, rpb=rpb)
    return rpb.flip(tuple(range(1, rpb.dim())))
