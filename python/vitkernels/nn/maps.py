"""What the modules on maps share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["check_map", "drop_buffers", "each", "no_dropout", "pair"]


def each(option: Any, count: int) -> tuple[Any, ...]:
    """``option`` for each of ``count`` axes: one value stands for all."""
    return tuple(option) if isinstance(option, Sequence) else (option,) * count


def pair(option: int | tuple[int, int]) -> tuple[int, int]:
    height, width = each(option, 2)
    return height, width


def no_dropout(module: str, attn_drop: float) -> None:
    if attn_drop != 0.0:
        raise ValueError(f"vitkernels.nn.{module}: attn_drop is {attn_drop}, takes 0: the kernel has no dropout")


def check_map(module: nn.Module, x: Tensor, layout: str = "(B, height, width, dim)") -> None:
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"vitkernels.nn.{type(module).__name__}: x has shape {tuple(x.shape)}, takes {layout}")


def drop_buffers(module: nn.Module, *names: str) -> None:
    """Let ``load_state_dict`` pass over what published files hold besides parameters."""

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in names:
            state.pop(prefix + name, None)

    module.register_load_state_dict_pre_hook(drop)  # type: ignore[no-untyped-call]
