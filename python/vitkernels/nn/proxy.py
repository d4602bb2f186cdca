"""Attention through proxies, which are means of windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkernels.nn.attention import Attention
from vitkernels.nn.layers import CrossAttention
from vitkernels.nn.maps import check_heads, check_map, integers

__all__ = ["ProxyTokenAttention"]

_POOLS: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_AXES = ("depth", "height", "width")


class ProxyTokenAttention(nn.Module):
    """Attention of all tokens of a map to one proxy for each window; the global part of PT-DiT's block.

    The mean of every window is its proxy. The proxies attend to one another (``proxy_attn``), then every token attends
    to the proxies (``cross_attn``). With it goes, for what is near, :class:`WindowAttention`, shifted in every second
    call. The block adds the results to ``x``.

    Args:
        dim: channels of the map.
        num_heads: number of heads.
        window_size: sizes of a window on one to three axes, one number for two equal axes. Windows at the end of a map
            may be smaller.
        qkv_bias: whether projections to queries, keys and values have a bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: if ``dim`` is not a multiple of ``num_heads``, or on a ``window_size`` out of range.

    Source: Wang et al., "Qihoo-T2X: An Efficiency-Focused Diffusion Transformer via Proxy Tokens for Text-to-Any-Task"
    (2024), section 3. Its first version draws one token of each window instead of the mean.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: int | Sequence[int] = 4,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        name = "ProxyTokenAttention"
        check_heads(name, "dim", dim, num_heads)
        num_axes = len(window_size) if isinstance(window_size, (list, tuple)) else 2
        if not 1 <= num_axes <= len(_AXES):
            raise RuntimeError(f"vitkernels.nn.{name}: window_size is {window_size!r}, takes one to three sizes")
        if num_axes == 1 and isinstance(window_size, (list, tuple)):
            window_size = window_size[0]
        self.window_size = integers(name, "window_size", window_size, num_axes)
        self.proxy_attn = Attention(dim, num_heads, qkv_bias=qkv_bias, **factory)
        self.cross_attn = CrossAttention(dim, dim, num_heads, qkv_bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, *map, dim)`` to the same."""
        num_axes = len(self.window_size)
        layout = f"(B, {', '.join(_AXES[-num_axes:])}, dim)"
        check_map(self, x, layout, is_convolved=True)
        pool = _POOLS[num_axes - 1]
        # In float32: PyTorch's pools of three axes know no 16-bit tensors on the CPU.
        wide = x.movedim(-1, 1).to(torch.promote_types(x.dtype, torch.float32))  # [B, dim, *map]
        means = pool(wide, self.window_size, ceil_mode=True).to(x.dtype)  # [B, dim, *windows]
        proxies = self.proxy_attn(means.flatten(2).transpose(1, 2))  # [B, windows, dim]
        out: Tensor = self.cross_attn(x.flatten(1, -2), proxies)  # [B, N, dim]
        return out.view(x.shape)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}"
