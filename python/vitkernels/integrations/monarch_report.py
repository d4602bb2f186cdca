"""What :func:`vitkernels.monarchize` and :func:`vitkernels.expand_monarch` did to a model, and why."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

__all__ = ["MonarchEntry", "MonarchReport"]


@dataclass(frozen=True)
class MonarchEntry:
    """One linear layer.

    Args:
        name: its name in the model, as of ``model.named_modules()``.
        shape: features of its input and of its output.
        status: ``"replaced"``, or ``"stock"`` where it was left as it was.
        reason: why it is stock.
        nblocks: blocks of each Monarch factor, ``None`` for a stock one.
        parameters: how many it had before, and has now.
        flops: how many it took for a row of inputs before, and takes now, two for each multiply-add.
        error: relative error of the new weight in the Frobenius norm.
    """

    name: str
    shape: tuple[int, int]
    status: Literal["replaced", "stock"]
    reason: str = ""
    nblocks: int | None = None
    parameters: tuple[int, int] = (0, 0)
    flops: tuple[int, int] = (0, 0)
    error: float = 0.0


@dataclass(frozen=True)
class MonarchReport:
    """Every linear layer that was asked for, replaced or left alone. ``print`` shows a table with totals.

    Args:
        entries: one for each layer, in the order of ``model.named_modules()``.
    """

    entries: tuple[MonarchEntry, ...] = ()

    @property
    def replaced(self) -> tuple[MonarchEntry, ...]:
        """The entries of new layers."""
        return tuple(entry for entry in self.entries if entry.status == "replaced")

    @property
    def stock(self) -> tuple[MonarchEntry, ...]:
        """The entries that were left alone."""
        return tuple(entry for entry in self.entries if entry.status == "stock")

    @property
    def parameters(self) -> tuple[int, int]:
        """Of all replaced layers together, before and now."""
        return _total([entry.parameters for entry in self.replaced])

    @property
    def flops(self) -> tuple[int, int]:
        """For a row of inputs of each replaced layer, before and now."""
        return _total([entry.flops for entry in self.replaced])

    def __str__(self) -> str:
        lines = []
        if self.replaced:
            rows = [["layer", "shape", "blocks", "parameters", "now", "FLOPs a row", "now", "error"]]
            for entry in self.replaced:
                counts = [f"{n:,}" for n in (*entry.parameters, *entry.flops)]
                shape = f"{entry.shape[0]} -> {entry.shape[1]}"
                rows.append([entry.name, shape, str(entry.nblocks), *counts, f"{entry.error:.3f}"])
            counts = [f"{n:,}" for n in (*self.parameters, *self.flops)]
            rows.append([f"total of {len(self.replaced)}", "", "", *counts, ""])
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for row in rows:
                cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
                lines.append("  ".join((row[0].ljust(widths[0]), *cells)).rstrip())
        else:
            lines.append("nothing was replaced")
        reasons = defaultdict[str, list[str]](list)
        for entry in self.stock:
            reasons[entry.reason].append(entry.name)
        lines += [f"{len(names):>4} x left alone ({reason}): {', '.join(names)}" for reason, names in reasons.items()]
        return "\n".join(lines)


def _total(pairs: list[tuple[int, int]]) -> tuple[int, int]:
    return sum(before for before, _ in pairs), sum(now for _, now in pairs)
