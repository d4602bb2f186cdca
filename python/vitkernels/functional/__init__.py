"""The typed functions: what ``import vitkernels as vk`` offers as ``vk.*``."""

from vitkernels.functional.agent_attention import agent_attention
from vitkernels.functional.attention import attention
from vitkernels.functional.attention_transposed import attention_transposed
from vitkernels.functional.attention_varlen import attention_varlen
from vitkernels.functional.blockdiag_butterfly_multiply import blockdiag_butterfly_multiply
from vitkernels.functional.channel_attention import channel_attention
from vitkernels.functional.crossing import criss_cross_attention, cross_shaped_window_attention
from vitkernels.functional.decayed_linear_attention import decayed_linear_attention
from vitkernels.functional.indexed_attention import indexed_attention
from vitkernels.functional.linear_attention import linear_attention
from vitkernels.functional.linear_attention_varlen import linear_attention_varlen
from vitkernels.functional.long_conv import long_conv
from vitkernels.functional.merge_attentions import merge_attentions
from vitkernels.functional.neighborhood import na1d, na2d, na3d
from vitkernels.functional.routing import bilevel_route, regional_routing_attention
from vitkernels.functional.spatial_attention import spatial_attention
from vitkernels.functional.spectral_gating import spectral_gating
from vitkernels.functional.windows import grid_attention, halo_attention, window_attention

__all__ = [
    "agent_attention",
    "attention",
    "attention_transposed",
    "attention_varlen",
    "bilevel_route",
    "blockdiag_butterfly_multiply",
    "channel_attention",
    "criss_cross_attention",
    "cross_shaped_window_attention",
    "decayed_linear_attention",
    "grid_attention",
    "halo_attention",
    "indexed_attention",
    "linear_attention",
    "linear_attention_varlen",
    "long_conv",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "regional_routing_attention",
    "spatial_attention",
    "spectral_gating",
    "window_attention",
]
