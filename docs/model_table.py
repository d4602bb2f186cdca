"""What ``vk.accelerate`` does to models of timm, torchvision and transformers, as a Markdown table.

    python -m docs.model_table [--quick] [--only WORD] [--batch N] [--out FILE]

The weights are random. ``--quick`` measures so briefly that the speed-ups mean little.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import vitkernels as vk
from torch import Tensor, nn

from benchmarks.machine import describe, line
from benchmarks.measure import FULL, QUICK, Effort, interleave, spread
from benchmarks.models import _import, _result

TIMM = (
    "vit_small_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3",
    "eva02_small_patch14_224", "vit_small_patch16_rope_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224",
    "vit_base_patch16_siglip_224", "vit_pe_core_small_patch16_384", "naflexvit_base_patch16_gap", "cait_xxs24_224",
    "xcit_tiny_12_p16_224", "crossvit_small_240", "convit_small", "tnt_s_patch16_224", "pit_s_224", "volo_d1_224",
    "hiera_tiny_224", "sam2_hiera_tiny", "levit_256", "pvt_v2_b2", "twins_svt_small", "nextvit_small",
    "efficientformer_l3", "efficientformerv2_s1", "visformer_small", "mobilevit_s", "fastvit_sa24", "iformer_s",
    "lowformer_b1", "mobilenetv4_hybrid_medium", "coatnet_0_rw_224", "caformer_s18", "resnet50_clip", "shvit_s4",
    "efficientvit_m4", "mvitv2_tiny", "swin_tiny_patch4_window7_224", "maxvit_tiny_rw_224", "davit_tiny",
)  # fmt: skip
TORCHVISION = ("vit_b_16", "swin_t")
TRANSFORMERS = ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "SiglipVision", "CLIPVision", "IJepa", "Swin")
_LAYER_SCALE = 1e-2  # vectors of a constant up to this are the initial values of layer scales


class Row(NamedTuple):
    """One model. Errors are relative to the largest value of the float64 output."""

    model: str
    replaced: str
    stock: str
    speedup: float
    stock_error: float
    error: float

    def __str__(self) -> str:
        errors = f"{self.error:.1e} ({self.stock_error:.1e})"
        return f"| {self.model} | {self.replaced} | {self.stock} | {self.speedup:.2f} | {errors} |"


HEADER = (
    "| model | replaced | left as it is, and why | speed-up | error (stock) |\n"
    "|---|---|---|---|---|"
)  # fmt: skip


def models(word: str) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, model and image size of everything in the lists whose name contains ``word``."""
    for name in (name for name in TIMM if word in f"timm {name}"):
        model = _import("timm").create_model(name, pretrained=False)
        yield f"timm {name}", model, model.default_cfg["input_size"][-1]
    for name in (name for name in TORCHVISION if word in f"torchvision {name}"):
        yield f"torchvision {name}", _import("torchvision.models").get_model(name, weights=None), 224
    for name in (name for name in TRANSFORMERS if word in f"transformers {name}"):
        library = _import("transformers")
        config = getattr(library, f"{name}Config")(image_size=224)
        yield f"transformers {name}", getattr(library, f"{name}Model")(config), 224


def show_attention(model: nn.Module) -> None:
    """Change initial values that would hide the attention and its errors: layer scales, matrices of zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            low, high = parameter.aminmax()
            if parameter.dim() == 1 and 0.0 < low == high <= _LAYER_SCALE:
                parameter.fill_(1.0)
            elif parameter.dim() > 1 and low == high == 0.0:
                nn.init.normal_(parameter, std=0.02)


def measure(name: str, model: nn.Module, size: int, batch: int, effort: Effort) -> Row:
    """Agreement in float32 against float64, and the speed of the forward pass."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size)
    show_attention(model)
    models = {"stock": model.eval(), "ours": copy.deepcopy(model)}
    report = vk.accelerate(models["ours"])
    with torch.no_grad():
        truth = _result(copy.deepcopy(model).double()(images.double()))
        largest = truth.abs().max()
        errors: dict[str, Tensor] = {k: (_result(m(images)) - truth).abs().max() / largest for k, m in models.items()}
        times = interleave({k: lambda m=m: m(images) for k, m in models.items()}, effort, images.device)
    speedup = spread([stock / ours for stock, ours in zip(times["stock"], times["ours"], strict=True)]).median
    replaced = Counter(entry.kind for entry in report.replaced)
    left = Counter(f"{entry.kind}: {entry.reason}" for entry in report.stock)
    replaced_cell, left_cell = ("; ".join(f"{n} x {what}" for what, n in c.items()) or "-" for c in (replaced, left))
    return Row(name, replaced_cell, left_cell, speedup, errors["stock"].item(), errors["ours"].item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="measure only briefly")
    parser.add_argument("--only", default="", help="models whose library and name contain this")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    given = parser.parse_args()
    machine = line(describe(torch.device("cpu")))
    lines = [f"Forward pass, float32, batch {given.batch}, random weights. {machine}", "", HEADER]
    print("\n".join(lines))
    for name, model, size in models(given.only):
        row = measure(name, model, size, given.batch, QUICK if given.quick else FULL)
        lines.append(str(row))
        print(row, flush=True)
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
