"""A grid by its tokens, gathered: for traces, which hold the steps of a pattern as constants.

The operator reads a grid where it is, by a step that follows from the size of the map. What ``torch.jit.trace`` records
of sizes are the operations of tensors alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vitkernels.axes import Full
from vitkernels.functional.score import Score
from vitkernels.functional.spatial_attention import attend_on_map
from vitkernels.functional.words import Words

__all__ = ["attend_to_gathered_grids"]


def attend_to_gathered_grids(
    words: Words, query: Tensor, key: Tensor, value: Tensor, sizes: Sequence[int], score: Score
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of :func:`vitkernels.grid_attention` for any map that ``sizes`` divide."""
    num_axes = len(sizes)
    steps = [n // size for n, size in zip(key.shape[1:-2], sizes, strict=True)]
    query = query.expand(key.size(0), *query.shape[1:])
    if score.key_bias is not None:
        whole = score.key_bias.expand(key.size(0), query.size(-2), *key.shape[1:-2])
        gathered = _gathered(whole.movedim(1, -1), sizes, steps).movedim(-1, 1)
        score = score._replace(key_bias=gathered)
    if score.additional_keys is not None and score.additional_values is not None:
        score = score._replace(
            additional_keys=_for_each_grid(score.additional_keys, steps),
            additional_values=_for_each_grid(score.additional_values, steps),
        )
    q, k, v = (_gathered(t, sizes, steps) for t in (query, key, value))
    found = attend_on_map(words, q, k, v, [Full()] * num_axes, score)
    out, lse = (_scattered(t, sizes, steps) for t in found)
    return out, lse


def _gathered(t: Tensor, sizes: Sequence[int], steps: Sequence[int]) -> Tensor:
    """``(B * grids, *sizes, ...)`` from ``(B, *map, ...)``."""
    num_axes = len(sizes)
    for i, (size, step) in enumerate(zip(sizes, steps, strict=True)):
        t = t.unflatten(1 + 2 * i, (size, step))  # type: ignore[no-untyped-call]
    places = [1 + 2 * i for i in range(num_axes)]
    order = [0, *(place + 1 for place in places), *places]
    return t.permute(*order, *range(len(order), t.dim())).flatten(0, num_axes)


def _scattered(t: Tensor, sizes: Sequence[int], steps: Sequence[int]) -> Tensor:
    """The reverse of :func:`_gathered`."""
    num_axes = len(sizes)
    t = t.unflatten(0, (-1, *steps))  # type: ignore[no-untyped-call]
    order = [0, *(place for i in range(num_axes) for place in (1 + num_axes + i, 1 + i))]
    t = t.permute(*order, *range(len(order), t.dim()))
    for i in range(num_axes):
        t = t.flatten(1 + i, 2 + i)
    return t


def _for_each_grid(t: Tensor, steps: Sequence[int]) -> Tensor:
    """``(B * grids, ...)`` from ``(B, ...)``."""
    rest = t.shape[1:]
    whole = t.view(t.size(0), *(1,) * len(steps), *rest).expand(-1, *steps, *rest)
    return whole.flatten(0, len(steps))
