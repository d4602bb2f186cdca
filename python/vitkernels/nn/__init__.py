"""Modules whose parameters keep the names and shapes of the published implementations."""

from vitkernels.nn.agent import AgentAttention
from vitkernels.nn.attention import Attention
from vitkernels.nn.crossing import CrissCrossAttention, CrossShapedWindowAttention
from vitkernels.nn.halo import HaloAttention
from vitkernels.nn.neighborhood import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from vitkernels.nn.windows import GridAttention, WindowAttention, WindowAttentionV2

__all__ = [
    "AgentAttention",
    "Attention",
    "CrissCrossAttention",
    "CrossShapedWindowAttention",
    "GridAttention",
    "HaloAttention",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "WindowAttention",
    "WindowAttentionV2",
]
