"""What every accelerated module of timm has in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkernels.integrations.devices import KERNEL_DTYPES

__all__ = ["Fused", "dropout_of", "packed_projection", "scale_of"]


class Fused(nn.Module):
    """First base of an accelerated module's class; the other one is timm's.

    A subclass writes ``attend``: timm's forward, its arguments included, with the kernel inside.
    """

    #: timm's class.
    stock_class: ClassVar[type[nn.Module]]
    #: What ``attend`` reads of the module. timm may rename it, and then the module is left alone.
    attributes: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def attend(self, x: Tensor, *args: Any, **kwargs: Any) -> Any: ...

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.dtype not in KERNEL_DTYPES.get(x.device.type, ()) or (self.training and dropout_of(self) > 0.0):
            return super().forward(x, *args, **kwargs)
        return self.attend(x, *args, **kwargs)

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """timm's forward."""
        return super().forward(*args, **kwargs)

    @staticmethod
    def obstacle(module: nn.Module) -> str:
        """Why ``attend`` cannot stand for ``module``, or nothing."""
        return ""


def dropout_of(module: nn.Module) -> float:
    """The dropout of the attention weights, which the kernel does not have."""
    return float(getattr(getattr(module, "attn_drop", None), "p", 0.0))


def scale_of(module: Fused) -> float | None:
    """The factor on the logits. Where timm calls SDPA, it never reads ``module.scale``."""
    return None if getattr(module, "fused_attn", False) else module.scale


def packed_projection(module: Fused, x: Tensor) -> Tensor:
    """The packed queries, keys and values of ``x``, with the biases that BEiT and EVA keep apart from ``qkv``."""
    if getattr(module, "q_bias", None) is None:
        return module.qkv(x)  # type: ignore[no-any-return]
    bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    if type(module.qkv) is nn.Linear and not module.qkv_bias_separate:
        return F.linear(x, module.qkv.weight, bias)
    packed: Tensor = module.qkv(x)
    packed += bias  # in place, so that autocast's dtype stays
    return packed
