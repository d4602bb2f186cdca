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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from operator import truediv
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
import vitkernels as vk
from torch import Tensor, nn

from benchmarks.machine import describe, line
from benchmarks.measure import Effort, interleave
from benchmarks.models import _import, _result, show_attention, without_attention

_EFFORT = Effort(7, 11, seconds=0.5, batch_seconds=0.02, matmul_size=2048, copy_bytes=64 << 20)
_FAMILY_SECONDS = 600
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
    compiled: bool = False
    """Measured under ``torch.compile`` too."""

    @property
    def key(self) -> str:
        return f"{self.model} {self.batch} {self.pixels}" + " compiled" * self.compiled


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

#: The third table; a family each, as compiling takes long.
COMPILED: dict[str, list[Subject]] = {
    f"compiled {subject.model}": [replace(subject, compiled=True)]
    for subject in (
        *_timm("vit_small_patch16_224", "vit_small_patch14_dinov2", "swin_tiny_patch4_window7_224",
               "swinv2_tiny_window8_256", "beit_base_patch16_224", "sam2_hiera_tiny", "crossvit_small_240"),
        Subject("transformers ViT", options=_SMALL),
    )
}  # fmt: skip
_ALL = {**FAMILIES, **LARGER, **COMPILED}
#: What a row's speed-ups are called, and the columns of the third table.
_OURS, _CEILING = "ours", "ceiling"
_VARIANTS = {"stock compiled": "stock, compiled", _OURS: "ours", "ours compiled": "ours, compiled"}

_INTRO = """# Models

What `vk.accelerate` does to a model's speed, what it replaces, and what it leaves as it was and why. Written by
`python -m tools.model_table`; no figure is typed by hand.

- **Speed-up** (float32, bfloat16, float16): the stock model's time for a forward pass divided by ours. They take turns
  in at least seven rounds, and the median of the rounds' ratios counts.
- **Ceiling**: the speed-up if attention took no time, measured in the same rounds: a third contender is our model with
  operators that return at once what they returned in a pass before. What is left is the rest of the model.
- **Error**: the largest error of the float32 output against the stock model in float64, relative to the largest output,
  and in brackets that of the stock model.

A kernel that is 4.4 times as fast makes a model 1.1 times as fast where attention is an eighth of its time: the other
seven eighths, most of them linear layers, stay PyTorch's.

The weights are random; initial values that would hide the attention (tiny layer scales, factors of zero) are replaced.
{clock} The gains depend on the CPU, and are larger where PyTorch's matrix products are slow
([Benchmarks](benchmarks.md)): compare [those of an Intel Xeon](models_intel.md). Where a model stands in two
tables, their difference is the noise of the measurement; so is a speed-up above its ceiling.

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


def _run(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)  # for models that choose patches at random
    return _result(model(x))


def _contenders(stock: nn.Module, ours: nn.Module, x: Tensor, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    torch._dynamo.reset()
    models = {"stock": stock, _OURS: ours}
    if compiled:
        models |= {f"{name} compiled": torch.compile(model) for name, model in models.items()}
    calls: dict[str, Callable[[], Tensor]] = {name: lambda m=m: _run(m, x) for name, m in models.items()}
    return calls if compiled else calls | {_CEILING: without_attention(lambda: _run(ours, x))}


def measure(subject: Subject, effort: Effort) -> dict[str, Any]:
    """Agreement in float32 with float64, and the speed of the forward pass in each dtype over the stock model's."""
    torch.manual_seed(0)
    stock, size = build(subject)
    show_attention(stock).eval()
    images = torch.randn(subject.batch, 3, size, size)
    ours = copy.deepcopy(stock)
    report = vk.accelerate(ours)
    speedups: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        truth = _run(copy.deepcopy(stock).double(), images.double())
        last = torch.compile(ours) if subject.compiled else ours
        errors = [((_run(m, images) - truth).abs().max() / truth.abs().max()).item() for m in (stock, last)]
        for name in subject.dtypes if report.replaced else ():
            dtype = getattr(torch, name)
            calls = _contenders(stock.to(dtype), ours.to(dtype), images.to(dtype), subject.compiled)
            times, _ = interleave(calls, effort, images.device)
            stock_times = times.pop("stock")
            speedups[name] = {who: median(map(truediv, stock_times, seconds)) for who, seconds in times.items()}
    return {
        "pixels": size,
        "replaced": Counter(entry.kind for entry in report.replaced),
        "stock": Counter(f"{entry.kind}: {entry.reason}" for entry in report.stock),
        "speedups": speedups,
        "errors": errors,
    }


