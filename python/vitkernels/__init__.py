"""Fused attention and token kernels for vision transformers."""

from vitkernels import _library as _library  # loads the operators before anything registers on them
from vitkernels import compat, nn, reference
from vitkernels.axes import Block, Full, Halo, Neighborhood, Sliding
from vitkernels.feature_map import FeatureMap
from vitkernels.functional import (
    agent_attention,
    attention,
    attention_transposed,
    attention_varlen,
    blockdiag_butterfly_multiply,
    channel_attention,
    criss_cross_attention,
    cross_shaped_window_attention,
    decayed_linear_attention,
    grid_attention,
    halo_attention,
    linear_attention,
    linear_attention_varlen,
    long_conv,
    merge_attentions,
    na1d,
    na2d,
    na3d,
    spatial_attention,
    spectral_gating,
    window_attention,
)
from vitkernels.integrations import MonarchReport, Report, accelerate, expand_monarch, monarchize, restore, restored

__version__ = "0.1.0"

__all__ = [
    "Block",
    "FeatureMap",
    "Full",
    "Halo",
    "MonarchReport",
    "Neighborhood",
    "Report",
    "Sliding",
    "accelerate",
    "agent_attention",
    "attention",
    "attention_transposed",
    "attention_varlen",
    "blockdiag_butterfly_multiply",
    "channel_attention",
    "compat",
    "criss_cross_attention",
    "cross_shaped_window_attention",
    "decayed_linear_attention",
    "expand_monarch",
    "grid_attention",
    "halo_attention",
    "linear_attention",
    "linear_attention_varlen",
    "long_conv",
    "merge_attentions",
    "monarchize",
    "na1d",
    "na2d",
    "na3d",
    "nn",
    "reference",
    "restore",
    "restored",
    "spatial_attention",
    "spectral_gating",
    "window_attention",
]
