"""What ``vk.accelerate`` does to models of timm, torchvision and transformers: the page docs/models.md.

    python -m tools.model_table [--threads N] [--cpu-time] [--only WORD] [--out FILE]

Each family runs in a process of its own. Finished models are kept in ``--rows`` until the commit changes, so a run
that was interrupted continues where it stopped, and retries what failed. The weights are random.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import process_time
from typing import Any

import torch
import vitkernels as vk
from torch import Tensor, nn

from benchmarks.machine import describe, line
from benchmarks.measure import Effort, interleave, spread
from benchmarks.models import _import, _result, show_attention

_EFFORT = Effort(3, 15, seconds=1.5, batch_seconds=0.02, matmul_size=2048, copy_bytes=64 << 20)
_FAMILY_SECONDS = 300
_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}


@dataclass(frozen=True)
class Subject:
    """A model, ``"library name"``, and how it is measured."""

    model: str
    batch: int = 1
    pixels: int = 0
    """0: the size that the model was made for."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.model} {self.batch} {self.pixels}"


def _timm(*names: str) -> list[Subject]:
    return [Subject(f"timm {name}") for name in names]


FAMILIES: dict[str, list[Subject]] = {
    "plain": _timm(
        "vit_small_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_dinov2", "vit_base_patch16_siglip_224",
        "naflexvit_base_patch16_gap",
    ),
    "positions": _timm(
        "vit_small_patch16_dinov3", "eva02_small_patch14_224", "vit_small_patch16_rope_224",
        "vit_pe_core_small_patch16_384", "beit_base_patch16_224", "vit_relpos_small_patch16_224",
        "samvit_base_patch16_224",
    ),
    "class tokens and branches": _timm(
        "cait_xxs24_224", "xcit_tiny_12_p16_224", "crossvit_tiny_240", "crossvit_small_240", "convit_small",
        "tnt_s_patch16_224", "volo_d1_224",
    ),
    "stages": _timm(
        "pit_s_224", "hiera_tiny_224", "sam2_hiera_tiny", "mvitv2_tiny", "pvt_v2_b2", "twins_svt_small",
        "nextvit_small", "visformer_small",
    ),
    "hybrids": _timm(
        "levit_128s", "levit_256", "efficientformer_l1", "efficientformer_l3", "efficientformerv2_s1", "mobilevit_s",
        "fastvit_sa24", "iformer_s", "lowformer_b1", "mobilenetv4_hybrid_medium", "coatnet_0_rw_224", "caformer_s18",
        "resnet50_clip",
    ),
    "windows and others": _timm(
        "shvit_s4", "efficientvit_m4", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "maxvit_tiny_rw_224",
        "davit_tiny", "tiny_vit_5m_224",
    ),
    "torchvision": [Subject("torchvision vit_b_16"), Subject("torchvision swin_t"), Subject("torchvision swin_v2_t")],
    "transformers": [
        *(
            Subject(f"transformers {name}", options=_SMALL)
            for name in ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "IJepa")
        ),
        Subject("transformers Beit", options={"use_relative_position_bias": True, **_SMALL}),
        *(
            Subject(f"transformers {name}", options=_SMALL)
            for name in ("DINOv3ViT", "CLIPVision", "SiglipVision", "ViTMAE")
        ),
        *(Subject(f"transformers {name}") for name in ("Cvt", "Pvt", "PvtV2", "Swin", "Swinv2")),
    ],
}  # fmt: skip
_THREE = ("float32", "bfloat16", "float16")
#: The second table: batches, and images larger than usual.
LARGER: dict[str, list[Subject]] = {
    "larger plain": [
        Subject("timm vit_small_patch16_224", batch=8, dtypes=_THREE),
        Subject("transformers Dinov2", pixels=518, dtypes=_THREE, options=_SMALL),
    ],
    "larger hybrids": [
        Subject(f"timm {name}", batch=8)
        for name in (
            "levit_128s", "levit_256", "efficientformer_l1", "efficientformer_l3", "crossvit_tiny_240",
            "crossvit_small_240",
        )
    ],
}  # fmt: skip

_INTRO = """# Models

What `vk.accelerate` replaces in a model, what it leaves as it was and why, and the effect on time and error. Written by
`python -m tools.model_table`; no figure is typed by hand.

Speed-up: the stock model's time for a forward pass divided by ours, median of rounds in which the two take turns.
Error: the largest error of the float32 output against the stock model in float64, relative to the largest output, and
in brackets that of the stock model. The weights are random; initial values that would hide the attention (tiny layer
scales, factors of zero) are replaced. {clock}

Measured on {machine}.
"""
_WALL = "Times are wall-clock times."
_CPU = "Times are CPU times of one thread, since others used the machine as well."


def build(subject: Subject) -> tuple[nn.Module, int]:
    """The model, and the size of its images."""
    library, name = subject.model.split()
    if library == "timm":
        model = _import("timm").create_model(name, **subject.options)
        return model, subject.pixels or model.default_cfg["input_size"][-1]
    if library == "torchvision":
        return _import("torchvision.models").get_model(name, weights=None), subject.pixels or 224
    transformers, pixels = _import("transformers"), subject.pixels or 224
    config = getattr(transformers, f"{name}Config")(**{"image_size": pixels, **subject.options})
    return getattr(transformers, f"{name}Model")(config), pixels


