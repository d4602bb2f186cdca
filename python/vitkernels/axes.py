"""Which keys a query sees along one axis of a map: the words in which a pattern is given.

What they mean is written in csrc/attention/pattern.h; :mod:`vitkernels.reference.pattern` says the same in Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from vitkernels._torch_private import sizes_are_tensors

__all__ = ["Axis", "Block", "Full", "Halo", "Neighborhood", "Sliding", "encode"]

_RULES = {"full": 0, "block": 1, "neighborhood": 2, "sliding": 3}  # Rule in pattern.h


class Axis:
    """One axis of a pattern: :class:`Full`, :class:`Block`, :class:`Halo`, :class:`Neighborhood` or :class:`Sliding`.

    A ``step`` (or ``dilation``) larger than 1 splits the axis into residue classes that do not see one another: tokens
    ``r, r + step, r + 2 step, ...``. Within one, its tokens count as if nothing lay between them.
    """

    #: What was given as tensors, the sizes of a trace.
    traced: Mapping[str, torch.Tensor] = MappingProxyType({})

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if name == "is_causal":
                if not isinstance(value, (bool, torch.SymBool)):
                    raise RuntimeError(
                        f"vitkernels::{type(self).__name__}: is_causal is {value!r}, takes True or False"
                    )
                continue
            at_least = 0 if name in ("shift", "halo") else 1
            if (type(value) is int and value >= at_least) or (name == "key_size" and value is None):
                continue
            if isinstance(value, torch.Tensor) and sizes_are_tensors():
                object.__setattr__(self, "traced", {**self.traced, name: value})
                value = int(value)
                object.__setattr__(self, name, value)
            is_integer = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
            if not is_integer or value < at_least:
                raise RuntimeError(
                    f"vitkernels::{type(self).__name__}: {name} is {value!r}, takes an integer from {at_least} on"
                )

    def encoded(self) -> list[int]:
        """The operator's integers: rule, step, size, key_size, shift, halo, stride, is_causal."""
        raise NotImplementedError


def _encoded(
    rule: str, *, step: int = 1, size: int = 1, key_size: int | None = None, shift: int = 0, halo: int = 0,
    stride: int = 1, is_causal: bool = False,
) -> list[int]:  # fmt: skip
    return [_RULES[rule], step, size, size if key_size is None else key_size, shift, halo, stride, int(is_causal)]


@dataclass(frozen=True)
class Full(Axis):
    """All keys of the axis, or of the query's residue class.

    Args:
        step: with ``n // g``, the query sees ``g`` keys spread evenly over the axis (MaxViT's grid).
        is_causal: only keys at or before the query.
    """

    step: int = 1
    is_causal: bool = False

    def encoded(self) -> list[int]:
        return _encoded("full", step=self.step, is_causal=self.is_causal)


@dataclass(frozen=True)
class Block(Axis):
    """The keys of the query's block in the partition ``[0, shift), [shift, shift + size), ...``.

    Args:
        size: queries of a block. The last one, and the one before the shift, may have fewer.
        shift: where the first whole block begins, less than ``size``.
        key_size: keys of a block, where the map of the keys is finer or coarser than that of the queries. Default
            ``size``.
        step: tokens from one of a residue class to the next.
        is_causal: only keys at or before the query.
    """

    size: int
    shift: int = 0
    key_size: int | None = None
    step: int = 1
    is_causal: bool = False

    def encoded(self) -> list[int]:
        return _encoded(
            "block", step=self.step, size=self.size, key_size=self.key_size, shift=self.shift, is_causal=self.is_causal
        )


@dataclass(frozen=True)
class Halo(Axis):
    """The keys of the query's block, and ``halo`` more on both sides.

    Args:
        size: queries of a block.
        halo: keys on either side of it.
        key_size: keys of a block without its halo, where the map of the keys is finer or coarser than that of the
            queries. Default ``size``.
        shift: where the first whole block begins, less than ``size``.
        step: tokens from one of a residue class to the next.
        is_causal: only keys at or before the query.
    """

    size: int
    halo: int
    key_size: int | None = None
    shift: int = 0
    step: int = 1
    is_causal: bool = False

    def encoded(self) -> list[int]:
        return _encoded(
            "block", step=self.step, size=self.size, key_size=self.key_size, shift=self.shift, halo=self.halo,
            is_causal=self.is_causal,
        )  # fmt: skip


@dataclass(frozen=True)
class Neighborhood(Axis):
    """The ``kernel_size`` keys nearest to the query: as many at the border as inside.

    Args:
        kernel_size: keys of a neighborhood, at most those of the axis (of a residue class).
        stride: so many successive queries share a neighborhood.
        dilation: tokens from one key to the next.
        is_causal: only keys at or before the query, at most ``kernel_size`` of them; fewer at the beginning.
    """

    kernel_size: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False

    def encoded(self) -> list[int]:
        return _encoded(
            "neighborhood", step=self.dilation, size=self.kernel_size, stride=self.stride, is_causal=self.is_causal
        )


@dataclass(frozen=True)
class Sliding(Axis):
    """The ``kernel_size`` keys around the query: those beyond the border are absent, or ``outside``.

    Args:
        kernel_size: keys of a window, from ``kernel_size // 2`` before the query on.
        dilation: tokens from one key to the next.
        is_causal: only keys at or before the query.
    """

    kernel_size: int
    dilation: int = 1
    is_causal: bool = False

    def encoded(self) -> list[int]:
        return _encoded("sliding", step=self.dilation, size=self.kernel_size, is_causal=self.is_causal)


def encode(axes: Iterable[Axis]) -> list[int]:
    """What the operator takes for ``axes``: eight integers for each."""
    return [integer for axis in axes for integer in axis.encoded()]
