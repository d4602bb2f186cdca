"""Check, time and weigh all peers of one entry."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import floor
from benchmarks.compare import TOLERANCE, relative_error, upcast
from benchmarks.measure import Effort, Spread, interleave, matmul_precision, own_stream, spread
from benchmarks.memory import Fresh, fresh_call, peak_bytes
from benchmarks.registry import OURS, Call, Entry, Inputs, Peer, Unavailable, torch_dtype

__all__ = ["PeerResult", "Row", "run"]


@dataclass
class PeerResult:
    name: str
    error: float | None = None
    """Of its result, relative to the reference; see :data:`benchmarks.compare.TOLERANCE`."""
    seconds: float | None = None
    speedup: Spread | None = None
    """How many times longer it takes than ours, within the same round."""
    peak_mb: float | None = None
    note: str | None = None
    """Why there is no figure."""


@dataclass
class Row:
    """One entry in one dtype. ``peers`` has ours first and the baseline second."""

    entry: str
    group: str
    shape: str
    dtype: str
    device: str
    flops: float
    bytes: float
    peers: list[PeerResult]
    rounds: int = 0
    floor_seconds: float | None = None
    of_floor: Spread | None = None
    """Floor divided by our time: 1 is as fast as the machine's matmul or copy."""
    wrong: list[str] = field(default_factory=list)
    """Peers whose result differs from the reference beyond the tolerance."""
    failed: str | None = None
    """Why ours raised, if it did; the others are measured all the same."""

    @property
    def ours(self) -> PeerResult:
        return self.peers[0]

    @property
    def baseline(self) -> PeerResult:
        return self.peers[1]


def _judge(row: Row, result: PeerResult, error: float) -> bool:
    result.error = error
    tolerance = TOLERANCE[row.dtype]
    if error <= tolerance:
        return True
    result.note = f"wrong result: error {error:.1e}, tolerance {tolerance:.0e}"
    row.wrong.append(result.name)
    return False


def _prepare(row: Row, entry: Entry, peers: list[Peer], inputs: Inputs) -> dict[str, Call]:
    """The calls whose results are right."""
    reference: tuple[Tensor, ...] = ()
    if entry.same_results:
        with matmul_precision("float32"):
            reference = tuple(out.clone() for out in (entry.reference or entry.peers[1].prepare)(upcast(inputs))())
    calls: dict[str, Call] = {}
    for peer, result in zip(peers, row.peers, strict=True):
        if result.note:  # it is not wanted
            continue
        try:
            call = peer.prepare(inputs)
            outputs = call()
        except Unavailable as reason:
            result.note = f"cannot run: {reason}"
        except Exception as error:
            # Peers behind an option are experimental paths.
            if peer.option is None and not peer.may_refuse and peer.name != OURS:
                raise
            result.note = f"cannot run: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if peer.name == OURS:
                row.failed = result.note
        else:
            if not entry.same_results or _judge(row, result, relative_error(outputs, reference)):
                calls[peer.name] = call
    return calls


def _run_once(row: Row, entry: Entry, peers: list[Peer], device: torch.device) -> None:
    fresh: dict[str, Fresh] = {}
    for peer, result in zip(peers, row.peers, strict=True):
        try:
            fresh[peer.name] = fresh_call(entry, peer, row.dtype, device)
        except Unavailable as reason:
            result.note = f"cannot run: {reason}"
    ours, reference = fresh.get(OURS), fresh.get(row.baseline.name)
    for result in (r for r in row.peers if r.name in fresh):
        mine = fresh[result.name]
        result.seconds, result.peak_mb = mine.seconds, mine.peak_bytes / 1e6
        right = reference is not None and _judge(row, result, relative_error(mine.sample, reference.sample))
        if right and ours is not None and OURS not in row.wrong and result is not row.ours:
            result.speedup = spread([mine.seconds / ours.seconds])
    row.rounds = 1


def run(
    entry: Entry,
    dtype: str,
    device: torch.device,
    effort: Effort,
    options: set[str],
    *,
    check_only: bool = False,
    peers_only: bool = False,
) -> Row:
    """Measure ``entry``: results first, then time, then memory.

    Args:
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or, on a GPU, ``"tf32"``.
        options: names that enable the peers with that ``option``.
        check_only: stop after the comparison of the results.
        peers_only: leave ours out.

    Raises:
        RuntimeError: if, on the CPU, a peer fails for another reason than being unavailable.
    """
    with matmul_precision(dtype), own_stream(device):
        return _run(entry, dtype, device, effort, options, check_only, peers_only)


def _run(
    entry: Entry,
    dtype: str,
    device: torch.device,
    effort: Effort,
    options: set[str],
    check_only: bool,
    peers_only: bool,
) -> Row:
    peers = [
        p
        for p in entry.peers
        if dtype in p.dtypes and device.type in p.devices and (p.option is None or p.option in options)
    ]
    row = Row(
        entry=entry.name,
        group=entry.group,
        shape=entry.shape,
        dtype=dtype,
        device=str(device),
        flops=entry.flops,
        bytes=entry.elements * torch_dtype(dtype).itemsize,
        peers=[PeerResult(p.name) for p in peers],
    )
    if peers_only:
        row.ours.note = "not measured"
    if entry.once:
        _run_once(row, entry, peers, device)
        return row
    try:
        inputs = entry.inputs(torch_dtype(dtype), device)
    except Unavailable as reason:
        for result in row.peers:
            result.note = f"cannot run: {reason}"
        return row
    calls = _prepare(row, entry, peers, inputs)
    if check_only or not calls:
        return row

    times, eager = interleave({**calls, **floor.calls(dtype, effort, device)}, effort, device, replayed=entry.replayed)
    ours = times.get(OURS)
    bound = floor.seconds(times, effort, row.flops, row.bytes)
    row.rounds = len(bound)
    row.floor_seconds = spread(bound).median
    if ours:
        row.of_floor = spread([f / o for f, o in zip(bound, ours, strict=True)])
    for peer, result in zip(peers, row.peers, strict=True):
        if peer.name not in calls:
            continue
        mine = times[peer.name]
        result.seconds = spread(mine).median
        if ours and peer.name != OURS:
            result.speedup = spread([t / o for t, o in zip(mine, ours, strict=True)])
        if peer.name in eager:
            result.note = "not captured in a graph"
        if device.type != "cpu":
            result.peak_mb = peak_bytes(calls[peer.name], device) / 1e6
        elif peer.in_fresh_process:
            result.peak_mb = fresh_call(entry, peer, dtype, device).peak_bytes / 1e6
    return row
