"""Interleaved timing. Ratios travel between machines and moments, absolute times do not."""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

__all__ = ["FULL", "QUICK", "Effort", "Spread", "batch", "interleave", "spread", "synchronize"]


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds go on until ``seconds`` have passed, within the two limits."""

    min_rounds: int
    max_rounds: int
    seconds: float
    batch_seconds: float
    """Short calls are repeated until one measured time is at least this long."""
    matmul_size: int
    copy_bytes: int
    clock: Callable[[], float] = perf_counter
    """``process_time``, with one thread, on a machine that others use at the same time."""


FULL = Effort(7, 31, seconds=4.0, batch_seconds=0.02, matmul_size=2048, copy_bytes=64 << 20)
QUICK = Effort(3, 5, seconds=0.3, batch_seconds=0.002, matmul_size=512, copy_bytes=16 << 20)


@dataclass(frozen=True)
class Spread:
    """Median and the 10th and 90th percentile."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), deciles[0], deciles[-1])


def synchronize(device: torch.device) -> None:
    """Wait until the work that was queued on ``device`` is done."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def batch(
    call: Callable[[], Any], repeats: int, device: torch.device, clock: Callable[[], float] = perf_counter
) -> float:
    """Seconds per call, of ``repeats`` calls."""
    synchronize(device)
    start = clock()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (clock() - start) / repeats


def _calibrate(call: Callable[[], Any], batch_seconds: float, device: torch.device) -> int:
    batch(call, 1, device)  # the first call loads code and fills allocators
    repeats = 1
    while (each := batch(call, repeats, device)) * repeats < batch_seconds:
        # A margin, because the clock changes between calibration and measurement.
        repeats = max(repeats + 1, math.ceil(1.2 * batch_seconds / max(each, 1e-7)))
    return repeats


def interleave(calls: dict[str, Callable[[], Any]], effort: Effort, device: torch.device) -> dict[str, list[float]]:
    """Time all calls in turn, A B C, B A C ..., and return the seconds per call of each round.

    Whatever disturbs the machine for longer than a round disturbs all calls alike, so that the ratios within
    a round keep their meaning. Each round has its own order, so that nobody always follows the same one, and
    short calls run once untimed, so that they do not pay for the caches that another left behind.
    """
    repeats = {name: _calibrate(call, effort.batch_seconds, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        start, rounds = perf_counter(), 0
        while rounds < effort.min_rounds or (rounds < effort.max_rounds and perf_counter() - start < effort.seconds):
            shuffle(order)
            for name in order:
                if repeats[name] > 1:
                    calls[name]()
                times[name].append(batch(calls[name], repeats[name], device, effort.clock))
            rounds += 1
    finally:
        gc.enable()
    return times
