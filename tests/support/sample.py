"""What a row of the table of samples consists of: tensors to be filled, and the sizes that determine their shapes.

A row describes each tensor by the letters of its dimensions, whose lengths are the row's ``sizes``. A gate asks a row
for a call in some dtype, at the row's own sizes (hostile ones) or at small ones (where a gate is slow).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import vitkernels as vk
from support.calls import Call, statistics_dtype
from support.devices import DEVICE
from torch import Tensor

Fill = Callable[[torch.Generator, tuple[int, ...], torch.dtype], Tensor]

# Upper bounds of a small call's sizes.
SMALL = {"b": 2, "q": 4, "k": 6, "d": 5, "v": 3, "a": 3, "n": 3, "t": 5, "u": 7, "z": 2, "y": 3, "x": 4}
GROWING = "bqkantuzyx"


def normal(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def times(factor: float) -> Fill:
    return lambda *at: normal(*at) * factor


def positive(*at: Any) -> Tensor:
    return normal(*at).abs() + 0.25


def fraction(*at: Any) -> Tensor:
    return positive(*at) / 4


def masked(*at: Any) -> Tensor:
    """A third of the elements is -inf."""
    values = normal(*at)
    return values.masked_fill(normal(*at) > 0.43, -torch.inf)


def masked_rows(*at: Any) -> Tensor:
    """As ``masked``; and every third row, the first one included, is all -inf."""
    values = masked(*at)
    values[..., ::3, :] = -torch.inf
    return values


def lowest(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A mask as transformers writes it: -inf is the lowest finite number. Every row keeps a key."""
    values = masked(generator, shape, dtype).clamp(min=torch.finfo(dtype).min)
    values[..., :1] = 0.0
    return values


