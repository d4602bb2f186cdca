"""A vision transformer with dense MLPs, and with Monarch ones: time and memory of the whole model.

    python -m examples.monarch_vit [--model NAME] [--batch N] [--nblocks N] [--dtype NAME] [--rounds N] [--threads N]

The weights are random, which changes neither. Accuracy takes training: the table's error is what there is to win back.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import vitkernels as vk
from torch import Tensor, nn

from benchmarks.measure import Effort, Spread, interleave, resident_peak, spread
from benchmarks.models import _import
from examples.printing import machine, mebibytes, table

__all__ = ["Measured", "main", "measure"]


class Measured(NamedTuple):
    """One of the models."""

    seconds: float
    """A batch; median."""
    speedup: Spread
    """The first model's time in the same round, divided by this one's."""
    peak: int | None
    """How far, in bytes, a forward raises resident memory; ``None`` where Linux will not tell."""
    parameters: int


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_small_patch16_224", help="a name that timm.create_model takes")
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--nblocks", type=int, default=4, help="blocks of each Monarch factor")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of forward passes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parsed = parser.parse_args(given)
    for name in ("batch", "nblocks", "rounds", "threads"):
        if getattr(parsed, name) < 1:
            parser.error(f"--{name} {getattr(parsed, name)}: takes 1 or more")
    return parsed


def measure(models: dict[str, nn.Module], images: Tensor, rounds: int) -> dict[str, Measured]:
    """Time all models in turn, so that a drifting clock meets them alike."""
    effort = Effort(rounds, rounds, seconds=0.0, batch_seconds=0.0, matmul_size=0, copy_bytes=0)
    found = {}
    with torch.inference_mode():
        times, _ = interleave({name: partial(m, images) for name, m in models.items()}, effort, images.device)
        first = next(iter(times.values()))
        for name, model in models.items():
            try:
                peak = resident_peak(partial(model, images))[1]
            except OSError:
                peak = None
            speedup = spread([a / b for a, b in zip(first, times[name], strict=True)])
            parameters = sum(parameter.numel() for parameter in model.parameters())
            found[name] = Measured(median(times[name]), speedup, peak, parameters)
    return found


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    timm: Any = _import("timm")
    dense = timm.create_model(options.model).eval()
    images = torch.randn(options.batch, *dense.default_cfg["input_size"], dtype=dtype)
    monarch = copy.deepcopy(dense)
    print(vk.monarchize(monarch, nblocks=options.nblocks))
    accelerated = copy.deepcopy(monarch)
    vk.accelerate(accelerated)
    models = {"dense": dense, "Monarch": monarch, "Monarch, accelerated": accelerated}
    found = measure({name: model.to(dtype) for name, model in models.items()}, images, options.rounds)
    rows = []
    for name, m in found.items():
        times = (f"{m.seconds * 1e3:.1f}", f"{m.speedup.median:.2f}x", f"{m.speedup.low:.2f} to {m.speedup.high:.2f}")
        rows.append([name, f"{m.parameters:,}", *times, mebibytes(m.peak)])
    print(f"\n{options.model}, batch {options.batch}, {options.dtype}; {machine(options.threads, ('torch', 'timm'))}\n")
    print(table(["model", "parameters", "ms", "speed-up", "deciles", "peak MiB"], rows))


if __name__ == "__main__":
    main()
