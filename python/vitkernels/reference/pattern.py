"""csrc/attention/pattern.h once more, in Python: which keys a query sees. The names are the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vitkernels.axes import Axis

__all__ = ["AxisPattern", "AxisRule", "axis_pattern"]

FULL, BLOCK, NEIGHBORHOOD, SLIDING = range(4)


@dataclass(frozen=True)
class AxisRule:
    """One axis of a map."""

    rule: int
    step: int
    size: int
    key_size: int
    shift: int
    halo: int
    stride: int
    is_causal: bool
    num_queries: int
    num_keys: int
    has_outside: bool = False

    def of_class(self, r: int) -> AxisRule:
        """The axis of the tokens ``r, r + step, r + 2 step, ...``"""
        return replace(
            self,
            num_queries=-(-(self.num_queries - r) // self.step),
            num_keys=-(-(self.num_keys - r) // self.step),
            step=1,
        )

    def coord(self, u: int) -> int:
        """Where query ``u`` is on the key grid."""
        return u * self.num_keys // self.num_queries

    def keys(self, u: int) -> range:
        """The keys of query ``u``."""
        seen = self._causal(u) if self.is_causal else self._uncut(u)
        if self.has_outside and not self.is_causal:
            return seen
        return range(max(seen.start, 0), min(seen.stop, self.num_keys))

    def _uncut(self, u: int) -> range:
        if self.rule == BLOCK:
            index = (u - self.shift + self.size) // self.size - 1
            begin = self.shift * self.key_size // self.size + index * self.key_size
            return range(begin - self.halo, begin + self.key_size + self.halo)
        if self.rule == NEIGHBORHOOD:
            leader = self._leader(u, self.stride // 2)
            begin = max(0, min(leader - self.size // 2, self.num_keys - self.size))
            return range(begin, begin + self.size)
        if self.rule == SLIDING:
            begin = self.coord(u) - self.size // 2
            return range(begin, begin + self.size)
        return range(self.num_keys)

    def _causal(self, u: int) -> range:
        end = self.coord(u) + 1
        if self.rule == NEIGHBORHOOD:
            return range(self._leader(u, self.stride - 1) - self.size + 1, end)
        uncut = self._uncut(u)
        return range(max(uncut.start, 0), min(uncut.stop, end))

    def _leader(self, u: int, within: int) -> int:
        """The query whose neighborhood all of a stride take, on the key grid."""
        return min(self.coord(u) // self.stride * self.stride + within, self.num_keys - 1)


class AxisPattern(NamedTuple):
    """One axis, pair by pair. Keys are counted from ``first`` on, which is negative where some lie outside the map."""

    visible: Tensor  # [queries, keys], boolean
    offset: Tensor  # [queries, keys], query - key in tokens of a residue class
    first: int

    def on(self, device: torch.device) -> AxisPattern:
        return AxisPattern(self.visible.to(device), self.offset.to(device), self.first)


def axis_pattern(axis: Axis, num_queries: int, num_keys: int, has_outside: bool) -> AxisPattern:
    """What the rule of ``axis`` says of every query and key, those outside the map included."""
    rule, step, size, key_size, shift, halo, stride, is_causal = axis.encoded()
    whole = AxisRule(
        rule, step, size, key_size, shift, halo, stride, bool(is_causal), num_queries, num_keys, has_outside
    )
    classes = [whole.of_class(r) for r in range(min(step, max(num_queries, num_keys)))]
    seen = [classes[u % step].keys(u // step) for u in range(num_queries)]
    own = [range(keys.start * step + u % step, keys.stop * step + u % step, step) for u, keys in enumerate(seen)]
    first = min([0, *(keys.start for keys in own if keys)])
    last = max([num_keys - 1, *(keys[-1] for keys in own if keys)])
    visible = torch.zeros(num_queries, last + 1 - first, dtype=torch.bool)
    for row, keys in zip(visible, own, strict=True):
        row[keys.start - first : max(keys.stop - first, 0) : step] = True
    coord = torch.tensor([classes[u % step].coord(u // step) for u in range(num_queries)], dtype=torch.int64)
    key = torch.arange(first, last + 1).div(step, rounding_mode="floor")
    return AxisPattern(visible, coord[:, None] - key, first)
