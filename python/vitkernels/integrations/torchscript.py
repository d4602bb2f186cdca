"""What TorchScript cannot do with an accelerated model, said before it fails on its own."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import nn

__all__ = ["check_exporter", "refuse_script"]

_REMEDY = "use vitkernels.restore(model) first"


def refuse_script(module: nn.Module) -> NoReturn:
    """The ``__prepare_scriptable__`` of accelerated modules, which ``torch.jit.script`` calls."""
    raise RuntimeError(f"torch.jit.script: {type(module).__name__} is an accelerated module; {_REMEDY}")


def check_exporter(module: nn.Module) -> None:
    """Raise if the forward of ``module`` is traced by the ONNX exporter that knows torch's operators only."""
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():  # type: ignore[attr-defined,no-untyped-call]
        raise RuntimeError(
            f"torch.onnx.export(dynamo=False): {type(module).__name__} is an accelerated module, whose operators this "
            f"exporter does not have; {_REMEDY}"
        )
