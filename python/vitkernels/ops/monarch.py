"""The operators of Monarch matrices."""

from __future__ import annotations

from torch import Tensor

from vitkernels.ops.registration import register
from vitkernels.ops.schema import Arguments

__all__ = ["blockdiag_butterfly_multiply", "long_conv", "spectral_gating"]


def _out_and_inner(given: Arguments) -> tuple[Tensor, Tensor]:
    x, w1, w2 = given["x"], given["w1"], given["w2"]
    rows = x.shape[0]
    inner = x.new_empty((rows if given["keeps_inner"] else 0, w1.shape[0] * w1.shape[1]))
    return x.new_empty((rows, w2.shape[0] * w2.shape[1])), inner


blockdiag_butterfly_multiply = register("blockdiag_butterfly_multiply", _out_and_inner)
long_conv = register("long_conv", lambda given: given["x"].new_empty(given["x"].shape))
spectral_gating = register("spectral_gating", lambda given: given["x"].new_empty(given["x"].shape))
