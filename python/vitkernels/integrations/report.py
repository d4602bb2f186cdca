"""What :func:`vitkernels.accelerate` did to a model, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

__all__ = ["Entry", "Report", "kind_of"]


@dataclass(frozen=True)
class Entry:
    """One attention module.

    Args:
        name: its name in the model, as of ``model.named_modules()``.
        kind: library and class, such as ``"timm Attention"``.
        status: ``"replaced"``, or ``"stock"`` where it was left as it was.
        reason: why it is stock; for a replaced one, when it computes as before nevertheless.
        operator: what a replaced one computes with.
    """

    name: str
    kind: str
    status: Literal["replaced", "stock"]
    reason: str = ""
    operator: str = "attention"


@dataclass
class Report:
    """Every attention module of a model, replaced or left alone. ``print`` shows a table.

    Args:
        entries: one for each module, in the order of ``model.named_modules()``.
        backends: each device type with ``"loaded"``, or why it has no kernels.
    """

    entries: list[Entry] = field(default_factory=list)
    backends: dict[str, str] = field(default_factory=dict)

    @property
    def replaced(self) -> list[Entry]:
        """The entries that compute with the kernels."""
        return [entry for entry in self.entries if entry.status == "replaced"]

    @property
    def stock(self) -> list[Entry]:
        """The entries that were left alone."""
        return [entry for entry in self.entries if entry.status == "stock"]

    def __str__(self) -> str:
        lines = []
        groups = Counter((entry.status, entry.kind, entry.reason, entry.operator) for entry in self.entries)
        for (status, kind, reason, operator), count in groups.items():
            target = f"vitkernels.{operator}" if status == "replaced" else "stock"
            lines.append(f"{count:>4} x {kind} -> {target}" + (f" ({reason})" if reason else ""))
        if not self.replaced:
            lines.append("nothing was replaced" if lines else "nothing to replace: no attention module found")
        kernels = ", ".join(f"{device}: {state}" for device, state in self.backends.items())
        lines.append(f"kernels: {kernels}")
        return "\n".join(lines)


def kind_of(module: nn.Module) -> str:
    """Library and class of ``module``: ``"timm Attention"``."""
    cls = type(module)
    return f"{cls.__module__.partition('.')[0]} {cls.__name__}"
