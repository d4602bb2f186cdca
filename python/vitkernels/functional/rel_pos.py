"""Embeddings of offsets, one table for each axis of a grid, as the operator takes them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vitkernels.functional.arguments import check_tensors, in_statistics_dtype

__all__ = ["embeddings"]

_MAX_AXES = 3


def embeddings(op: str, query: Tensor, rel_pos: Sequence[Tensor], num_axes: int | None) -> list[Tensor | None]:
    """``rel_pos_depth, rel_pos_height, rel_pos_width``; a grid of fewer axes lacks the first ones.

    ``num_axes`` is that of the grid, where something else says it.
    """
    takes = "takes a sequence of one table for each of one to three axes"
    if not isinstance(rel_pos, (list, tuple)) or not all(isinstance(t, Tensor) for t in rel_pos):
        raise RuntimeError(f"vitkernels::{op}: rel_pos is {type(rel_pos).__name__}, {takes}")
    if not 1 <= len(rel_pos) <= _MAX_AXES:
        raise RuntimeError(f"vitkernels::{op}: rel_pos has {len(rel_pos)} tables, {takes}")
    if num_axes is not None and 1 <= num_axes <= _MAX_AXES and len(rel_pos) != num_axes:
        raise RuntimeError(
            f"vitkernels::{op}: rel_pos has {len(rel_pos)} tables, takes one for each of {num_axes} axes"
        )
    check_tensors(op, **{f"rel_pos[{i}]": t for i, t in enumerate(rel_pos)})
    absent: list[Tensor | None] = [None] * (_MAX_AXES - len(rel_pos))
    return absent + [in_statistics_dtype(op, query, f"rel_pos[{i}]", t) for i, t in enumerate(rel_pos)]
