"""Whether two peers computed the same thing. A speed-up of a wrong result is not reported."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.registry import Inputs

__all__ = ["TOLERANCE", "relative_error", "upcast"]

# Largest error of any number, relative to the largest number of the same tensor. Gross errors are meant; the
# tests hold the numerics to a tighter policy.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3, "tf32": 4e-3}


def relative_error(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest error over all tensors; infinite where a number is not finite or shapes differ."""
    if [o.shape for o in outputs] != [r.shape for r in reference]:
        return float("inf")
    worst = 0.0
    for out, ref in zip(outputs, reference, strict=True):
        if out.numel() == 0:
            continue
        size = ref.float().abs().max().item()
        error = (out.float() - ref.float()).abs().max().item() / (size or 1.0)
        worst = max(worst, error) if error == error else float("inf")
    return worst


def upcast(inputs: Inputs) -> Inputs:
    """The same values in float32, those inside a model too."""
    half = (torch.float16, torch.bfloat16)

    def converted(value: Any) -> Any:
        if isinstance(value, nn.Module) and any(p.dtype in half for p in value.parameters()):
            return copy.deepcopy(value).float()
        return value.float() if isinstance(value, Tensor) and value.dtype in half else value

    return {name: converted(value) for name, value in inputs.items()}
