"""Whether the measured rows reach the registered targets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.catalog import targets
from benchmarks.experiment import Row
from benchmarks.registry import OURS, Target

__all__ = ["Verdict", "judge"]


@dataclass(frozen=True)
class Verdict:
    label: str
    wanted: str
    found: str
    state: str
    """``"met"``, ``"not met"`` or ``"not measured"``."""


def _value(row: Row, target: Target) -> float | None:
    if OURS in row.wrong:
        return None
    if target.quantity == "peak_mb":
        return row.ours.peak_mb
    if target.quantity == "tflops":
        return row.flops / row.ours.seconds / 1e12 if row.ours.seconds else None
    peer = next((p for p in row.peers if p.name == target.peer), None) if target.peer else row.baseline
    return peer.speedup.median if peer and peer.speedup else None


def _judge(target: Target, rows: dict[tuple[str, str], Row]) -> Verdict:
    found = [rows.get((name, target.dtype)) for name in target.entries]
    values = [value for row in found if row and (value := _value(row, target)) is not None]
    mean = math.exp(sum(math.log(max(v, 1e-9)) for v in values) / len(values)) if values else 0.0
    demands = (
        ("geometric mean >= {:g}", target.mean_at_least, lambda limit: mean >= limit),
        ("each >= {:g}", target.each_at_least, lambda limit: min(values) >= limit),
        ("each < {:g}", target.each_below, lambda limit: max(values) < limit),
    )
    asked = [(text.format(limit), limit, reached) for text, limit, reached in demands if limit is not None]
    wanted = ", ".join(text for text, _, _ in asked)
    listed = " ".join(f"{v:.2f}" for v in values)
    if target.mean_at_least is not None and values:
        listed = f"{mean:.2f} (of {listed})"
    if any(row and OURS in row.wrong for row in found):
        return Verdict(target.label, wanted, "wrong result", "not met")
    if len(values) < len(target.entries):
        missing = f"{len(values)} of {len(target.entries)} rows" + (f": {listed}" if values else "")
        return Verdict(target.label, wanted, missing, "not measured")
    state = "met" if all(reached(limit) for _, limit, reached in asked) else "not met"
    return Verdict(target.label, wanted, listed, state)


def judge(rows: Iterable[Row], device: str) -> list[Verdict]:
    """One verdict per target registered for the device, in the order of their registration."""
    by_key = {(row.entry, row.dtype): row for row in rows}
    return [_judge(target, by_key) for target in targets() if target.device == device]
