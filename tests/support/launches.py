"""Shared memory and threads of every kernel's launches, as the emulator sees them, for ``make cuda-report``.

PYTHONPATH=tests python -m support.launches FILE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import vitkernels as vk
from support.calls import Call, differentiate
from support.devices import DTYPES, FUNCTIONS, HALF, is_taken
from support.emulation import Emulator
from support.operands import tokens
from support.sample import Sample
from support.samples import SAMPLES

from tools.cuda_report import demangle, short_name

#: Rows that together reach every kernel, at each tile size; and what is not small in them.
ROWS: dict[str, dict[str, int]] = {
    "plain": {}, "bias-hqk": {}, "bias-table": {}, "rel-pos-2": {}, "tokens-197-203": {"q": 64, "k": 130},
    "tokens-197-203-bias": {"q": 64, "k": 130}, "all-terms": {}, "all-terms-on-grid": {}, "column-sums": {},
    "parts-2": {}, "shared-query": {}, "relu": {}, "one-scale": {}, "long": {"k": 600},
    "more-blocks": {}, "16-blocks": {}, "5-channels-of-769-in-both-directions": {"x": 5000}, "very-long": {"x": 20001},
}  # fmt: skip
HEAD_DIMS = (32, 64, 128, 256)


def windows(dim: int, dtype: torch.dtype) -> None:
    """Small ones, which have kernels of their own."""
    query, key, value = (tokens(1, 4, 4, 1, dim, dtype=dtype, seed=i).requires_grad_() for i in range(3))
    vk.window_attention(query, key, value, 2).sum().backward()


def head_dims(sample: Sample, dtype: torch.dtype) -> tuple[int, ...]:
    if "linear_attention" in sample.operator or sample.operator == "channel_attention":
        return (32, 64, 128) if dtype == torch.bfloat16 else (32, 64)
    return HEAD_DIMS if "d" in sample.sizes else (32, 33)  # vectors, and values one by one


@torch.no_grad()
def outputs(function: Callable[..., object], call: Call) -> None:
    function(**call)


def calls() -> Iterator[Callable[[], object]]:
    for sample in (s for s in SAMPLES if s.id in ROWS and is_taken(s)):
        for dtype in (d for d in DTYPES if d in FUNCTIONS[sample.operator]):
            for dim in head_dims(sample, dtype):
                sizes = {**sample.small(), **ROWS[sample.id], "d": dim, "v": dim}
                if is_taken(replace(sample, sizes=sizes)):
                    yield partial(differentiate, sample.function, sample.call(dtype, sizes=sizes))
                else:
                    yield partial(outputs, sample.function, sample.call(dtype, sizes=sizes))
    for dtype in HALF:
        yield from (partial(windows, dim, dtype) for dim in (32, 64))


def run() -> dict[str, list[int]]:
    """By kernel: bytes of shared memory, static plus dynamic, and threads per block, of the largest launch."""
    emulator = Emulator()
    found: dict[str, list[int]] = {}
    for call in calls():
        emulator.reset()
        with emulator.on_cpu_tensors():
            call()
        assert not emulator.errors(), emulator.errors()
        launches = emulator.launches()
        for launch, name in zip(launches, demangle(x.symbol for x in launches), strict=True):
            block = launch.block[0] * launch.block[1] * launch.block[2]
            function, arguments = short_name(name)
            kernel = f"{function}<{arguments}>" if arguments else function
            before = found.get(kernel, [0, 0])
            found[kernel] = [max(before[0], launch.shared_bytes), max(before[1], block)]
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run(), indent=1) + "\n")