def _listed(counts: dict[str, int]) -> str:
    return "; ".join(f"{n} x {what}" for what, n in counts.items()) or "-"


def _cells(row: dict[str, Any], dtypes: Iterable[str], variants: Iterable[str]) -> list[str]:
    """The speed-ups of ``row``, and its errors."""
    found = [row.get("speedups", {}).get(d, {}).get(variant) for d in dtypes for variant in variants]
    error = "{1:.0e} ({0:.0e})".format(*row["errors"]) if "errors" in row else "-"
    return ["-" if value is None else f"{value:.2f}" for value in found] + [error]


def _table(titles: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (titles, ["---" for _ in titles], *lines)]


def page(rows: dict[str, dict[str, Any]], machine: str, clock: str) -> str:
    """The Markdown page of ``rows``, by :attr:`Subject.key`."""

    def of(families: dict[str, list[Subject]]) -> list[tuple[Subject, dict[str, Any]]]:
        subjects = [subject for family in families.values() for subject in family]
        return [(subject, rows.get(subject.key, {"failure": "not measured"})) for subject in subjects]

    two, both = ("float32", "bfloat16"), (_OURS, _CEILING)
    first, second, third = [], [], []
    for subject, row in of(FAMILIES):
        *speedups, error = _cells(row, two, both)
        replaced, left = (_listed(row.get(name, {})) for name in ("replaced", "stock"))
        first.append([subject.model, *speedups, row.get("failure", replaced), left, error])
    for subject, row in of(LARGER):
        size = str(row.get("failure", row.get("pixels")))
        second.append([subject.model, *_cells(row, _THREE, both), str(subject.batch), size])
    for subject, row in of(COMPILED):
        third.append([subject.model, *_cells(row, two, _VARIANTS), str(row.get("failure", row.get("pixels")))])
    lines = [_INTRO.format(machine=machine, clock=clock), "One image:", ""]
    titles = ["model", "float32", "ceiling", "bfloat16", "ceiling"]
    lines += _table([*titles, "replaced", "left as it is, and why", "error (stock)"], first)
    lines += ["", "Batches and larger images:", ""]
    lines += _table([*titles, "float16", "ceiling", "error (stock)", "batch", "pixels"], second)
    lines += [
        "",
        "Under `torch.compile`, one image; speed-ups over the stock model without it, and the error of ours compiled:",
        "",
    ]
    titles = [f"{dtype}: {variant}" for dtype in two for variant in _VARIANTS.values()]
    lines += _table(["model", *titles, "error (stock)", "pixels"], third)
    return "\n".join(lines) + "\n"


def _work(family: str, given: argparse.Namespace) -> None:
    """Measure a family and append a line of JSON for each model; runs in a process of its own."""
    effort = replace(_EFFORT, clock=process_time) if given.cpu_time else _EFFORT
    done = {key for key, row in _known(given.rows, given.key).items() if "failure" not in row}
    for subject in _ALL[family]:
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
    for family in (name for name, subjects in _ALL.items() if any(given.only in s.model for s in subjects)):
        command = [sys.executable, "-m", "tools.model_table", *sys.argv[1:], "--family", family, "--key", given.key]
        try:
            subprocess.run(command, timeout=_FAMILY_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            print(f"{family}: stopped after {_FAMILY_SECONDS} seconds", flush=True)
    clock = _CPU if given.cpu_time else _WALL
    given.out.write_text(page(_known(given.rows, given.key), line(machine), clock))


if __name__ == "__main__":
    main()
