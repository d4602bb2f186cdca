"""Weights as the kernels of the CPU read them, kept from call to call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitkernels._torch_private import has_dispatch_mode, is_tracing, is_transformed

__all__ = ["PackedWeights"]


class _Entry(NamedTuple):
    weights: tuple[Tensor, Tensor]
    stored: tuple[Tensor, Tensor]
    """Aliases, which keep the memory: other weights cannot come to lie there."""
    versions: tuple[int, int]
    dtype: torch.dtype
    packed: Tensor


class PackedWeights:
    """Both weights of :func:`vitkernels.blockdiag_butterfly_multiply` packed, as long as they do not change.

    Not every change is seen: fused optimizers, collectives and aliases count none.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def of(self, w1: Tensor, w2: Tensor) -> Tensor | None:
        """The weights packed, in autocast's dtype if that is at work, or ``None`` where each call has to do it."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_tracing():
            return None
        if is_transformed() or has_dispatch_mode():
            return None
        weights = (w1, w2)
        if not w1.is_cpu:  # moved: what was packed is of no use any more
            self._entry = None
        if w1.dtype != w2.dtype or not all(map(_is_watched, weights)):
            return None
        dtype = w1.dtype
        if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
            dtype = torch.get_autocast_dtype("cpu")
        entry = self._entry
        if entry is None or not _is_current(entry, weights, dtype):
            versions = (w1._version, w2._version)  # before they are read: another thread may change them
            stored = (w1.detach(), w2.detach())
            packed = torch.ops.vitkernels.blockdiag_butterfly_pack(*(w.to(dtype) for w in stored))
            self._entry = entry = _Entry(weights, stored, versions, dtype, packed)
        return entry.packed

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        # Copies and files do without: they hold other weights.
        return PackedWeights, ()


def _is_watched(weight: Tensor) -> bool:
    """Whether this process alone changes it, and counts that."""
    is_own = type(weight) is nn.Parameter and not weight.is_shared()  # type: ignore[no-untyped-call]
    return is_own and weight.is_cpu and not weight.is_inference()


def _is_current(entry: _Entry, weights: tuple[Tensor, Tensor], dtype: torch.dtype) -> bool:
    return entry.dtype == dtype and all(
        new is old
        and new._version == version
        and (new.data_ptr(), new.shape, new.stride()) == (stored.data_ptr(), stored.shape, stored.stride())
        for new, old, version, stored in zip(weights, entry.weights, entry.versions, entry.stored, strict=True)
    )
