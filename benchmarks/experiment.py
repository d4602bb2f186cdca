"""Check, time and weigh all peers of one entry."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from benchmarks import floor
from benchmarks.compare import TOLERANCE, relative_error, upcast
from benchmarks.measure import Effort, Spread, interleave, spread
from benchmarks.memory import fresh_call
from benchmarks.registry import OURS, Call, Entry, Inputs, Peer, Unavailable

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
    baseline = entry.peers[1]
    reference = tuple(out.clone() for out in baseline.prepare(upcast(inputs))())
    calls: dict[str, Call] = {}
    for peer, result in zip(peers, row.peers, strict=True):
        try:
            call = peer.prepare(inputs)
            outputs = call()
        except Unavailable as reason:
            result.note = f"cannot run: {reason}"
        except Exception as error:
            if peer.option is None:
                raise
            # Peers behind an option are other people's experimental paths: their failure is a finding.
            result.note = f"cannot run: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            if _judge(row, result, relative_error(outputs, reference)):
                calls[peer.name] = call
    return calls


def _run_once(row: Row, entry: Entry, peers: list[Peer], device: torch.device) -> None:
    fresh = [fresh_call(entry, peer, row.dtype, device) for peer in peers]
    reference = fresh[1].sample
    right = [_judge(row, r, relative_error(f.sample, reference)) for f, r in zip(fresh, row.peers, strict=True)]
    for result, f, ok in zip(row.peers, fresh, right, strict=True):
        result.seconds, result.peak_mb = f.seconds, f.peak_bytes / 1e6
        if ok and right[0] and result is not row.ours:
            result.speedup = spread([f.seconds / fresh[0].seconds])
    row.rounds = 1


def run(
    entry: Entry,
    dtype: str,
    device: torch.device,
    effort: Effort,
    options: set[str],
    *,
    check_only: bool = False,
) -> Row:
    """Measure ``entry``: results first, then time, then memory.

    Args:
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        options: names that enable the peers with that ``option``.
        check_only: stop after the comparison of the results.

    Raises:
        RuntimeError: if a peer fails for another reason than being unavailable.
    """
    peers = [
        p
        for p in entry.peers
        if dtype in p.dtypes and device.type in p.devices and (p.option is None or p.option in options)
    ]
    torch_dtype = getattr(torch, dtype)
    row = Row(
        entry=entry.name,
        group=entry.group,
        shape=entry.shape,
        dtype=dtype,
        device=str(device),
        flops=entry.flops,
        bytes=entry.elements * torch_dtype.itemsize,
        peers=[PeerResult(p.name) for p in peers],
    )
    if entry.once:
        _run_once(row, entry, peers, device)
        return row
    try:
        inputs = entry.inputs(torch_dtype, device)
    except Unavailable as reason:
        for result in row.peers:
            result.note = f"cannot run: {reason}"
        return row
    calls = _prepare(row, entry, peers, inputs)
    if check_only or OURS not in calls:
        return row

    times = interleave({**calls, **floor.calls(torch_dtype, effort, device)}, effort, device)
    ours = times[OURS]
    row.rounds = len(ours)
    bound = floor.seconds(times, effort, row.flops, row.bytes)
    row.floor_seconds = spread(bound).median
    row.of_floor = spread([f / o for f, o in zip(bound, ours, strict=True)])
    for peer, result in zip(peers, row.peers, strict=True):
        if peer.name not in calls:
            continue
        mine = times[peer.name]
        result.seconds = spread(mine).median
        if peer.name != OURS:
            result.speedup = spread([t / o for t, o in zip(mine, ours, strict=True)])
        if peer.in_fresh_process:
            result.peak_mb = fresh_call(entry, peer, dtype, device).peak_bytes / 1e6
    return row