def measure(subject: Subject, effort: Effort) -> dict[str, Any]:
    """Agreement in float32 with float64, and the speed of the forward pass in each dtype."""
    torch.manual_seed(0)
    stock, size = build(subject)
    show_attention(stock).eval()
    images = torch.randn(subject.batch, 3, size, size)
    ours = copy.deepcopy(stock)
    report = vk.accelerate(ours)

    def run(model: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(0)  # for models that choose patches at random
        return _result(model(x))

    with torch.no_grad():
        truth = run(copy.deepcopy(stock).double(), images.double())
        errors = [((run(m, images) - truth).abs().max() / truth.abs().max()).item() for m in (stock, ours)]
        speedups = {}
        for name in subject.dtypes if report.replaced else ():
            dtype = getattr(torch, name)
            x, models = images.to(dtype), {"stock": stock.to(dtype), "ours": ours.to(dtype)}
            times, _ = interleave({k: lambda m=m, x=x: run(m, x) for k, m in models.items()}, effort, x.device)
            speedups[name] = spread([s / o for s, o in zip(times["stock"], times["ours"], strict=True)]).median
    return {
        "pixels": size,
        "replaced": Counter(entry.kind for entry in report.replaced),
        "stock": Counter(f"{entry.kind}: {entry.reason}" for entry in report.stock),
        "speedups": speedups,
        "errors": errors,
    }


def _listed(counts: dict[str, int]) -> str:
    return "; ".join(f"{n} x {what}" for what, n in counts.items()) or "-"


def _cells(subject: Subject, row: dict[str, Any], dtypes: Iterable[str]) -> list[str]:
    if "failure" in row:
        return [row["failure"], *("-" for _ in dtypes), "-"]
    speedups = [f"{row['speedups'][d]:.2f}" if d in row["speedups"] else "-" for d in dtypes]
    return [*speedups, "{1:.0e} ({0:.0e})".format(*row["errors"])]


def page(rows: dict[str, dict[str, Any]], machine: str, clock: str) -> str:
    """The Markdown page of ``rows``, by :attr:`Subject.key`."""
    lines = [_INTRO.format(machine=machine, clock=clock)]
    lines += ["One image:", "", "| model | replaced | left as it is, and why | float32 | bfloat16 | error (stock) |"]
    lines.append("|---|---|---|---|---|---|")
    for subject in (s for family in FAMILIES.values() for s in family):
        row = rows.get(subject.key, {"failure": "not measured"})
        counts = [_listed(row.get(name, {})) for name in ("replaced", "stock")]
        cells = _cells(subject, row, ("float32", "bfloat16"))
        if "failure" in row:
            counts, cells = [cells[0], "-"], cells[1:]
        lines.append("| " + " | ".join([subject.model, *counts, *cells]) + " |")
    lines += [
        "",
        "Batches and larger images:",
        "",
        "| model | batch | pixels | " + " | ".join(_THREE) + " | error (stock) |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for subject in (s for family in LARGER.values() for s in family):
        row = rows.get(subject.key, {"failure": "not measured"})
        cells = _cells(subject, row, _THREE)[-4:]
        size = str(row.get("pixels", row.get("failure")))
        lines.append("| " + " | ".join([subject.model, str(subject.batch), size, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _work(family: str, given: argparse.Namespace) -> None:
    """Measure a family and append a line of JSON for each model; runs in a process of its own."""
    effort = replace(_EFFORT, clock=process_time) if given.cpu_time else _EFFORT
    done = {key for key, row in _known(given.rows, given.key).items() if "failure" not in row}
    for subject in {**FAMILIES, **LARGER}[family]:
        if subject.key in done or given.only not in subject.model:
            continue
        try:
            row = measure(subject, effort)
        except Exception as error:  # a model that a version of its library cannot build is a finding
            row = {"failure": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        with given.rows.open("a") as file:
            file.write(json.dumps({"run": given.key, "subject": asdict(subject), "key": subject.key, **row}) + "\n")
        print(subject.key, row.get("speedups", row), flush=True)


def _known(path: Path, run: str) -> dict[str, dict[str, Any]]:
    """The rows of one run by :attr:`Subject.key`."""
    found = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    return {row["key"]: row for row in found if row["run"] == run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="not the wall clock; for one thread on a busy machine")
    parser.add_argument("--only", default="", help="models whose library and name contain this")
    parser.add_argument("--out", type=Path, default=Path("docs/models.md"))
    parser.add_argument("--rows", type=Path, default=Path("bench-out/models.jsonl"), help="the finished models")
    parser.add_argument("--family", help=argparse.SUPPRESS)
    parser.add_argument("--key", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.family:
        _work(given.family, given)
        return
    given.rows.parent.mkdir(parents=True, exist_ok=True)
    machine = describe(torch.device("cpu"))
    given.key = f"{machine['commit']} {given.threads} {given.cpu_time}"
    for family in (*FAMILIES, *LARGER):
        command = [sys.executable, "-m", "tools.model_table", *sys.argv[1:], "--family", family, "--key", given.key]
        try:
            subprocess.run(command, timeout=_FAMILY_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            print(f"{family}: stopped after {_FAMILY_SECONDS} seconds", flush=True)
    clock = _CPU if given.cpu_time else _WALL
    given.out.write_text(page(_known(given.rows, given.key), line(machine), clock))


if __name__ == "__main__":
    main()
