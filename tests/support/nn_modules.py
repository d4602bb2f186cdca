"""Every module of ``vitkernels.nn``, small, and the shape of its input."""

from __future__ import annotations

import vitkernels as vk

MODULES = {
    "AgentAttention": lambda: (vk.nn.AgentAttention(16, 2, (4, 6), 4), (2, 4, 6, 16)),
    "Attention": lambda: (vk.nn.Attention(24, 3, qkv_bias=True), (2, 7, 24)),
    "CrissCrossAttention": lambda: (vk.nn.CrissCrossAttention(16), (2, 16, 4, 5)),
    "CrossShapedWindowAttention": lambda: (vk.nn.CrossShapedWindowAttention(16, 2, 2), (2, 4, 6, 16)),
    "GridAttention": lambda: (vk.nn.GridAttention(16, 8, 2), (2, 4, 6, 16)),
    "HaloAttention": lambda: (vk.nn.HaloAttention(16, num_heads=2, block_size=2, halo_size=1), (2, 16, 4, 6)),
    "NeighborhoodAttention1D": lambda: (vk.nn.NeighborhoodAttention1D(16, 2, 3, rel_pos_bias=True), (2, 7, 16)),
    "NeighborhoodAttention2D": lambda: (vk.nn.NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True), (2, 4, 5, 16)),
    "NeighborhoodAttention3D": lambda: (vk.nn.NeighborhoodAttention3D(16, 2, 3), (2, 3, 4, 5, 16)),
    "WindowAttention": lambda: (vk.nn.WindowAttention(16, 2, window_size=3, shift_size=1), (2, 5, 6, 16)),
    "WindowAttentionV2": lambda: (vk.nn.WindowAttentionV2(16, 3, 2, shift_size=1), (2, 5, 6, 16)),
}

assert set(MODULES) == set(vk.nn.__all__), "a module without a row"
