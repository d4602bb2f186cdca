"""Compares every sample with its reference in this process, whose environment names the instruction set.

python -m support.reference_worker ISA short|all
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from support.error_policy import FLOOR, check_sample
from support.samples import CORE, SAMPLES, Sample
from vitkernels import _library

FEW_PAIRS = 70_000  # of queries and keys


def calls(short: bool) -> Iterator[tuple[Sample, torch.dtype]]:
    """All, or those that cover arguments, conversions and tails of tiles."""
    for sample in SAMPLES:
        pairs = sample.sizes.get("q", 1) * sample.sizes.get("k", 1)
        is_tail = sample.id.startswith(("tokens", "dims")) and pairs < FEW_PAIRS
        for dtype in FLOOR:
            if not short or sample in CORE or (is_tail and dtype in (torch.float32, torch.bfloat16)):
                yield sample, dtype


def run(short: bool) -> int:
    count = 0
    for sample, dtype in calls(short):
        try:
            check_sample(sample, dtype)
        except Exception as error:
            raise AssertionError(f"{sample} {dtype}: {error}") from error
        count += 1
    return count


if __name__ == "__main__":
    isa, rows = sys.argv[1:]
    assert _library.isa() == isa, _library.isa()
    print(run(rows == "short"))
