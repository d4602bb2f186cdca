"""What a module does besides its forward."""

from __future__ import annotations

from torch import nn

__all__ = ["has_hooks", "is_as_made"]


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of ``module`` does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_as_made(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a call of ``module`` is that of ``cls`` and nothing else."""
    return type(module) is cls and "forward" not in module.__dict__ and not has_hooks(module)
