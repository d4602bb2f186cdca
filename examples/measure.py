"""Agreement, time and memory of two versions of one model."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import NamedTuple

import torch
from dinov2 import Output, SaliencyModel
from torch import Tensor

__all__ = ["Agreement", "Timing", "agreement", "peak_memory", "time_pairs"]

FLOOR = 2e-5  # of the reference's largest value, about 170 float32 roundings through twelve layers


class Agreement(NamedTuple):
    """The largest absolute errors over all photos, and the lowest cosine similarity of a photo."""

    size: int
    output: str
    reference: str
    stock_error: float
    ours_error: float
    ours_cosine: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.ours_error <= self.limit  # false for NaN


def agreement(
    size: int, reference: str, references: list[Output], stock: list[Output], ours: list[Output]
) -> list[Agreement]:
    """One row for each output. Ours may be off by twice what stock is, plus ``FLOOR``."""

    def error(a: Tensor, b: Tensor) -> float:
        return (a.double() - b.double()).abs().max().item()

    def cosine(a: Tensor, b: Tensor) -> float:
        return torch.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()

    rows = []
    for output in Output._fields:
        r, s, o = ([getattr(one, output) for one in outputs] for outputs in (references, stock, ours))
        stock_error = max(map(error, s, r))
        limit = 2 * stock_error + FLOOR * max(one.abs().max().item() for one in r)
        worst = torch.tensor(list(map(error, o, r))).max().item()  # keeps a NaN, unlike max()
        rows.append(Agreement(size, output, reference, stock_error, worst, min(map(cosine, o, r)), limit))
    return rows


class Timing(NamedTuple):
    """Medians over all pairs, in seconds; the speed-ups are of each pair, with their quartiles."""

    size: int
    stock_backbone: float
    ours_backbone: float
    stock_decoder: float
    ours_decoder: float
    backbone_speedup: tuple[float, float, float]
    whole_speedup: tuple[float, float, float]


def time_pairs(
    stock: SaliencyModel, ours: SaliencyModel, photos: list[Tensor], repeats: int, step: Callable[[], None]
) -> Timing:
    """Time one photo at a time, stock and ours in turn, so that a drifting clock meets both alike.

    ``step`` is called after each pair; the first pair warms up and is not counted.
    """

    def run(model: SaliencyModel, pixels: Tensor) -> tuple[float, float]:
        start = perf_counter()
        features = model.backbone(pixel_values=pixels).last_hidden_state
        middle = perf_counter()
        model.decoder(features, *pixels.shape[-2:])
        return middle - start, perf_counter() - middle

    pairs = []
    for i in range(repeats + 1):
        pixels = photos[i % len(photos)]
        pairs.append((run(stock, pixels), run(ours, pixels)))
        step()
    pairs = pairs[1:]

    def ratios(cost: Callable[[tuple[float, float]], float]) -> tuple[float, float, float]:
        values = [cost(a) / cost(b) for a, b in pairs]
        low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return low, middle, high

    return Timing(
        photos[0].size(-1),
        *(median(pair[who][part] for pair in pairs) for part in (0, 1) for who in (0, 1)),
        backbone_speedup=ratios(lambda times: times[0]),
        whole_speedup=ratios(sum),
    )


def peak_memory(run: Callable[[], object]) -> int | None:
    """How far, in bytes, resident memory rises above its start while ``run`` runs; None if Linux won't tell.

    The kernel keeps the high-water mark, so nothing short-lived is missed. Memory that the allocator holds
    free is given back first, or the rise would hide in it. Let ``run`` run once before: what stays allocated
    between calls (weights, thread pools, buffers kept for the next call) is not counted.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    except OSError:
        return None
    before = resident("VmHWM")
    run()
    return max(resident("VmHWM") - before, 0)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
