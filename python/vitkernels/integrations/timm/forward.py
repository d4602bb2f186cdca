"""What the accelerated modules of timm have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkernels.integrations.swap import Fused

__all__ = ["packed_projection", "scale_of"]


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
