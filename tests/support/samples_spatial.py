"""The rows of ``spatial_attention``: every rule, every term of the score, every way in which maps may differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import vitkernels as vk
from support.calls import statistics_dtype
from support.sample import Fill, Input, Sample, masked, normal, positive, statistic, times, uneven_map
from torch import Tensor
from vitkernels.axes import Axis
from vitkernels.reference.pattern import axis_pattern

# Makes the rule from the numbers of queries and keys on an axis: reduced to what fits a map of any size.
Rule = Callable[[int, int], Axis]


def block(size: int, shift: int = 0, keys: int | None = None, step: int = 1, causal: bool = False) -> Rule:
    return lambda nq, nk: vk.Block(size, shift, keys, step=min(step, max(nq, nk, 1)), is_causal=causal)


def halo(size: int, around: int, keys: int | None = None, shift: int = 0, causal: bool = False) -> Rule:
    return lambda nq, nk: vk.Halo(size, around, keys, shift=shift, is_causal=causal)


def full(step: int = 1, causal: bool = False) -> Rule:
    return lambda nq, nk: vk.Full(min(step, max(nq, nk, 1)), causal)


def near(size: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> Rule:
    def rule(nq: int, nk: int) -> Axis:
        step = min(dilation, nk)
        fitting = min(size, nk // step)
        return vk.Neighborhood(fitting, min(stride, fitting), step, causal)

    return rule


def sliding(size: int, dilation: int = 1, causal: bool = False) -> Rule:
    return lambda nq, nk: vk.Sliding(size, min(dilation, max(nq, nk, 1)), causal)


@dataclass(frozen=True)
class Rules:
    """The argument ``axes``."""

    rules: tuple[Rule, ...]
    query_map: str
    key_map: str

    def make(self, generator: torch.Generator, sizes: Mapping[str, int], dtype: torch.dtype) -> tuple[Axis, ...]:
        maps = zip(self.rules, self.query_map, self.key_map, strict=True)
        return tuple(rule(sizes[q], sizes[k]) for rule, q, k in maps)

    def offsets(self, sizes: Mapping[str, int], has_outside: bool) -> list[int]:
        """How many offsets a table needs on each axis."""
        counts = []
        for rule, q, k in zip(self.rules, self.query_map, self.key_map, strict=True):
            pattern = axis_pattern(rule(sizes[q], sizes[k]), sizes[q], sizes[k], has_outside)
            seen = pattern.offset[pattern.visible].abs()
            counts.append(2 * int(seen.max() if seen.numel() else 0) + 1)
        return counts


@dataclass(frozen=True)
class Table:
    """A table by offset, or embeddings of one axis' offsets. With ``wider``, no pair of tokens uses the ends."""

    rules: Rules
    has_outside: bool
    heads: str
    axis: int | None = None
    fill: Fill = normal
    wider: int = 0

    def make(self, generator: torch.Generator, sizes: Mapping[str, int], dtype: torch.dtype) -> Tensor:
        offsets = [n + 2 * self.wider for n in self.rules.offsets(sizes, self.has_outside)]
        heads = [sizes[a] if a.isalpha() else int(a) for a in self.heads]
        shape = (*heads, *offsets) if self.axis is None else (*heads, offsets[self.axis], sizes["d"])
        return self.fill(generator, shape, dtype).to(statistics_dtype(dtype)).requires_grad_()


def spatial(
    id: str, rules: list[Rule], size: tuple[int, ...], *, b: int = 2, h: int = 3, g: int | None = None, d: int = 16,
    v: int = 24, ratio: int = 1, finer: str = "key", bias: str = "", multiplier: str = "", rel_pos: str | None = None,
    table_fill: Fill = normal, wider: int = 0, tags: str = "", **arguments: Any,
) -> Sample:  # fmt: skip
    """A map of ``size``, ``ratio`` times as fine for keys or queries; ``bias`` and so on are the heads of a table."""
    letters = "zyx"[-len(size) :]
    fine = letters.upper() if ratio > 1 else letters
    query_map, key_map = (letters, fine) if finer == "key" else (fine, letters)
    axes = Rules(tuple(rules), fine if arguments.get("is_shared_query") else query_map, key_map)
    sizes = {"b": b, "h": h, "g": h if g is None else g, "d": d, "v": v, "a": 5, "r": ratio}
    has_outside = arguments.get("outside") is not None
    tables: dict[str, Any] = {
        name: Table(axes, has_outside, heads, fill=table_fill, wider=wider)
        for name, heads in (("bias_table", bias), ("multiplier_table", multiplier))
        if heads
    }
    if rel_pos is not None:
        tables["rel_pos"] = [Table(axes, has_outside, rel_pos, axis, wider=wider) for axis in range(len(size))]
    data = {
        "query": Input(f"b{query_map}hd"), "key": Input(f"b{key_map}gd"), "value": Input(f"b{key_map}gv"), "axes": axes,
    }  # fmt: skip
    every = {**data, **tables, "return_lse": True, **arguments}
    return Sample(
        "spatial_attention", id, every, sizes | dict(zip(letters, size, strict=True)), frozenset(tags.split())
    )


