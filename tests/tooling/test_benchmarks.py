"""Benchmarks of a GPU, at tiny sizes on the CPU: that they run and compare, not how fast."""

import json
from contextlib import nullcontext
from dataclasses import replace
from time import perf_counter
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import vitkernels as vk

from benchmarks import (
    experiment,
    gpu,
    gpu_sequences,
    measure,
    models,
    neighborhood_attention,
    report,
    targets,
    window_attention,
)
from benchmarks.attention import Shape
from benchmarks.catalog import entries
from benchmarks.measure import QUICK
from benchmarks.memory import Fresh
from benchmarks.registry import OURS, Peer, Target, Unavailable
from benchmarks.run import main
from tools import model_table

CPU = torch.device("cpu")
SQUARE, FEW = gpu.Problem(2, 3, 24, 24, dim=16), gpu.Problem(2, 3, 4, 24, dim=16)
TINY = [
    *(gpu.entry(mode, SQUARE, bias=bias, devices=("cpu",)) for mode in gpu.MODES for bias in (False, True)),
    gpu.entry("forward", FEW, math=True, devices=("cpu",)),
    gpu_sequences.varlen_entry(gpu_sequences.Sequences(3, 4, 9, heads=2, dim=16), devices=("cpu",)),
    gpu_sequences.transposed_entry(Shape(2, 3, 24, 16), devices=("cpu",)),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("entry", TINY, ids=lambda e: e.name)
def test_peers_compute_the_same(entry, dtype):
    row = experiment.run(entry, dtype, CPU, QUICK, set(), check_only=True)
    assert not row.wrong and not row.failed, report.row_text(row)
    assert row.ours.error is not None


def broken(inputs):
    raise RuntimeError("a kernel is broken")


def test_peers_alone():
    """Without the package's own kernels, and where these raise."""
    entry = gpu.entry("forward", SQUARE, math=True, devices=("cpu",))
    entry = replace(entry, peers=tuple(replace(p, in_fresh_process=False) for p in entry.peers))
    row = experiment.run(entry, "float32", CPU, QUICK, set(), peers_only=True)
    assert row.ours.seconds is None and row.ours.note == "not measured" and not row.failed
    assert row.floor_seconds and any(p.seconds for p in row.peers)

    entry = replace(entry, peers=(replace(entry.peers[0], prepare=broken), *entry.peers[1:]))
    row = experiment.run(entry, "float32", CPU, QUICK, set())
    assert row.failed == "cannot run: RuntimeError: a kernel is broken"
    assert any(p.seconds for p in row.peers) and not any(p.speedup for p in row.peers)
    assert "a kernel is broken" in report.row_text(row)


def test_entries_of_a_gpu_exceed_its_cache():
    """60 MB on the largest: a problem that fits would be measured in the cache."""
    for entry in entries():
        if entry.name.startswith("gpu/attention"):
            assert entry.elements * 2 > 70e6, entry.name


def test_targets_of_a_gpu():
    name, dtype = "gpu/attention/forward/b32-h12-n1024-d64", "bfloat16"
    flops = next(e for e in entries() if e.name == name).flops
    peers = [
        experiment.PeerResult(OURS, seconds=flops / 400e12),
        experiment.PeerResult("sdpa-flash", seconds=1.0, speedup=experiment.Spread(0.9, 0.8, 1.0)),
    ]
    row = experiment.Row(name, "g", "s", dtype, "cuda", flops, 1.0, peers)
    judged = {q: targets._judge(target(name, **q_options), {(name, dtype): row}) for q, q_options in {
        "rate": {"quantity": "tflops", "each_at_least": 300.0},
        "ratio": {"peer": "sdpa-flash", "each_at_least": 0.95},
        "absent": {"peer": "fa3", "each_at_least": 0.95},
    }.items()}  # fmt: skip
    assert [v.state for v in judged.values()] == ["met", "not met", "not measured"]
    assert judged["rate"].found == "400.00"


def target(name, **options):
    return Target("t", (name,), dtype="bfloat16", device="cuda", **options)


def test_targets_belong_to_a_device():
    assert all(v.label.startswith("GPU: ") for v in targets.judge([], "cuda"))
    assert targets.judge([], "cpu") and not any(v.label.startswith("GPU: ") for v in targets.judge([], "cpu"))


def test_command_writes_results(tmp_path):
    arguments = ["--only", "*merge_attentions*", "--dtype", "float32", "--quick", "--no-plots", "--out", str(tmp_path)]
    assert main(arguments) == 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["rows"][0]["peers"][0]["seconds"] > 0 and written["machine"]["vitkernels"]


class StandIn:
    """Of CUDA's events and graphs: a graph notes what it captured and runs it again."""

    log: ClassVar[list[str]] = []

    def __init__(self, *args, **options):
        self.time = 0.0

    def record(self):
        self.time = perf_counter()

    def elapsed_time(self, end):
        return (end.time - self.time) * 1e3

    def synchronize(self):
        pass

    def replay(self):
        self.log.append("replay")


def test_calls_on_a_gpu_are_replayed(monkeypatch):
    """The interleaving, with stand-ins for CUDA: what can be captured is timed as a graph, what cannot as it is."""
    cuda = SimpleNamespace(
        Event=StandIn, CUDAGraph=StandIn, synchronize=lambda device=None: None, current_stream=lambda: None,
        graph=lambda graph, stream: nullcontext(),
    )  # fmt: skip
    monkeypatch.setattr(measure.torch, "cuda", cuda)
    monkeypatch.setattr(measure, "synchronize", lambda device: None)
    calls = 0

    def refuses():
        nonlocal calls
        calls += 1
        if calls == 40:  # in its capture, or before
            raise RuntimeError("operation not permitted when stream is capturing")

    effort = replace(QUICK, batch_seconds=1e-6)
    times, eager = measure.interleave({"a": lambda: None}, effort, torch.device("cuda"), replayed=True)
    assert len(times["a"]) >= effort.min_rounds and not eager and "replay" in StandIn.log
    monkeypatch.setattr(measure, "_calibrate", lambda *a: 20)
    _, eager = measure.interleave({"b": refuses}, effort, torch.device("cuda"), replayed=True)
    assert eager == ["b"]


ON_MAPS = [
    *(window_attention._entry(mode, window_attention.Shape(1, 8, 4, 2, 2, 16)) for mode in ("forward", "backward")),
    neighborhood_attention._entry(neighborhood_attention.Shape(1, (6, 7), (3, 5), 2, 16)),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("entry", ON_MAPS, ids=lambda e: e.name)
def test_peers_on_maps_compute_the_same(entry, dtype):
    row = experiment.run(entry, dtype, CPU, QUICK, set(), check_only=True)
    if row.ours.note:
        pytest.skip(row.ours.note)
    assert not row.wrong and not row.failed, report.row_text(row)
    assert row.ours.error is not None


def test_peers_that_do_different_things_are_only_timed():
    shape = neighborhood_attention.Shape(1, (6, 7), (3, 5), 2, 16)
    peers = [
        Peer(OURS, neighborhood_attention._backward(shape), in_fresh_process=False),
        Peer("forward", neighborhood_attention._forward(shape), in_fresh_process=False),
    ]
    entry = replace(ON_MAPS[-1], peers=tuple(peers), same_results=False)
    row = experiment.run(entry, "float32", CPU, QUICK, set())
    assert row.baseline.speedup and not row.wrong
    row = experiment.run(replace(entry, same_results=True), "float32", CPU, QUICK, set(), check_only=True)
    assert row.wrong == [OURS]


def test_long_entries_do_without_a_peer(monkeypatch):
    def fresh_call(entry, peer, dtype, device):
        if peer.name == "natten":
            raise Unavailable("it is not installed")
        return Fresh(1.0 if peer.name == OURS else 3.0, 1_000_000, [torch.ones(4)])

    monkeypatch.setattr(experiment, "fresh_call", fresh_call)
    row = experiment.run(replace(ON_MAPS[-1], once=True), "float32", CPU, QUICK, set())
    assert row.baseline.speedup.median == 3.0 and row.ours.peak_mb == 1.0
    assert row.peers[2].note == "cannot run: it is not installed"


def test_a_model_of_the_table():
    try:
        models._import("timm")
    except Unavailable as error:
        pytest.skip(str(error))
    subject = model_table.Subject("timm vit_tiny_patch16_224", pixels=224, dtypes=("float32",))
    row = model_table.measure(subject, QUICK)
    assert row["replaced"] == {"timm Attention": 12}
    assert set(row["speedups"]["float32"]) == {"ours", "ceiling"} and min(row["speedups"]["float32"].values()) > 0.2
    assert row["errors"][1] < 10 * max(row["errors"][0], 1e-6)
    page = model_table.page({subject.key: row}, "a machine", "a clock")
    assert "a machine" in page


def test_a_pass_without_attention(monkeypatch):
    query = torch.randn(1, 5, 2, 8)
    operators = vars(vk.ops.attention)
    forward = models.without_attention(lambda: vk.attention(query, query, query) + vk.na1d(query, query, query, 3))
    expected = vk.attention(query, query, query) + vk.na1d(query, query, query, 3)
    for name in models._OPERATORS:
        monkeypatch.setitem(operators, name, broken)
    assert torch.equal(forward(), expected)
