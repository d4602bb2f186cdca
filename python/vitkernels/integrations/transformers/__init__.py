"""transformers: attention by name where the library has a registry for it, swapped classes where it has not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from torch import nn

from vitkernels.integrations.report import Entry
from vitkernels.integrations.transformers import registry
from vitkernels.integrations.transformers.families import SWAPS

__all__ = ["replace", "restore", "suspend"]


def replace(model: nn.Module) -> list[Entry]:
    """Let every attention module of ``model`` that can compute with the kernels do so."""
    return [*registry.replace(model), *SWAPS.replace(model)]


def restore(model: nn.Module) -> None:
    """Undo :func:`replace`."""
    registry.restore(model)
    SWAPS.restore(model)


def suspend(model: nn.Module) -> Callable[[], None]:
    """Undo :func:`replace`, and the choice of our attention by name. Returns what undoes that."""
    undo = ExitStack()
    undo.callback(registry.suspend(model))
    undo.callback(SWAPS.suspend(model))
    return undo.close
