"""What exporters cannot do with an accelerated model, said before they fail on their own."""

from __future__ import annotations

import warnings
from typing import NoReturn

import torch
from torch import nn

__all__ = ["check_exporter", "refuse_script"]

_REMEDY = "do it inside `with vitkernels.restored(model):`"


def refuse_script(module: nn.Module) -> NoReturn:
    """The ``__prepare_scriptable__`` of accelerated modules, which ``torch.jit.script`` calls."""
    raise RuntimeError(f"torch.jit.script: {type(module).__name__} is an accelerated module; {_REMEDY}")


def check_exporter(module: nn.Module) -> None:
    """Name the remedy if an exporter to ONNX, which has none of our operators, calls the forward of ``module``."""
    exporting = torch.compiler.is_exporting()
    traced = exporting or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if not traced or not torch.onnx.is_in_onnx_export():
        return
    message = (
        f"torch.onnx.export: {type(module).__name__} is an accelerated module, whose operators ONNX does not have; "
        f"{_REMEDY}"
    )
    if not exporting:
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)  # it raises later, unless it was given translations of its own
