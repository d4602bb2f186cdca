"""How far a result may be from the truth, the reference in float64.

An error counts as its largest entry. It may be twice that of plain PyTorch, the reference in the call's own
dtype, for a gradient three times, plus a floor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from support.calls import differentiate, in_float64
from support.samples import Sample
from torch import Tensor

OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
# By the call's dtype, in units of the tensor's largest entry (at least 1). Plain PyTorch can be exact by luck; float64
# is its own truth; and the backward gets the probabilities from lse, to a relative precision of lse roundings.
FLOOR = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def largest_error(found: Tensor, truth: Tensor) -> float:
    """NaN if an entry is NaN, infinity if one is elsewhere than in the truth, rounded to the dtype's range."""
    truth = truth.where(truth.to(found.dtype).isfinite(), truth.to(found.dtype).double())
    error = (found.double() - truth).abs().masked_fill(found.isinf() & (found == truth), 0.0)
    return error.max().item() if error.numel() else 0.0


def check_error(name: str, ours: Tensor, plain: Tensor, truth: Tensor, factor: float, floor: float) -> None:
    assert ours.shape == truth.shape and ours.dtype == plain.dtype, f"{name}: {ours.shape} {ours.dtype}"
    finite = truth[truth.isfinite()]
    floor *= max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
    error, plain_error = largest_error(ours, truth), largest_error(plain, truth)
    # Where plain PyTorch overflows, it sets no standard: the dtype's resolution does.
    bound = factor * (plain_error if math.isfinite(plain_error) else 0.0) + floor
    assert error <= bound, f"{name}: error {error:.3g}, plain PyTorch's {plain_error:.3g}, floor {floor:.3g}"


def check_sample(sample: Sample, dtype: torch.dtype, slack: float = 1.0, **at: Any) -> None:
    """``slack`` multiplies the floor; ``at`` is what :meth:`Sample.call` takes."""
    call, floor = sample.call(dtype, **at), slack * FLOOR[dtype]
    ours, grads = differentiate(sample.function, call)
    plain, plain_grads = differentiate(sample.reference, call)
    truth, true_grads = differentiate(sample.reference, in_float64(call))
    for i, tensors in enumerate(zip(ours, plain, truth, strict=True)):
        check_error(f"output {i}", *tensors, OUTPUT_FACTOR, floor)
    for i, tensors in enumerate(zip(grads, plain_grads, true_grads, strict=True)):
        check_error(f"gradient {i}", *tensors, GRADIENT_FACTOR, floor)
