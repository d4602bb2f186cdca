"""FIT: groups of tokens that exchange what they know by latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.nn.layers import CrossLayer, SelfLayer
from vitkernels.nn.maps import check_heads, check_input, integers, ratio

__all__ = ["FITBlock"]


class FITBlock(nn.Module):
    """Attention within groups of tokens, and between groups by a few latents of each; FIT's block.

    The tokens of a group attend to one another (``local_layers``), the group's latents read from them (``read``), the
    latents of all groups attend to one another (``global_layers``), and the tokens read from the latents of their group
    (``write``). Every layer has an MLP, normalises its input and adds to it.

    Args:
        dim: channels of the tokens.
        num_heads: number of heads, on tokens and on latents.
        latent_dim: channels of the latents, default ``dim``.
        num_local_layers: layers within groups, from 0 on.
        num_global_layers: layers on latents, from 0 on.
        mlp_ratio: width of an MLP, as a multiple of the channels.
        qkv_bias: whether projections to queries, keys and values have a bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: if ``dim`` or ``latent_dim`` is not a multiple of ``num_heads``, or on a count out of range.

    Source: Chen and Li, "FIT: Far-reaching Interleaved Transformers" (2023).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        latent_dim: int | None = None,
        num_local_layers: int = 1,
        num_global_layers: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        latent_dim = dim if latent_dim is None else latent_dim
        for name, n in (("dim", dim), ("latent_dim", latent_dim)):
            check_heads("FITBlock", name, n, num_heads)
            ratio("FITBlock", "mlp_ratio", mlp_ratio, n)
        integers("FITBlock", "num_local_layers", num_local_layers, 1, at_least=0)
        integers("FITBlock", "num_global_layers", num_global_layers, 1, at_least=0)

        def layers(channels: int, count: int) -> nn.Sequential:
            return nn.Sequential(
                *(SelfLayer(channels, num_heads, mlp_ratio, qkv_bias, **factory) for _ in range(count))
            )

        self.local_layers = layers(dim, num_local_layers)
        self.read = CrossLayer(latent_dim, dim, num_heads, mlp_ratio, qkv_bias, **factory)
        self.global_layers = layers(latent_dim, num_global_layers)
        self.write = CrossLayer(dim, latent_dim, num_heads, mlp_ratio, qkv_bias, **factory)

    def forward(self, x: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Attend within groups and exchange.

        Args:
            x: ``(B, groups, n, dim)``.
            latents: ``(B, groups, m, latent_dim)``, m much smaller than n.

        Returns:
            ``x`` and ``latents`` after the block, in their shapes.

        Raises:
            RuntimeError: if one of them has another shape than that.
        """
        check_input(self, x, "(B, groups, n, dim)")
        check_input(self, latents, "(B, groups, m, latent_dim)", "latents")
        if x.shape[:2] != latents.shape[:2]:
            raise RuntimeError(
                f"vitkernels.nn.FITBlock: latents has shape {tuple(latents.shape)}, takes x's batch and groups "
                f"{tuple(x.shape[:2])}"
            )
        groups = x.shape[:2]
        x, latents = self.local_layers(x.flatten(0, 1)), latents.flatten(0, 1)  # [B groups, n, dim]
        latents = self.read(latents, x)  # [B groups, m, latent_dim]
        together = torch.unflatten(latents, 0, groups).flatten(1, 2)  # [B, groups m, latent_dim]
        latents = self.global_layers(together).view(latents.shape)
        x = self.write(x, latents)
        return torch.unflatten(x, 0, groups), torch.unflatten(latents, 0, groups)
