"""What the accelerated modules of timm have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkernels.integrations.swap import DROPOUT, Fused

__all__ = ["REL_POS", "REL_POS_AND_DROPOUT", "packed_projection", "scale_of"]

#: timm's relative positions, which are added to the logits.
REL_POS = tuple(f"timm.layers.pos_embed_rel.{name}" for name in ("RelPosBias", "RelPosBiasTf", "RelPosMlp"))

#: What attention with them does inside, for `Fused.absorbed`.
REL_POS_AND_DROPOUT = {"rel_pos": REL_POS, "attn_drop": DROPOUT}


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
