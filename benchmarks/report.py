"""Results as lines for the terminal, as JSON and as markdown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine as machines
from benchmarks.experiment import PeerResult, Row
from benchmarks.measure import Spread
from benchmarks.targets import Verdict

__all__ = ["row_text", "targets_text", "write_json", "write_markdown"]


_HEADER = ["shape", "dtype", "vitkernels", "of the floor", "memory", "peer", "time", "speed-up", "memory"]


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _ratio(ratio: Spread | None) -> str:
    return "-" if ratio is None else f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _memory(megabytes: float | None) -> str:
    return "-" if megabytes is None else f"{megabytes:.1f} MB"


def _rate(row: Row) -> str:
    if not row.ours.seconds:
        return ""
    rate = f"{row.flops / row.ours.seconds / 1e9:.0f} GFLOP/s, {row.bytes / row.ours.seconds / 1e9:.1f} GB/s"
    return rate + (f", {row.of_floor.median:.2f} of the floor" if row.of_floor else "")


def _peer_text(row: Row, result: PeerResult) -> str:
    if result.seconds is None:
        error = "" if result.error is None else f"error {result.error:.1e}"
        return f"    {result.name:<14} {result.note or error}"
    figures = f"{_time(result.seconds):>9}  {_ratio(result.speedup):<18} {_memory(result.peak_mb):>10}"
    if row.device != "cpu":
        figures += f"  {row.flops / result.seconds / 1e12:6.1f} TFLOP/s"
    return f"    {result.name:<14} {figures}  {result.note or ''}".rstrip()


def row_text(row: Row) -> str:
    """The row, then each peer with its time, our speed-up [10%, 90%] and its peak extra memory."""
    lines = [f"{row.entry}  {row.dtype}  {_rate(row)}".rstrip()]
    return "\n".join(lines + [_peer_text(row, result) for result in row.peers])


def targets_text(verdicts: list[Verdict]) -> str:
    width = max((len(v.label) for v in verdicts), default=0)
    return "\n".join(f"{v.state:<12}  {v.label:<{width}}  {v.wanted}  ->  {v.found}" for v in verdicts)


def write_json(path: Path, machine: dict[str, Any], rows: list[Row], verdicts: list[Verdict]) -> None:
    content = {
        "machine": machine,
        "rows": [asdict(row) for row in rows],
        "targets": [asdict(verdict) for verdict in verdicts],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _table(header: list[str], body: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *body)]


def _group_rows(rows: list[Row]) -> list[list[str]]:
    body = []
    for row in rows:
        floor = f"{row.of_floor.median:.2f}" if row.of_floor else "-"
        mine = [row.shape, row.dtype, _time(row.ours.seconds), floor, _memory(row.ours.peak_mb)]
        for result in row.peers[1:]:
            figures = [result.name, _time(result.seconds), _ratio(result.speedup), _memory(result.peak_mb)]
            body.append(mine + figures[:2] + [result.note or row.ours.note or figures[2], figures[3]])
            mine = [""] * len(mine)
    return body


def write_markdown(path: Path, machine: dict[str, Any], rows: list[Row], verdicts: list[Verdict]) -> None:
    """One table per group and one of the targets, to be included in a page."""
    lines = [
        " ".join([f"Measured on {machines.line(machine)}.", *machine["warnings"]]),
        "",
        "Speed-up: the peer's time divided by ours, median of the rounds [10th, 90th percentile]. Floor: our "
        "speed relative to the machine's matmul or copy rate, measured in the same loop. Memory: peak above "
        "the inputs, results included, in a process of its own.",
    ]
    for group in dict.fromkeys(row.group for row in rows):
        body = _group_rows([row for row in rows if row.group == group])
        lines += ["", f"**{group}**", "", *_table(_HEADER, body)]
    body = [[v.label, v.wanted, v.found, v.state] for v in verdicts]
    lines += ["", "**Targets**", "", *_table(["what", "target", "measured", ""], body)]
    path.write_text("\n".join(lines) + "\n")
