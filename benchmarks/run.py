"""Command line: ``python -m benchmarks.run``; see ``--help``."""

from __future__ import annotations

import argparse
import fnmatch
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import process_time

import torch

from benchmarks import machine as machines
from benchmarks import plots, report, targets
from benchmarks.catalog import entries
from benchmarks.compare import TOLERANCE
from benchmarks.experiment import Row, run
from benchmarks.measure import FULL, GPU, QUICK, Effort, synchronize
from benchmarks.registry import Entry

_QUICK_FLOPS = 15e9


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Compare with what exists.")
    parser.add_argument("--only", metavar="PATTERN", help="entries whose name contains, or matches, PATTERN")
    parser.add_argument("--dtype", nargs="+", choices=list(TOLERANCE), help="instead of each entry's own")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: what torch finds)")
    parser.add_argument("--cpu-time", action="store_true", help="not the wall clock; for one thread on a busy machine")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder of the JSON file and the plots")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    parser.add_argument("--quick", action="store_true", help="small entries, few rounds: the figures mean little")
    parser.add_argument("--check", action="store_true", help="only compare results; exit with 1 if one is wrong")
    parser.add_argument("--peers-only", action="store_true", help="what others reach, without the package's own")
    parser.add_argument("--no-plots", action="store_true", help="figures only")
    parser.add_argument("--flex", action="store_true", help="also FlexAttention, compiled anew for every row")
    parser.add_argument("--list", action="store_true", help="print the names of the entries")
    return parser.parse_args(argv)


def _selected(arguments: argparse.Namespace) -> list[tuple[Entry, str]]:
    pattern = arguments.only or "*"
    if not set(pattern) & set("*?["):
        pattern = f"*{pattern}*"
    return [
        (entry, dtype)
        for entry in entries()
        if fnmatch.fnmatchcase(entry.name, pattern)
        and arguments.device.type in entry.devices
        and not (arguments.quick and entry.flops > _QUICK_FLOPS)
        for dtype in arguments.dtype or entry.dtypes
    ]


def _effort(arguments: argparse.Namespace) -> Effort:
    effort = QUICK if arguments.quick else GPU if arguments.device.type == "cuda" else FULL
    return replace(effort, clock=process_time) if arguments.cpu_time else effort


def _is_lost(device: torch.device) -> bool:
    """Whether an error on the device has made it useless to this process."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def _measure(
    arguments: argparse.Namespace, selected: list[tuple[Entry, str]], save: Callable[[list[Row]], None]
) -> tuple[list[Row], list[str]]:
    """All rows, and the names of those that crashed; ``save`` gets the rows so far after each."""
    rows: list[Row] = []
    crashed: list[str] = []
    effort, options = _effort(arguments), {"flex"} if arguments.flex else set()
    for entry, dtype in selected:
        try:
            row = run(
                entry, dtype, arguments.device, effort, options,
                check_only=arguments.check, peers_only=arguments.peers_only,
            )  # fmt: skip
        except Exception:
            print(f"{entry.name}  {dtype}  crashed\n{traceback.format_exc()}", flush=True)
            crashed.append(f"{entry.name} {dtype}")
        else:
            rows.append(row)
            print(report.row_text(row), flush=True)
            save(rows)
        if _is_lost(arguments.device):
            crashed.append(f"{arguments.device}, which an error has made useless; the rest is not measured")
            break
    return rows, crashed


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write. 1 if something crashed or, with ``--check``, a result is wrong; else 0."""
    arguments = _arguments(argv)
    selected = _selected(arguments)
    if arguments.list or not selected:
        print("\n".join(entry.name for entry in entries()))
        return 0 if arguments.list else 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    machine = machines.describe(arguments.device)
    machine["warnings"] = machines.warnings(machine)
    print("\n".join([machines.line(machine), *machine["warnings"]]))

    def save(rows: list[Row]) -> None:
        if not arguments.check:
            arguments.out.mkdir(parents=True, exist_ok=True)
            verdicts = targets.judge(rows, arguments.device.type)
            report.write_json(arguments.out / "results.json", machine, rows, verdicts)

    rows, crashed = _measure(arguments, selected, save)
    crashed += [f"{row.entry} {row.dtype}: {row.failed}" for row in rows if row.failed]
    wrong = [f"{row.entry} {row.dtype}: {', '.join(row.wrong)}" for row in rows if row.wrong]
    for title, names in (("Wrong results", wrong), ("Crashed", crashed)):
        if names:
            print("\n".join([f"\n{title}:", *names]))
    if not arguments.check:
        if arguments.device.type == "cuda":
            machine["gpu"]["after"] = machines.gpu_state()
        save(rows)
        verdicts = targets.judge(rows, arguments.device.type)
        print("\n".join(["\nTargets:", report.targets_text(verdicts), *machine["warnings"]]))
        if not arguments.no_plots:
            plots.draw(rows, arguments.out)
        if arguments.markdown:
            report.write_markdown(arguments.markdown, machine, rows, verdicts)
    return 1 if crashed or (arguments.check and wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
