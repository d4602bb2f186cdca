"""Plain PyTorch definitions of every operator: slow, float64-capable, the ground truth of the tests."""

from vitkernels.reference.agent_attention import agent_attention
from vitkernels.reference.attention import attention
from vitkernels.reference.attention_transposed import attention_transposed
from vitkernels.reference.attention_varlen import attention_varlen
from vitkernels.reference.blockdiag_butterfly_multiply import blockdiag_butterfly_multiply
from vitkernels.reference.channel_attention import channel_attention
from vitkernels.reference.decayed_linear_attention import decayed_linear_attention
from vitkernels.reference.indexed_attention import indexed_attention
from vitkernels.reference.linear_attention import linear_attention, linear_attention_varlen
from vitkernels.reference.long_conv import long_conv
from vitkernels.reference.merge_attentions import merge_attentions
from vitkernels.reference.regional_routing_attention import regional_routing_attention
from vitkernels.reference.spatial_attention import spatial_attention
from vitkernels.reference.spectral_gating import spectral_gating

__all__ = [
    "agent_attention",
    "attention",
    "attention_transposed",
    "attention_varlen",
    "blockdiag_butterfly_multiply",
    "channel_attention",
    "decayed_linear_attention",
    "indexed_attention",
    "linear_attention",
    "linear_attention_varlen",
    "long_conv",
    "merge_attentions",
    "regional_routing_attention",
    "spatial_attention",
    "spectral_gating",
]
