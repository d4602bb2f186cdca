"""What the softmax functions do with the arguments of the score before their operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitkernels.functional.merge_attentions import merge_attentions
from vitkernels.functional.rel_pos import by_axis
from vitkernels.ops import attention as _ops

__all__ = ["NOT_ON_GRID", "NO_MAP", "check_options", "normalize", "on_grid", "with_additional_keys"]

NO_MAP = (0.0, False, None, None)  # radius, has_outside, key_fill, value_fill
NOT_ON_GRID = (None,) * 5  # bias_table, multiplier_table, rel_pos_depth, rel_pos_height, rel_pos_width


def check_options(
    op: str,
    value: Tensor,
    qk_norm: str | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
) -> None:
    """Raise on options that no operator sees."""
    if qk_norm not in (None, "l2"):
        raise RuntimeError(f"vitkernels::{op}: qk_norm is {qk_norm!r}, takes None or 'l2'")
    if (additional_keys is None) != (additional_values is None):
        raise RuntimeError(f"vitkernels::{op}: additional_keys and additional_values must be given together")
    if additional_values is not None and additional_values.shape[-1:] != value.shape[-1:]:
        raise RuntimeError(
            f"vitkernels::{op}: additional_values has shape {tuple(additional_values.shape)}, takes value's head "
            f"dimension ({value.shape[-1]}) as its last"
        )


def normalize(op: str, name: str, t: Tensor) -> Tensor:
    """``t`` divided by its Euclidean norm over the last dimension. (float16 would hold neither norm nor epsilon.)"""
    if t.layout != torch.strided:
        raise RuntimeError(f"vitkernels::{op}: {name} is a {t.layout} tensor, takes a strided one")
    _ops.check_floating(op, name, t)
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    return torch.nn.functional.normalize(wide, dim=-1).to(t.dtype)


def on_grid(
    op: str,
    query: Tensor,
    bias_table: Tensor | None,
    multiplier_table: Tensor | None,
    rel_pos: Sequence[Tensor] | None,
    num_axes: int | None = None,
) -> Sequence[Tensor | None]:
    """The operator's terms by place on a grid, of ``num_axes`` if that is known."""
    if bias_table is None and multiplier_table is None and rel_pos is None:
        return NOT_ON_GRID
    tables = {"bias_table": bias_table, "multiplier_table": multiplier_table}
    converted = _ops.in_statistics_dtype(op, query, tables)
    for table in converted:
        num_axes = table.dim() - 1 if num_axes is None and table is not None else num_axes
    return [*converted, *by_axis(op, query, rel_pos, num_axes)]


def with_additional_keys(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    additional_keys: Tensor,
    additional_values: Tensor,
    scale: float,
    head_scale: Tensor | None,
    head_map: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` as if ``query (B, *, heads, d)`` had seen these keys too, which get no term but the scale."""
    terms = (None,) * 3  # bias, key_bias, multiplier
    extra: Sequence[Tensor] = _ops.attention(
        query.flatten(1, -3), additional_keys, additional_values, scale, head_scale, *terms, *NOT_ON_GRID, 0, head_map,
        *NO_MAP, False, _ops.allow_tf32(query),
    )  # fmt: skip
    extra = [t.reshape(query.shape[:-2] + t.shape[2:]) for t in extra]
    if extra[0].shape[1:-2] != out.shape[1:-2]:  # one query for all windows of the map
        extra = [_repeated(t, own.shape[1 : query.dim() - 2]) for t, own in zip(extra, (out, lse), strict=True)]
    return merge_attentions([out, extra[0]], [lse, extra[1]])


def _repeated(window: Tensor, sizes: Sequence[int]) -> Tensor:
    counts = [n // size for n, size in zip(sizes, window.shape[1:], strict=False)]
    return window.repeat(1, *counts, *(1,) * (window.dim() - 1 - len(counts)))
