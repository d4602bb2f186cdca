"""What can be measured: one :class:`Entry` per problem, one :class:`Target` per promise, both plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "OURS",
    "Call",
    "Entry",
    "Inputs",
    "Peer",
    "Target",
    "Unavailable",
    "entries",
    "find",
    "register",
    "targets",
    "torch_dtype",
]

OURS = "vitkernels"

Inputs = dict[str, Any]
Call = Callable[[], tuple[Tensor, ...]]


def torch_dtype(name: str) -> torch.dtype:
    """Of the tensors of a measurement. ``tf32`` is float32 whose products may be rounded."""
    dtype = getattr(torch, "float32" if name == "tf32" else name)
    assert isinstance(dtype, torch.dtype)
    return dtype


class Unavailable(Exception):
    """Raised by ``inputs`` or ``prepare`` when something cannot run here; the text says why."""


@dataclass(frozen=True)
class Peer:
    """One way to compute an entry.

    ``prepare(inputs)`` does what happens once per model (views, compilation) and returns the timed call. All
    peers of an entry return the same tensors in the same layout.
    """

    name: str
    prepare: Callable[[Inputs], Call]
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    option: str | None = None
    """Measured only when the command line has this option, for peers that take long to prepare."""
    may_refuse: bool = False
    """Other people's code that does not suit every device, dtype and shape: its errors are findings, not crashes."""
    in_fresh_process: bool = True
    """Whether the first call in a new process says something about memory (not when it compiles)."""


@dataclass(frozen=True)
class Entry:
    """A problem of fixed size.

    Args:
        name: ``group/shape``; the group may hold slashes itself.
        inputs: from a dtype and a device, the arguments of every peer's ``prepare``. Seeded: two processes
            get the same values. Results are judged against the baseline's on the same values in float32.
        peers: ours first, the baseline second (what a user has today), then the others.
        flops: operations that the problem needs, multiply and add counted apart.
        elements: numbers that must be read or written at least once, in the entry's dtype.
        dtypes: the dtypes that are measured unless the command line names others.
        once: too long to repeat: one call per peer, each in a process of its own.
    """

    name: str
    inputs: Callable[[torch.dtype, torch.device], Inputs]
    peers: tuple[Peer, ...]
    flops: float
    elements: float
    dtypes: tuple[str, ...] = ("float32",)
    once: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    reference: Callable[[Inputs], Call] | None = None
    """Prepares what results are compared with, in float32; the baseline, if there is none."""
    replayed: bool = True
    """On a GPU, timed as a graph that is replayed: the device's time, without that of the host between kernels."""
    same_results: bool = True
    """Where not, the peers do different things whose times alone are compared (a backward pass and its forward)."""

    @property
    def group(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def shape(self) -> str:
        return self.name.rpartition("/")[2]

    def peer(self, name: str) -> Peer:
        return next(peer for peer in self.peers if peer.name == name)


@dataclass(frozen=True)
class Target:
    """A figure that some entries are expected to reach.

    ``quantity`` is ``"speedup"`` (median of the ratios to the baseline, or to ``peer``), ``"peak_mb"`` (our peak extra
    memory, MB) or ``"tflops"`` (the problem's operations over our time, in 10^12 a second).
    """

    label: str
    entries: tuple[str, ...]
    quantity: str = "speedup"
    dtype: str = "float32"
    mean_at_least: float | None = None
    each_at_least: float | None = None
    each_below: float | None = None
    device: str = "cpu"
    peer: str | None = None


_entries: dict[str, Entry] = {}
_targets: list[Target] = []


def register(*items: Entry | Target) -> None:
    """Add entries and targets. Names are unique, and a target names entries that exist already."""
    for item in items:
        if isinstance(item, Target):
            unknown = [name for name in item.entries if name not in _entries]
            if unknown:
                raise ValueError(f"target {item.label!r} names unknown entries: {unknown}")
            _targets.append(item)
            continue
        if item.name in _entries:
            raise ValueError(f"entry {item.name!r} is registered twice")
        if len(item.peers) < 2 or item.peers[0].name != OURS:
            raise ValueError(f"entry {item.name!r} needs {OURS!r} as its first peer and a baseline as its second")
        _entries[item.name] = item


def entries() -> list[Entry]:
    """All entries, in the order of their registration."""
    return list(_entries.values())


def targets() -> list[Target]:
    return list(_targets)


def find(name: str) -> Entry:
    return _entries[name]
