"""Every module of ``vitkernels.nn``, small, and the shape of its input, or of its two."""

from __future__ import annotations

import vitkernels as vk

MODULES = {
    "AgentAttention": lambda: (vk.nn.AgentAttention(16, 2, (4, 6), 4), (2, 4, 6, 16)),
    "Attention": lambda: (vk.nn.Attention(24, 3, qkv_bias=True), (2, 7, 24)),
    "BiLevelRoutingAttention": lambda: (vk.nn.BiLevelRoutingAttention(16, 2, n_win=2, topk=2), (2, 5, 6, 16)),
    "CrissCrossAttention": lambda: (vk.nn.CrissCrossAttention(16), (2, 16, 4, 5)),
    "CrossShapedWindowAttention": lambda: (vk.nn.CrossShapedWindowAttention(16, 2, 2), (2, 4, 6, 16)),
    "FocusedLinearAttention": lambda: (vk.nn.FocusedLinearAttention(16, 2, (4, 6)), (2, 4, 6, 16)),
    "GridAttention": lambda: (vk.nn.GridAttention(16, 8, 2), (2, 4, 6, 16)),
    "HaloAttention": lambda: (vk.nn.HaloAttention(16, num_heads=2, block_size=2, halo_size=1), (2, 16, 4, 6)),
    "LinearAngularAttention": lambda: (vk.nn.LinearAngularAttention(16, 2), (2, 7, 16)),
    "LinearAttention": lambda: (vk.nn.LinearAttention(16, 2), (2, 7, 16)),
    "LiteMLA": lambda: (vk.nn.LiteMLA(16, 16), (2, 16, 4, 5)),
    "MonarchLinear": lambda: (vk.nn.MonarchLinear(14, 14), (2, 7, 14)),
    "MonarchMLP": lambda: (vk.nn.MonarchMLP(14, 20), (2, 7, 14)),
    "MonarchMixer": lambda: (vk.nn.MonarchMixer(16, 9, residual_long_conv=True, filter_order=8), (2, 7, 16)),
    "NeighborhoodAttention1D": lambda: (vk.nn.NeighborhoodAttention1D(16, 2, 3, rel_pos_bias=True), (2, 7, 16)),
    "NeighborhoodAttention2D": lambda: (vk.nn.NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True), (2, 4, 5, 16)),
    "NeighborhoodAttention3D": lambda: (vk.nn.NeighborhoodAttention3D(16, 2, 3), (2, 3, 4, 5, 16)),
    # In so many steps, none changes float32's share of the layer norm: a repeated forward is the same.
    "ProgressiveRepBN": lambda: (vk.nn.ProgressiveRepBN(16, 2**26), (2, 7, 16)),
    "ProxyTokenAttention": lambda: (vk.nn.ProxyTokenAttention(16, 2, (2, 4)), (2, 4, 6, 16)),
    "RepBN": lambda: (vk.nn.RepBN(16), (2, 7, 16)),
    "SimplifiedLinearAttention": lambda: (vk.nn.SimplifiedLinearAttention(16, 2, (4, 6)), (2, 4, 6, 16)),
    "SpectralGating": lambda: (vk.nn.SpectralGating(16, 4, 6), (2, 24, 16)),
    "TokenPerformer": lambda: (vk.nn.TokenPerformer(16, 16), (2, 7, 16)),
    "TokenTransformer": lambda: (vk.nn.TokenTransformer(16, 16), (2, 7, 16)),
    "WindowAttention": lambda: (vk.nn.WindowAttention(16, 2, window_size=3, shift_size=1), (2, 5, 6, 16)),
    "WindowAttentionV2": lambda: (vk.nn.WindowAttentionV2(16, 3, 2, shift_size=1), (2, 5, 6, 16)),
}

# Of two inputs, and of as many outputs in their shapes.
PAIRS = {
    "FITBlock": lambda: (vk.nn.FITBlock(16, 2, 24), (2, 3, 7, 16), (2, 3, 2, 24)),
    "LookupViTBlock": lambda: (vk.nn.LookupViTBlock(16, 2), (2, 12, 16), (2, 3, 16)),
}

# What has no kernels on other devices yet, or none at all.
ON_CPU_ONLY = {
    "BiLevelRoutingAttention", "FocusedLinearAttention", "LinearAngularAttention", "LinearAttention", "LiteMLA",
    "ProgressiveRepBN", "RepBN", "SimplifiedLinearAttention",
    "TokenPerformer",
}  # fmt: skip

assert set(MODULES | PAIRS) == set(vk.nn.__all__), "a module without a row"
