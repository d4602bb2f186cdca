"""Fused attention and token kernels for vision transformers."""

from vitkernels import _library as _library  # loads the operators before anything registers on them
from vitkernels import compat, nn, reference
from vitkernels.axes import Block, Full, Halo, Neighborhood, Sliding
from vitkernels.functional import (
    attention,
    attention_transposed,
    attention_varlen,
    criss_cross_attention,
    cross_shaped_window_attention,
    grid_attention,
    halo_attention,
    merge_attentions,
    na1d,
    na2d,
    na3d,
    spatial_attention,
    window_attention,
)
from vitkernels.integrations import Report, accelerate, restore, restored

__version__ = "0.1.0"

__all__ = [
    "Block",
    "Full",
    "Halo",
    "Neighborhood",
    "Report",
    "Sliding",
    "accelerate",
    "attention",
    "attention_transposed",
    "attention_varlen",
    "compat",
    "criss_cross_attention",
    "cross_shaped_window_attention",
    "grid_attention",
    "halo_attention",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "nn",
    "reference",
    "restore",
    "restored",
    "spatial_attention",
    "window_attention",
]
