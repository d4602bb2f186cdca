"""What the modules on maps share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from vitkernels.functional.arguments import why_not_stored

__all__ = [
    "Restorable",
    "check_heads",
    "check_input",
    "check_map",
    "check_stored_input",
    "integers",
    "no_dropout",
    "odd_padding",
    "pair",
    "ratio",
]


class Restorable(nn.Module):
    """A module whose published files hold more than parameters, and less than its buffers.

    What a module computes of its arguments is computed again wherever its tensors are replaced: when it is moved,
    emptied (``to_empty``, from the meta device) or loaded.
    """

    #: What files hold besides parameters; passed over.
    ignored: ClassVar[tuple[str, ...]] = ()

    def init_non_persistent_buffers(self) -> None:
        """Compute what no file holds. timm calls this after ``to_empty``."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.ignored:
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.init_non_persistent_buffers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Restorable:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.init_non_persistent_buffers()
        return self


def integers(module: str, name: str, option: Any, count: int, at_least: int = 1) -> tuple[int, ...]:
    """``option`` for each of ``count`` axes: one value stands for all."""
    values = tuple(option) if count > 1 and isinstance(option, (list, tuple)) else (option,) * count
    if len(values) != count or any(not isinstance(n, int) or isinstance(n, bool) or n < at_least for n in values):
        each = "" if count == 1 else f", or one for each of {count} axes"
        raise RuntimeError(f"vitkernels.nn.{module}: {name} is {option!r}, takes an integer from {at_least} on{each}")
    return values


def odd_padding(module: str, name: str, kernel_size: int, at_least: int = 1) -> int:
    """Of a convolution that keeps the size of its input; 0 for a kernel size of 0, where there may be none."""
    integers(module, name, kernel_size, 1, at_least)
    if kernel_size % 2 == 0 and kernel_size > 0:
        raise RuntimeError(f"vitkernels.nn.{module}: {name} is {kernel_size!r}, takes an odd number")
    return kernel_size // 2


def pair(module: str, name: str, option: int | tuple[int, int], at_least: int = 1) -> tuple[int, int]:
    height, width = integers(module, name, option, 2, at_least)
    return height, width


def ratio(module: str, name: str, option: float, channels: int) -> None:
    """Raise unless ``option`` times ``channels`` is one channel or more."""
    is_number = isinstance(option, (int, float)) and not isinstance(option, bool)
    if not is_number or not 1 <= option * channels < math.inf:
        raise RuntimeError(f"vitkernels.nn.{module}: {name} is {option!r}, takes a number from 1 / {channels} on")


def check_heads(module: str, name: str, dim: int, num_heads: int) -> None:
    integers(module, "num_heads", num_heads, 1)
    integers(module, name, dim, 1)
    if dim % num_heads != 0:
        raise RuntimeError(f"vitkernels.nn.{module}: {name} is {dim}, takes a multiple of num_heads ({num_heads})")


def no_dropout(module: str, attn_drop: float) -> None:
    if attn_drop != 0.0:
        raise NotImplementedError(
            f"vitkernels.nn.{module}: attn_drop is {attn_drop}, takes 0: the kernel has no dropout"
        )


def check_stored_input(module: nn.Module, x: Tensor, layout: str, name: str = "x") -> None:
    """Raise unless ``x``, the argument ``name``, is a tensor that has its memory."""
    why = (
        why_not_stored(name, x) if isinstance(x, Tensor) else f"{name} is a {type(x).__name__}, takes a tensor {layout}"
    )
    if why:
        raise RuntimeError(f"vitkernels.nn.{type(module).__name__}: {why}")


def check_input(module: nn.Module, x: Tensor, layout: str, name: str = "x") -> None:
    """Raise unless ``x``, the argument ``name``, is a tensor of so many dimensions that has its memory."""
    check_stored_input(module, x, layout, name)
    if x.dim() != layout.count(",") + 1:
        raise RuntimeError(f"vitkernels.nn.{type(module).__name__}: {name} has shape {tuple(x.shape)}, takes {layout}")


def check_map(
    module: nn.Module, x: Tensor, layout: str = "(B, height, width, dim)", is_convolved: bool = False
) -> None:
    """Raise unless ``x`` has this layout, and, where PyTorch's convolutions see it, a map of one token or more."""
    check_input(module, x, layout)
    names = layout.strip("()").split(", ")
    if is_convolved and any(name in ("height", "width") and n == 0 for name, n in zip(names, x.shape, strict=True)):
        raise RuntimeError(
            f"vitkernels.nn.{type(module).__name__}: x has shape {tuple(x.shape)}, takes a map of one token or more"
        )