def lowest_rows(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return masked_rows(generator, shape, dtype).clamp(min=torch.finfo(dtype).min)


def lowest_only(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.finfo(dtype).min, dtype=torch.float64)


def empty(*at: Any) -> Tensor:
    return torch.full_like(normal(*at), -torch.inf)


def ones(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def lse_like(*at: Any) -> Tensor:
    """An lse as of some hundred keys, not of the call's: probabilities vary in size without being absurd."""
    return normal(*at) + 6.0


def lse_of_some(*at: Any) -> Tensor:
    """Every third query, the first one included, sees no key."""
    values = lse_like(*at)
    values[:, ::3] = -torch.inf
    return values


def uneven_map(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A group of one head, and a group of all others; no head reads kv head 1."""
    return torch.tensor([0] + [2] * (shape[0] - 1), dtype=dtype)


@dataclass(frozen=True)
class Input:
    """A tensor argument: one letter of the sizes, or a 1, for each dimension."""

    axes: str
    fill: Fill = normal
    expand: str = ""  # the tensor is a stride-0 view with these dimensions
    statistics: bool = False  # in the precision of the statistics; else data, in the call's dtype
    dtype: torch.dtype | None = None  # instead of either
    learns: bool = True

    def make(self, generator: torch.Generator, sizes: Mapping[str, int], dtype: torch.dtype) -> Tensor:
        def shape(axes: str) -> tuple[int, ...]:
            return tuple(sizes[a] if a.isalpha() else int(a) for a in axes)

        dtype = self.dtype or (statistics_dtype(dtype) if self.statistics else dtype)
        tensor = self.fill(generator, shape(self.axes), dtype).to(dtype).to(DEVICE)
        if self.expand:
            tensor = tensor.expand(shape(self.expand))
        return tensor.requires_grad_(self.learns and dtype.is_floating_point)


@dataclass(frozen=True)
class Offsets:
    """Where each of ``count`` packed sequences of random lengths begins, then the number of tokens."""

    count: str
    tokens: str
    dtype: torch.dtype = torch.int32

    def make(self, generator: torch.Generator, sizes: Mapping[str, int], dtype: torch.dtype) -> Tensor:
        cuts = torch.randint(sizes[self.tokens] + 1, (sizes[self.count] - 1,), generator=generator)
        return torch.tensor([0, *sorted(cuts.tolist()), sizes[self.tokens]], dtype=self.dtype, device=DEVICE)


@dataclass(frozen=True)
class RegionGraph:
    """For each region of the queries' map ``topk`` regions of the keys' map, drawn at random: some of them twice."""

    query_map: str
    key_map: str
    region: tuple[int, ...]
    kv_region: tuple[int, ...]
    topk: int
    heads: str = "1"
    dtype: torch.dtype = torch.int64

    def make(self, generator: torch.Generator, sizes: Mapping[str, int], dtype: torch.dtype) -> Tensor:
        counts = [
            math.prod(-(-sizes[a] // size) for a, size in zip(letters, region, strict=True))
            for letters, region in ((self.query_map, self.region), (self.key_map, self.kv_region))
        ]
        shape = (sizes["b"], sizes.get(self.heads, 1), counts[0], self.topk if counts[1] else 0)
        return torch.randint(max(counts[1], 1), shape, generator=generator, dtype=self.dtype).to(DEVICE)


@dataclass(frozen=True)
class Indices:
    """Numbers of tokens, drawn at random: some of them twice. ``below`` is the letter of how many there are.

    Without tokens the lists are empty, and counts (of lists, whose tokens are ``counted``) are zero.
    """

    axes: str
    below: str
    counted: str = ""
    dtype: torch.dtype = torch.int64

    def make(self, generator: torch.Generator, sizes: Mapping[str, int], dtype: torch.dtype) -> Tensor:
        shape = [sizes[a] if a.isalpha() else int(a) for a in self.axes]
        end = sizes[self.below] if sizes[self.counted or self.below] else 0
        if not end and not self.counted:
            shape[-1] = 0
        return torch.randint(max(end, 1), shape, generator=generator, dtype=self.dtype).to(DEVICE)


@dataclass(frozen=True)
class Length:
    """A size as an argument."""

    letter: str

    def make(self, generator: torch.Generator, sizes: Mapping[str, int], dtype: torch.dtype) -> int:
        return sizes[self.letter]


@dataclass(frozen=True)
class RandomFeatures:
    """A feature map by ``count`` random projections."""

    count: int

    def make(self, generator: torch.Generator, sizes: Mapping[str, int], dtype: torch.dtype) -> vk.FeatureMap:
        projection = torch.randn(self.count, sizes["d"], generator=generator, dtype=torch.float64) * 0.5
        return vk.FeatureMap("performer", projection=projection.to(DEVICE))


def statistic(axes: str, fill: Fill = normal, **options: Any) -> Input:
    return Input(axes, fill, statistics=True, **options)


def on_grid(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes derived from a map of ``z``, ``y``, ``x`` tokens: those of a map ``r`` times as fine (capitals).

    Or, from a grid behind ``p`` prefix tokens: the number of tokens, and of offsets (capitals). Or, without either, of
    the frequencies that a row of ``x`` real values has.
    """
    axes = {a: sizes[a] for a in "zyx" if a in sizes}
    if "r" not in sizes and "p" not in sizes and "x" in sizes:
        return {"X": sizes["x"] // 2 + 1}
    if "r" in sizes:
        return {a.upper(): n * sizes["r"] for a, n in axes.items()}
    if not axes:
        return {}
    tokens = math.prod(axes.values()) + sizes["p"]
    return {"q": tokens, "k": tokens} | {a.upper(): 2 * n - 1 for a, n in axes.items()}


@dataclass(frozen=True, repr=False, eq=False)
class Sample:
    operator: str
    id: str
    arguments: Mapping[str, Any]  # makers of an argument from the sizes, lists of makers, and options
    sizes: Mapping[str, int]
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(vk, self.operator)

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(vk.reference, self.operator)

    def call(self, dtype: torch.dtype, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> Call:
        generator = torch.Generator().manual_seed(seed)
        at = {**self.sizes, **{a: n for a, n in (sizes or {}).items() if a in self.sizes}}
        at |= on_grid(at)

        def make(argument: Any) -> Any:
            if isinstance(argument, list):
                return [make(a) for a in argument]
            return argument.make(generator, at, dtype) if hasattr(argument, "make") else argument

        return {name: make(argument) for name, argument in self.arguments.items()}

    def small(self, grown: int = 0) -> dict[str, int]:
        """Sizes of at most SMALL's, q > k kept; ``grown`` is added to each size that can vary."""
        small = {a: min(n, SMALL.get(a, n)) for a, n in self.sizes.items()}
        if self.sizes.get("q", 0) > self.sizes.get("k", 0) > 1:
            small["q"], small["k"] = small["k"], small["q"]
        return {a: n + grown if a in GROWING and n > 1 else n for a, n in small.items()}

    def __repr__(self) -> str:
        return f"{self.operator}-{self.id}"