FILL = [Input("gd"), Input("gv")]
ADDITIONAL = {"additional_keys": Input("bagd"), "additional_values": Input("bagv")}
WINDOWS = [block(7, 3)] * 2
NEAR = [near(3), near(5)]

SPATIAL_SAMPLES = [
    spatial("windows", [block(7)] * 2, (14, 21)),
    spatial("windows-shifted", WINDOWS, (14, 14), bias="h", b=3, tags="core deploy linear-memory"),
    spatial("windows-uneven", [block(4, 1), block(5, 2)], (13, 17), bias="1"),
    spatial("windows-1d", [block(33, 9)], (301,), bias="h"),
    spatial("windows-3d", [block(2), block(3, 1), block(4, 3)], (5, 7, 9), bias="h", h=2),
    spatial("windows-causal", [block(7, 3, causal=True), block(5)], (14, 13), bias="1"),
    spatial("windows-of-classes", [block(3, 1, step=2), block(4, step=3)], (14, 13), bias="h"),
    spatial("windows-large", [block(23), block(21)], (25, 22), bias="h", h=2),
    spatial("blocks-fill", [block(4), block(5, 2)], (9, 7), bias="h", outside=FILL),
    spatial("classes-without-keys", [sliding(3, 2)], (1,), ratio=4, finer="query", outside=FILL),
    spatial("blocks-of-one", [block(1)] * 2, (5, 6)),
    spatial("grid", [full(2), full(3)], (14, 15), bias="h", wider=5, tags="core"),
    spatial("stripes", [full(), block(2)], (17, 9), bias="1", wider=2, tags="core"),
    spatial("full", [full()] * 2, (19, 21), tags="core"),
    spatial("full-causal", [full(causal=True)], (203,), rel_pos="h"),
    spatial("neighborhood", NEAR, (9, 11), bias="h", tags="core linear-memory"),
    spatial("neighborhood-7", [near(7)] * 2, (20, 23), d=32, v=32),
    spatial("neighborhood-whole", [near(9), near(11)], (9, 11)),
    spatial("neighborhood-even", [near(4), near(6)], (9, 13), multiplier="h"),
    spatial("neighborhood-dilated", [near(3, dilation=3), near(3, dilation=2)], (17, 20), bias="1", tags="core"),
    spatial("neighborhood-strided", [near(5, 2), near(6, 4)], (13, 17), bias="h", tags="core"),
    spatial("neighborhood-causal", [near(5, causal=True), near(3)], (12, 15), bias="h"),
    spatial("neighborhood-causal-strided", [near(5, 3, 2, True), near(4, 2, 3, True)], (15, 19), bias="1"),
    spatial("neighborhood-1d", [near(13, 1, 4)], (301,), bias="h", rel_pos=""),
    spatial("neighborhood-3d", [near(3), near(3, dilation=2), near(5)], (4, 7, 9), bias="h", h=2, tags="core"),
    spatial("sliding", [sliding(3), sliding(6)], (13, 15), bias="h"),
    spatial("sliding-zero", [sliding(5), sliding(3, 2)], (9, 14), bias="1", outside="zero", tags="core"),
    spatial("sliding-fill", [sliding(5), sliding(4)], (9, 14), h=4, g=2, multiplier="h", outside=FILL, tags="core"),
    spatial("sliding-causal", [sliding(5, causal=True), sliding(4)], (9, 10), rel_pos="", outside="zero"),
    spatial("sliding-wider-than-the-map", [sliding(15), sliding(9)], (4, 5), bias="h", outside=FILL),
    spatial("halo", [halo(4, 1), halo(5, 2)], (13, 15), bias="1"),
    spatial("halo-zero", [halo(4, 3)] * 2, (12, 16), rel_pos="", outside="zero", tags="core"),
    spatial("halo-fill", [halo(3, 2), halo(4, 1)], (10, 9), rel_pos="h", bias="1", outside=FILL, qk_norm="l2",
            tags="mixed"),
    spatial("halo-3d", [halo(2, 1), halo(3, 1), halo(4, 2)], (3, 5, 7), rel_pos="h", outside="zero", h=2),
    spatial("halo-shifted", [halo(4, 1, shift=2), halo(5, 2, shift=1)], (13, 15), outside="zero"),
    spatial("halo-causal", [halo(4, 3, causal=True), halo(4, 2)], (11, 12), bias="h", outside="zero"),
    spatial("radius", [full(), full()], (9, 12), radius=3.2, tags="core"),
    spatial("radius-dilated", [near(5, dilation=2), near(7)], (12, 13), radius=4.0, bias="h"),
    spatial("radius-outside", [sliding(7), sliding(5)], (9, 7), radius=2.3, outside=FILL),
    spatial("shared-query", [block(3)] * 2, (3, 4), ratio=3, query=Input("b33hd"), is_shared_query=True, bias="h",
            tags="core"),
    spatial("shared-query-batch", [block(2), block(4)], (2, 3), ratio=4, b=3, query=Input("124hd"),
            is_shared_query=True, **ADDITIONAL),
    spatial("coarse-queries", [block(4, keys=8), block(3, keys=6)], (9, 10), ratio=2, tags="core"),
    spatial("coarse-queries-halo", [halo(2, 3, 4)] * 2, (6, 8), ratio=2, rel_pos="", outside="zero"),
    spatial("coarse-queries-near", [near(5), near(3, 2)], (7, 6), ratio=3, bias="h"),
    spatial("fine-queries-near", [near(3), near(3)], (5, 6), ratio=4, finer="query", bias="1", tags="core"),
    spatial("fine-queries-sliding", [sliding(3), sliding(2, causal=True)], (5, 6), ratio=2, finer="query", bias="h"),
    spatial("fine-queries-full", [full(causal=True), full()], (4, 5), ratio=3, finer="query", key_bias=statistic("yx")),
    spatial("number-scale", NEAR, (9, 11), scale=0.3),
    spatial("head-scale", WINDOWS, (13, 14), scale=statistic("h", positive), multiplier="1", tags="core"),
    *(spatial(f"key-bias-{axes}", NEAR, (9, 11), key_bias=statistic(axes)) for axes in ("bhyx", "1h1x", "y1", "b1yx")),
    spatial("masked-keys", WINDOWS, (13, 15), key_bias=statistic("b1yx", masked), tags="core"),
    spatial("masked-windows", [block(2, 1)] * 2, (9, 10), key_bias=statistic("bhyx", masked)),
    spatial("masked-offsets", NEAR, (12, 11), bias="h", table_fill=masked),
    spatial("grouped", [near(3), block(4)], (9, 11), h=6, g=2, bias="h"),
    spatial("head-map", NEAR, (9, 11), h=4, g=3, head_map=Input("h", uneven_map, dtype=torch.int64), bias="h",
            tags="core"),
    spatial("expanded-query", WINDOWS, (12, 9), b=3, query=Input("1yxhd", expand="byxhd")),
    spatial("qk-norm", WINDOWS, (14, 9), qk_norm="l2", scale=statistic("h", positive), bias="h", tags="core mixed"),
    spatial("additional", NEAR, (9, 11), **ADDITIONAL, tags="core"),
    spatial("all-terms", [near(5), halo(3, 1)], (11, 10), h=4, g=2, scale=statistic("h", positive), outside=FILL,
            key_bias=statistic("b1yx"), bias="1", multiplier="h", rel_pos="h", radius=3.0, **ADDITIONAL, tags="core"),
    spatial("no-lse", WINDOWS, (8, 9), return_lse=False, tags="core"),
    *(spatial(f"dims-{d}-{v}", [block(4, 1), near(3)], (9, 10), d=d, v=v) for d, v in ((1, 1), (33, 130), (80, 7))),
    spatial("large-logits", WINDOWS, (13, 14), query=Input("byxhd", times(9.0)), key=Input("byxgd", times(9.0))),
    spatial("no-batch", WINDOWS, (13, 14), b=0, bias="h", tags="core"),
    spatial("no-queries", [block(4)] * 2, (0, 9), key_bias=statistic("yx")),
]  # fmt: skip
