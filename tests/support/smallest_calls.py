"""Runs every kernel at least once, on the smallest calls that cover all arguments: for checkers that slow kernels down.

VITKERNELS_TEST_DEVICE=cuda compute-sanitizer python -m support.smallest_calls
"""

from __future__ import annotations

import torch
from support.calls import differentiate
from support.devices import DEVICE, DTYPES, is_taken, why_not
from support.samples import SAMPLES
from vitkernels._library import backends


def run() -> int:
    """The number of calls."""
    count = 0
    for sample in SAMPLES:
        if "core" not in sample.tags or not is_taken(sample):
            continue
        for dtype in (d for d in DTYPES[1:] if why_not(sample, d) is None):
            outputs, grads = differentiate(sample.function, sample.call(dtype, sizes=sample.small()))
            assert not any(t.isnan().any() for t in outputs + grads), f"{sample} {dtype}"
            count += 1
    # Several tiles in both directions, each with a tail.
    for sample in (s for s in SAMPLES if s.id in ("plain", "dims-96-96", "dims-256-256", "key-bias-long")):
        if is_taken(sample):
            sizes = {"b": 1, "q": 150}
            if "query" in sample.arguments:  # elsewhere the letters have other meanings
                sizes |= {"h": 2, "g": 1, "k": 140, "t": 150, "u": 140}
            dtype = next(d for d in reversed(DTYPES) if why_not(sample, d) is None)
            differentiate(sample.function, sample.call(dtype, sizes=sizes))
            count += 1
    return count


if __name__ == "__main__":
    assert backends()[DEVICE.type] == "loaded", backends()
    calls = run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls on {DEVICE}")
