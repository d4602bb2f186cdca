"""Modules whose parameters keep the names and shapes of the published implementations."""

from vitkernels.nn.agent import AgentAttention
from vitkernels.nn.attention import Attention
from vitkernels.nn.crossing import CrissCrossAttention, CrossShapedWindowAttention
from vitkernels.nn.halo import HaloAttention
from vitkernels.nn.latents import FITBlock
from vitkernels.nn.linear import (
    FocusedLinearAttention,
    LinearAngularAttention,
    LinearAttention,
    SimplifiedLinearAttention,
)
from vitkernels.nn.lite_mla import LiteMLA
from vitkernels.nn.lookup import LookupViTBlock
from vitkernels.nn.monarch import MonarchLinear
from vitkernels.nn.monarch_mixer import MonarchMixer, MonarchMLP
from vitkernels.nn.neighborhood import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from vitkernels.nn.proxy import ProxyTokenAttention
from vitkernels.nn.rep_bn import ProgressiveRepBN, RepBN
from vitkernels.nn.routing import BiLevelRoutingAttention
from vitkernels.nn.spectral import SpectralGating
from vitkernels.nn.token_transformer import TokenPerformer, TokenTransformer
from vitkernels.nn.windows import GridAttention, WindowAttention, WindowAttentionV2

__all__ = [
    "AgentAttention",
    "Attention",
    "BiLevelRoutingAttention",
    "CrissCrossAttention",
    "CrossShapedWindowAttention",
    "FITBlock",
    "FocusedLinearAttention",
    "GridAttention",
    "HaloAttention",
    "LinearAngularAttention",
    "LinearAttention",
    "LiteMLA",
    "LookupViTBlock",
    "MonarchLinear",
    "MonarchMLP",
    "MonarchMixer",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "ProgressiveRepBN",
    "ProxyTokenAttention",
    "RepBN",
    "SimplifiedLinearAttention",
    "SpectralGating",
    "TokenPerformer",
    "TokenTransformer",
    "WindowAttention",
    "WindowAttentionV2",
]
