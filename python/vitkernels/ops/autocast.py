"""Autocast: the data goes to its dtype, and nothing else.

``torch.library.register_autocast`` casts every floating tensor: lse, biases and scales would lose bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitkernels._torch_private import without_autocast
from vitkernels.ops.schema import Operator

__all__ = ["Cast", "register_autocast"]

_library = torch.library.Library("vitkernels", "IMPL")  # type: ignore[no-untyped-call]

_DEVICES = ("cpu", "cuda")
_DATA = ("query", "key", "value", "value_q", "key_fill", "value_fill", "x", "w1", "w2", "filter")

Cast = Callable[[tuple[Any, ...], str], tuple[Any, ...]]


def register_autocast(op: Operator) -> Cast:
    """Have the dispatcher cast the arguments of ``op``; returns what does so for a call on a device."""
    is_data = [name in _DATA for name in op.arguments]

    def cast(args: tuple[Any, ...], device: str) -> tuple[Any, ...]:
        if device not in _DEVICES or not torch.is_autocast_enabled(device):
            return args
        dtype = torch.get_autocast_dtype(device)
        return tuple(a.to(dtype) if mine and _is_castable(a) else a for a, mine in zip(args, is_data, strict=True))

    for device in _DEVICES:

        def call(*args: Any, device: str = device) -> Any:
            cast_args = cast(args, device)
            with without_autocast(device):
                return op.overload(*cast_args)

        _library.impl(op.name, call, f"Autocast{device.upper()}")  # type: ignore[no-untyped-call]

    return cast


def _is_castable(argument: object) -> bool:
    # As torch's own autocast does: float64 stays as it is.
    return isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64
