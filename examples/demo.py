"""A trained DINOv2 ViT-S/14, stock and accelerated: agreement, time, memory and a picture.

    python -m examples.demo [--image PATH ...] [--out DIR] [--sizes 224 518] [--repeats N] [--threads N]

Writes ``dinov2.json`` and ``dinov2.png``. If the accelerated model does not agree, the exit status is 1 and
there is no picture.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import vitkernels as vk
from tqdm import tqdm

from examples.agreement import Agreement, agreement
from examples.dinov2 import ONNX_SIZE, PATCH, load_model, model_path, onnx_outputs
from examples.figure import Row, draw
from examples.photos import open_photo, sample_photos
from examples.printing import machine, mebibytes, table
from examples.timing import Timing, peak_memory, time_models


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--image", type=Path, action="append", help="a photo of yours; repeat for more")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the results")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 518], help="pixels a side")
    parser.add_argument("--repeats", type=int, default=24, help="timed rounds of forward passes at each size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    given = parser.parse_args()
    for size in given.sizes:
        if size < PATCH or size % PATCH:
            parser.error(f"--sizes {size}: takes multiples of {PATCH}")
    for name in ("repeats", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)}: takes 1 or more")
    try:
        given.photos = [open_photo(path) for path in given.image or ()] or sample_photos()
    except OSError as error:  # no such file, or none that Pillow reads
        parser.error(f"--image: {error}")
    given.sizes = sorted(set(given.sizes))
    return given


def timing_table(timings: list[Timing], memory: dict[int, tuple[int | None, ...]]) -> str:
    rows: list[list[str]] = []
    for t in timings:
        stages = [("backbone", t.stock_backbone, t.ours_backbone, t.backbone_speedup)]
        whole = (t.stock_backbone + t.stock_decoder, t.ours_backbone + t.ours_decoder)
        stages.append(("with decoder", *whole, t.whole_speedup))
        for stage, stock, ours, ratio in stages:
            peaks = map(mebibytes, memory[t.size]) if stage == "backbone" else ("", "")
            times = (
                f"{stock * 1e3:.1f}",
                f"{ours * 1e3:.1f}",
                f"{ratio.median:.2f}x",
                f"{ratio.low:.2f} to {ratio.high:.2f}",
            )
            rows.append([str(t.size), str((t.size // PATCH) ** 2 + 1), stage, *times, *peaks])
    times = ["stock ms", "vitkernels ms", "speed-up", "deciles"]
    return table(["pixels", "tokens", "", *times, "stock MiB", "vitkernels MiB"], rows)


def agreement_table(checks: list[Agreement]) -> str:
    rows = [
        [str(c.size), c.output, c.reference]
        + [f"{value:.1e}" for value in (c.stock_error, c.ours_error, c.limit, 1 - c.ours_cosine)]
        + ["ok" if c.ok else "TOO FAR"]
        for c in checks
    ]
    errors = ["stock error", "vitkernels error", "limit", "1 - cosine"]
    return table(["pixels", "output", "against", *errors, ""], rows)


@torch.inference_mode()
def main() -> int:
    given = arguments()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    photos = given.photos
    check_sizes = sorted({ONNX_SIZE, *given.sizes})
    hardware = machine(given.threads, ("torch", "transformers", "onnxruntime"))
    print(hardware)

    path = model_path()
    stock = load_model(path)
    ours = copy.deepcopy(stock)
    report = vk.accelerate(ours)
    print(report)
    if not report.replaced:
        sys.exit("Nothing was accelerated, so there is nothing to compare.")
    exact = copy.deepcopy(stock).double()

    checks: list[Agreement] = []
    timings: list[Timing] = []
    memory: dict[int, tuple[int | None, ...]] = {}
    steps = len(check_sizes) * len(photos) + len(given.sizes)
    with tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
        for size in check_sizes:
            bar.set_description(f"checking at {size} pixels")
            pixels = [photo.pixels(size) for photo in photos]
            outputs = []
            for one in pixels:
                outputs.append((stock(one), ours(one), exact(one.double())))
                bar.update()
            by_stock, by_ours, by_exact = map(list, zip(*outputs, strict=True))
            if size == ONNX_SIZE:
                by_onnx = onnx_outputs(path, pixels, given.threads)
                checks += agreement(size, "onnxruntime", by_onnx, by_stock, by_ours)
            checks += agreement(size, "float64", by_exact, by_stock, by_ours)
            checks += agreement(size, "stock", by_stock, by_stock, by_ours)
        for size in given.sizes:
            bar.set_description(f"timing at {size} pixels")
            photo = photos[0].pixels(size)
            timings.append(time_models(stock, ours, photo, given.repeats))
            memory[size] = tuple(peak_memory(model, photo) for model in (stock, ours))
            bar.update()

    print("\nTime for one photo, and resident memory that the backbone's forward adds")
    print(timing_table(timings, memory))
    print("\nLargest error over all photos")
    print(agreement_table(checks))

    results = {
        "machine": hardware,
        "photos": [photo.name for photo in photos],
        "repeats": given.repeats,
        "timings": [
            t._asdict()
            | {name: asdict(getattr(t, name)) for name in ("backbone_speedup", "whole_speedup")}
            | {"peak_memory": memory[t.size]}
            for t in timings
        ],
        "agreement": [c._asdict() | {"ok": c.ok} for c in checks],
    }
    (given.out / "dinov2.json").write_text(json.dumps(results, indent=2) + "\n")
    failures = [f"{c.output} at {c.size} pixels against {c.reference}" for c in checks if not c.ok]
    if failures:
        print(f"The accelerated model does not agree: {'; '.join(failures)}", file=sys.stderr)
        return 1
    images = [photo.square(check_sizes[-1]) for photo in photos]
    rows = [Row(*row) for row in zip(images, by_stock, by_ours, strict=True)]
    draw(given.out / "dinov2.png", rows, timings, hardware)
    print(f"\nWritten: {given.out / 'dinov2.png'} and dinov2.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
