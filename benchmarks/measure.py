"""Interleaved timing, and peaks of memory. Ratios travel between machines and moments, absolute times do not."""

from __future__ import annotations

import ctypes
import gc
import math
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

__all__ = [
    "FULL",
    "GPU",
    "QUICK",
    "Effort",
    "Spread",
    "batch",
    "interleave",
    "matmul_precision",
    "own_stream",
    "resident_peak",
    "spread",
    "synchronize",
]


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
GPU = Effort(7, 15, seconds=0.4, batch_seconds=0.003, matmul_size=8192, copy_bytes=1 << 30)

_MOST_REPEATS = 200  # of a call in one graph


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
    return _seconds(_repeated(call, repeats), device, clock) / repeats


def _repeated(call: Callable[[], Any], repeats: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(repeats):
            call()

    return run


def _seconds(run: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    synchronize(device)
    if device.type == "cuda":  # between events on the stream: without what the host takes to wait
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    start = clock()
    run()
    synchronize(device)
    return clock() - start


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` as a CUDA graph, or itself where something in it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        run()
        # A backward pass runs on the stream of its forward, which is this one: see `own_stream`.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, a stream that can be captured, as the default one cannot."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@contextmanager
def matmul_precision(dtype: str) -> Iterator[None]:
    """Products of float32 in full, or for ``tf32`` rounded."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _calibrate(call: Callable[[], Any], batch_seconds: float, device: torch.device) -> int:
    batch(call, 1, device)  # the first call loads code and fills allocators
    repeats = 1
    most = _MOST_REPEATS if device.type == "cuda" else math.inf
    while (each := batch(call, repeats, device)) * repeats < batch_seconds and repeats < most:
        # A margin, because the clock changes between calibration and measurement.
        repeats = max(repeats + 1, math.ceil(1.2 * batch_seconds / max(each, 1e-7)))
    return repeats


def interleave(
    calls: dict[str, Callable[[], Any]], effort: Effort, device: torch.device, *, replayed: bool = False
) -> tuple[dict[str, list[float]], list[str]]:
    """Time all calls in turn, A B C, B A C ..., and return the seconds per call of each round.

    Whatever disturbs the machine for longer than a round disturbs all calls alike, so that the ratios within
    a round keep their meaning. Each round has its own order, so that nobody always follows the same one, and
    short calls run once untimed, so that they do not pay for the caches that another left behind. ``replayed``: on a
    GPU, as graphs; returns also the names of those that could not be captured.
    """
    repeats = {name: _calibrate(call, effort.batch_seconds, device) for name, call in calls.items()}
    runs, eager = {name: _repeated(call, repeats[name]) for name, call in calls.items()}, []
    if replayed and device.type == "cuda":
        captured = {name: _captured(run) for name, run in runs.items()}
        eager = [name for name, run in runs.items() if captured[name] is run]
        runs = captured
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
                times[name].append(_seconds(runs[name], device, effort.clock) / repeats[name])
            rounds += 1
    finally:
        gc.enable()
    return times, eager


def _status(field: str) -> int:
    """A size from the kernel's account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def resident_peak(call: Callable[[], Result]) -> tuple[Result, int]:
    """What ``call`` returns, and how far in bytes its resident memory peaked above where it started.

    The kernel keeps the high-water mark, so that nothing short-lived is missed. Needs a Linux that lets it be reset.
    """
    # Free heap that is still resident would hide allocations.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark restarts from what is in use
    resident, mapped = _status("VmRSS"), _status("RssFile")
    outputs = call()
    # Pages of libraries that the call was the first to touch are code, not its memory.
    code = _status("RssFile") - mapped
    return outputs, _status("VmHWM") - resident - code
