"""Time and memory of two versions of one model, with the harness of the benchmarks."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import Effort, Spread, interleave, resident_peak, spread
from examples.dinov2 import SaliencyModel

__all__ = ["Timing", "peak_memory", "time_models"]


class Timing(NamedTuple):
    """Medians over all rounds, in seconds; the speed-ups are of each round."""

    size: int
    stock_backbone: float
    ours_backbone: float
    stock_decoder: float
    ours_decoder: float
    backbone_speedup: Spread
    whole_speedup: Spread


def time_models(stock: SaliencyModel, ours: SaliencyModel, pixels: Tensor, rounds: int) -> Timing:
    """Time one photo, stock and ours in turn, so that a drifting clock meets both alike."""
    effort = Effort(rounds, rounds, seconds=0.0, batch_seconds=0.0, matmul_size=0, copy_bytes=0)
    models, features = {"stock": stock, "ours": ours}, {}
    for name, model in models.items():
        features[name] = model.backbone(pixel_values=pixels).last_hidden_state
    calls = {f"{name}_backbone": partial(m.backbone, pixel_values=pixels) for name, m in models.items()}
    calls |= {f"{name}_decoder": partial(m.decoder, features[name], *pixels.shape[-2:]) for name, m in models.items()}
    times, _ = interleave(calls, effort, torch.device("cpu"))
    whole = {
        who: [sum(p) for p in zip(times[f"{who}_backbone"], times[f"{who}_decoder"], strict=True)] for who in models
    }

    def ratios(a: list[float], b: list[float]) -> Spread:
        return spread([x / y for x, y in zip(a, b, strict=True)])

    return Timing(
        pixels.size(-1),
        **{name: median(seconds) for name, seconds in times.items()},
        backbone_speedup=ratios(times["stock_backbone"], times["ours_backbone"]),
        whole_speedup=ratios(whole["stock"], whole["ours"]),
    )


def peak_memory(model: SaliencyModel, pixels: Tensor) -> int | None:
    """How far, in bytes, resident memory rises while the backbone runs; ``None`` where Linux will not tell.

    After a call before it: what stays allocated between calls, as weights and thread pools, is not counted.
    """
    try:
        return resident_peak(partial(model.backbone, pixel_values=pixels))[1]
    except OSError:
        return None
