"""The demo's picture: photos, saliency maps, patch features as colours, and timing bars."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # writes files on machines without a display

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from examples.dinov2 import PATCH, Output
from examples.timing import Timing

__all__ = ["Row", "draw", "patch_colours"]

# Inches: a picture, the gap to the next, the border, a line of titles, the notes at the foot, the names
# beside the bars, the bars with their title.
TILE, GAP, MARGIN, HEAD, NOTES, LABELS, BARS = 1.75, 0.05, 0.1, 0.3, 0.5, 0.8, 1.25
STOCK, OURS, DECODER, INK, NOTE = "#9aa5b1", "#0f8b8d", "#e3e7eb", "#1f2933", "#616e7c"
CENTRE = {"ha": "center", "va": "center"}
TITLES = ("photo", "saliency, stock", "saliency, vitkernels", "patch features (PCA)")


class Row(NamedTuple):
    """One photo and what the two models made of it; tensors with batch size 1."""

    image: Image.Image
    stock: Output
    ours: Output


def patch_colours(features: Tensor, columns: int) -> NDArray[np.float32]:
    """The three strongest principal components of ``(1, 1 + patches, C)`` features as an RGB image.

    The image is ``(patches / columns, columns, 3)`` in 0..1. The sign of a component is arbitrary; making its
    largest loading positive gives a photo the same colours every time.
    """
    patches = features[0, 1:].double()
    centred = patches - patches.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]  # [3, C]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    parts = centred @ axes.T
    low, high = torch.quantile(parts, torch.tensor([0.02, 0.98], dtype=parts.dtype), dim=0)
    colours = ((parts - low) / (high - low)).clamp(0, 1)
    return colours.unflatten(0, (-1, columns)).float().numpy()


def draw(path: Path, rows: list[Row], timings: list[Timing], caption: str) -> None:
    """Write the picture to ``path``; with more than three photos, two go side by side."""
    across = 2 if len(rows) > 3 else 1
    down = ceil(len(rows) / across)
    lines = ceil(len(timings) / across)
    pitch, block = TILE + GAP, len(TITLES) * (TILE + GAP) + MARGIN
    foot = NOTES + lines * BARS
    width, height = across * block + MARGIN, HEAD + down * pitch + foot
    figure = plt.figure(figsize=(width, height), facecolor="white")

    def place(left: float, bottom: float, wide: float, high: float) -> Axes:
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    for i, row in enumerate(rows):
        left, bottom = MARGIN + i // down * block, foot + (down - 1 - i % down) * pitch
        cells = [place(left + j * pitch, bottom, TILE, TILE) for j in range(len(TITLES))]
        draw_row(cells, row)
        for cell, title in zip(cells, TITLES if i % down == 0 else (), strict=False):
            cell.set_title(title, fontsize=9.5, color=INK, pad=5)
    for i, timing in enumerate(timings):
        left, bottom = MARGIN + i % across * block + LABELS, NOTES + (lines - 1 - i // across) * BARS
        draw_bars(place(left, bottom, block - LABELS - MARGIN, BARS - HEAD - MARGIN), timing)
    key = "Median time for one photo: backbone, then decoder (light). Speed-up of the backbone, quartiles."
    where = (MARGIN / width, MARGIN / height)
    figure.text(*where, f"{key}\n{caption}", fontsize=7.5, color=NOTE, linespacing=1.5)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_row(cells: list[Axes], row: Row) -> None:
    grey = np.asarray(row.image.convert("L"))
    extent = (0, row.image.width, row.image.height, 0)
    cells[0].imshow(row.image, extent=extent)
    for cell, output in ((cells[1], row.stock), (cells[2], row.ours)):
        saliency = output.saliency[0, 0].numpy()
        cell.imshow(grey, cmap="gray", extent=extent)
        cell.imshow(saliency, cmap="inferno", vmin=0, vmax=1, alpha=0.35 + 0.6 * saliency, extent=extent)
    difference = (row.stock.saliency - row.ours.saliency).abs().max().item()
    note = f"differs by at most {difference:.0e}"
    corner = {"ha": "right", "va": "bottom", "transform": cells[2].transAxes}
    cells[2].text(0.97, 0.03, note, fontsize=6.5, color="white", **corner)
    colours = patch_colours(row.ours.features, row.image.width // PATCH)
    cells[3].imshow(colours, interpolation="bicubic", extent=extent)
    for cell in cells:
        cell.set_axis_off()


def draw_bars(axis: Axes, timing: Timing) -> None:
    backbone = [timing.stock_backbone * 1e3, timing.ours_backbone * 1e3]
    decoder = [timing.stock_decoder * 1e3, timing.ours_decoder * 1e3]
    whole = [a + b for a, b in zip(backbone, decoder, strict=True)]
    axis.barh([0, 1], backbone, color=[STOCK, OURS], height=0.74)
    axis.barh([0, 1], decoder, left=backbone, color=DECODER, height=0.74)
    for y in (0, 1):
        axis.text(backbone[y] / 2, y, f"{backbone[y]:.0f} ms", color="white", fontsize=10, **CENTRE)
        axis.text(whole[y] - decoder[y] / 2, y, f"{decoder[y]:.0f}", color=INK, fontsize=8, **CENTRE)
    speedup = timing.backbone_speedup
    side = {"va": "center_baseline", "ha": "left"}
    large = axis.text(whole[1], 1, f" {speedup.median:.2f}x", color=OURS, fontsize=13, weight="bold", **side)
    axis.annotate(
        f" {speedup.low:.2f} to {speedup.high:.2f}", (1, 0.5), xycoords=large, color=NOTE, fontsize=7.5, **side
    )
    axis.set_xlim(0, 1.3 * max(whole))  # room for the speed-up, whichever bar is longer
    tokens = (timing.size // PATCH) ** 2 + 1
    axis.set_title(f"{timing.size} pixels, {tokens} tokens", loc="left", fontsize=9.5, color=INK)
    axis.set_yticks([0, 1], ["stock", "vitkernels"], fontsize=9.5, color=INK)
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
