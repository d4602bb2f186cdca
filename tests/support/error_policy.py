"""How far a result may be from the truth, the reference in float64.

The error of a tensor is that of its worst element. It may be twice that of plain PyTorch, the reference in the call's
own dtype, for a gradient three times, plus a floor.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.calls import Call, differentiate, in_float64
from support.devices import ON_CPU
from support.samples import Sample
from torch import Tensor

OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
STORE = "VITKERNELS_TEST_STORE"
# By the call's dtype, in units of the tensor's largest element (at least 1). Plain PyTorch can be exact by luck;
# float64 is its own truth; and the backward recomputes the probabilities from lse, which was rounded.
FLOOR = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def largest_error(found: Tensor, truth: Tensor) -> float:
    """NaN if an element is NaN, infinity if infinities differ from those of the truth in the dtype's range."""
    truth = truth.where(truth.to(found.dtype).isfinite(), truth.to(found.dtype).double())
    error = (found.double() - truth).abs().masked_fill(found.isinf() & (found == truth), 0.0)
    return error.max().item() if error.numel() else 0.0


@dataclass(frozen=True)
class Standard:
    """What one of our tensors is compared with."""

    name: str
    truth: Tensor
    plain_error: float
    plain_dtype: torch.dtype

    def check(self, ours: Tensor, factor: float, floor: float) -> None:
        assert ours.shape == self.truth.shape and ours.dtype == self.plain_dtype, (
            f"{self.name}: {ours.shape} {ours.dtype}"
        )
        finite = self.truth[self.truth.isfinite()]
        floor *= max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
        error = largest_error(ours, self.truth)
        # Where plain PyTorch overflows, it sets no standard: only the floor counts.
        bound = factor * (self.plain_error if math.isfinite(self.plain_error) else 0.0) + floor
        assert error <= bound, (
            f"{self.name}: error {error:.3g}, plain PyTorch's {self.plain_error:.3g}, floor {floor:.3g}"
        )


Standards = tuple[list[Standard], list[Standard]]


def standards(sample: Sample, call: Call) -> Standards:
    """The standards of the outputs, and of the gradients."""
    plain = differentiate(sample.reference, call)
    truth = differentiate(sample.reference, in_float64(call))

    def of(name: str, tensors: list[Tensor], true: list[Tensor]) -> list[Standard]:
        pairs = enumerate(zip(tensors, true, strict=True))
        return [Standard(f"{name} {i}", t, largest_error(p, t), p.dtype) for i, (p, t) in pairs]

    return of("output", plain[0], truth[0]), of("gradient", plain[1], truth[1])


def stored(name: str, compute: Callable[[], Standards]) -> Standards:
    """Computed once per run of the tests, whose processes share the folder that the environment names."""
    folder = os.environ.get(STORE)
    if folder is None:
        return compute()
    path = Path(folder) / f"{name}.pt"
    if path.exists():
        return torch.load(path, weights_only=False)
    found = compute()
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        torch.save(found, file)
    os.replace(file.name, path)
    return found


def check_sample(sample: Sample, dtype: torch.dtype, slack: float = 1.0, **at: Any) -> None:
    """``slack`` multiplies the floor; ``at`` are options of :meth:`Sample.call`."""
    call, floor = sample.call(dtype, **at), slack * FLOOR[dtype]
    ours, grads = differentiate(sample.function, call)
    is_own = not any(at.values())  # the call that other instruction sets and the emulator repeat
    compute = partial(standards, sample, call)
    outputs, gradients = stored(f"{sample}-{dtype}", compute) if is_own and ON_CPU else compute()
    for tensor, standard in zip(ours, outputs, strict=True):
        standard.check(tensor, OUTPUT_FACTOR, floor)
    for tensor, standard in zip(grads, gradients, strict=True):
        standard.check(tensor, GRADIENT_FACTOR, floor)
