"""The cost of each test file, printed at the end of a run: CPU seconds, child processes included.

They add up over tests that run in parallel, and do not depend on what else uses the machine.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

COST = "cost"
#: The environment names a file for the cost of every single test.
LISTING = "VITKERNELS_TEST_COSTS"
START = pytest.StashKey[float]()


def seconds() -> float:
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[START] = seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.when == "teardown":
        report.user_properties.append((COST, seconds() - item.stash[START]))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    costs = {
        report.nodeid: dict(report.user_properties)[COST]
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "teardown" and COST in dict(report.user_properties)
    }
    if not costs:
        return
    files: Counter[str] = Counter()
    for test, cost in costs.items():
        files[test.partition("::")[0]] += cost
    terminalreporter.section("seconds of a core, by file")
    for file, cost in files.most_common():
        terminalreporter.line(f"{cost:8.1f}  {file}")
    terminalreporter.line(f"{sum(costs.values()):8.1f}")
    if LISTING in os.environ:
        Path(os.environ[LISTING]).write_text("".join(f"{cost:.2f} {test}\n" for test, cost in costs.items()))
