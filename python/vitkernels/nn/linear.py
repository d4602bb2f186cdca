"""Linear attention of vision transformers: FLatten's, SLAB's, and by angle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkernels.feature_map import FeatureMap, encode
from vitkernels.functional import linear_attention
from vitkernels.nn.maps import check_heads, check_input, check_map, integers, odd_padding, pair

__all__ = ["FocusedLinearAttention", "LinearAngularAttention", "LinearAttention", "SimplifiedLinearAttention"]


class LinearAttention(nn.Module):
    """Multi-head linear self-attention with one packed projection, fused.

    ``qkv`` and ``proj`` have the names and shapes of timm's ``Attention``. With ``window_size`` and ``kernel_size``
    there are, as in FLatten and SLAB, ``positional_encoding``, which is added to the keys, and ``dwc``, a depthwise
    convolution of the values that is added to the output and that all heads share.

    Args:
        dim: channels of the input.
        num_heads: number of heads.
        window_size: sizes ``(height, width)`` of the map that ``positional_encoding`` is made for, one number for a
            square one; it is resized for others. ``None``: no positional encoding.
        feature_map: as in :func:`vitkernels.linear_attention`. The projection of random features becomes a buffer.
        qkv_bias: whether ``qkv`` has a bias.
        kernel_size: of ``dwc``, an odd number. ``None``: no convolution.
        proj_drop: dropout of the output, in training.
        eps: added to the denominator.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: if ``dim`` is not a multiple of ``num_heads``, or on an option out of range.

    Source: Katharopoulos et al., "Transformers are RNNs" (2020), eq. 5; the convolution and the encoding: Han et al.,
    "FLatten Transformer" (2023), section 4, and its published code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: int | tuple[int, int] | None = None,
        feature_map: str | FeatureMap = "relu",
        qkv_bias: bool = False,
        kernel_size: int | None = None,
        proj_drop: float = 0.0,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        name = type(self).__name__
        check_heads(name, "dim", dim, num_heads)
        self.num_heads, self.eps, head_dim = num_heads, eps, dim // num_heads
        self.window_size = None if window_size is None else pair(name, "window_size", window_size)
        chosen, _ = encode("linear_attention", feature_map)
        self.feature_map, self.power = chosen.name, chosen.power
        self.register_buffer("projection", None if chosen.projection is None else _held(chosen.projection, factory))
        self.projection: Tensor | None
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc: nn.Conv2d | None = None
        if kernel_size is not None:
            padding = odd_padding(name, "kernel_size", kernel_size)
            self.dwc = nn.Conv2d(head_dim, head_dim, kernel_size, padding=padding, groups=head_dim, **factory)
        self.positional_encoding: nn.Parameter | None = None
        if self.window_size is not None:
            self.positional_encoding = nn.Parameter(torch.zeros(1, math.prod(self.window_size), dim, **factory))

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Attend within each sequence, map or window.

        Args:
            x: ``(B, height, width, dim)``, or ``(B, N, dim)``.
            size: ``(height, width)`` of the map whose tokens are in ``(B, N, dim)``, default ``window_size``. Not
                needed without encoding and convolution.

        Returns:
            The shape of ``x``.

        Raises:
            RuntimeError: if ``x`` has another shape than that, naming what it takes.
        """
        is_map = isinstance(x, Tensor) and x.dim() == 4 and size is None
        if is_map:
            check_map(self, x, is_convolved=self.dwc is not None or self.positional_encoding is not None)
        else:
            check_input(self, x, "(B, N, dim)")
        sizes = tuple(x.shape[1:3]) if is_map else self._sizes(x, size)
        qkv = self.qkv(x.flatten(1, 2) if is_map else x)  # [B, N, 3 dim]
        q, k, v = torch.unflatten(qkv, -1, (3, self.num_heads, -1)).unbind(-3)  # [B, N, H, d]
        if self.positional_encoding is not None:
            k = k + torch.unflatten(self._encoding(sizes), -1, (self.num_heads, -1))
        out = self._attend(q, k, v)
        if self.dwc is not None:
            out = out + self._convolved(self.dwc, v, sizes)
        output: Tensor = self.proj_drop(self.proj(out.flatten(2)))
        return torch.unflatten(output, 1, sizes) if is_map else output

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        features = FeatureMap(self.feature_map, self.power, self.projection)
        return linear_attention(q, k, v, feature_map=features, eps=self.eps)

    def _sizes(self, x: Tensor, size: Sequence[int] | None) -> tuple[int, ...]:
        """Those of the map whose tokens are in ``(B, N, dim)``; none where nothing asks for them."""
        name = type(self).__name__
        if size is None and self.dwc is None and self.positional_encoding is None:
            return ()
        given = self.window_size if size is None else size
        if given is None:
            raise RuntimeError(f"vitkernels.nn.{name}: size is None, takes the map's (height, width)")
        sizes = integers(name, "size", given, 2)
        if x.shape[1] != math.prod(sizes):
            raise RuntimeError(
                f"vitkernels.nn.{name}: x has shape {tuple(x.shape)}, takes {math.prod(sizes)} tokens, those of a map "
                f"{sizes}"
            )
        return sizes

    def _encoding(self, sizes: tuple[int, ...]) -> Tensor:
        assert self.positional_encoding is not None and self.window_size is not None
        if sizes == self.window_size:
            return self.positional_encoding
        on_map = torch.unflatten(self.positional_encoding.transpose(1, 2), 2, self.window_size)  # [1, dim, h, w]
        resized: Tensor = F.interpolate(on_map, size=sizes, mode="bilinear")
        return resized.flatten(2).transpose(1, 2)

    def _convolved(self, conv: nn.Conv2d, v: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """``v``'s heads as images, in channels last for the depthwise convolution's sake."""
        B, N, H, d = v.shape
        heads = torch.unflatten(v.transpose(1, 2), 2, sizes).reshape(B * H, *sizes, d)  # [B H, h, w, d]
        images: Tensor = conv(heads.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B H, h, w, d]
        return images.reshape(B, H, N, d).transpose(1, 2)  # [B, N, H, d]

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}, feature_map={self.feature_map!r}"


class SimplifiedLinearAttention(LinearAttention):
    """SLAB's linear attention: ReLU features, a positional encoding of the keys, a convolution of the values.

    Parameter names and shapes are those of the paper's Swin variants (``qkv``, ``proj``, ``dwc``,
    ``positional_encoding``), so their published weights load.

    Args:
        dim: channels of the input.
        num_heads: number of heads.
        window_size: sizes of the map that the encoding is made for, as in :class:`LinearAttention`.
        qkv_bias: whether ``qkv`` has a bias.
        kernel_size: of the convolution, an odd number.
        proj_drop: dropout of the output, in training.
        device: of the parameters.
        dtype: of the parameters.

    Source: Guo et al., "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
    Re-parameterized Batch Normalization" (2024), section 3.3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: int | tuple[int, int] = 7,
        qkv_bias: bool = True,
        kernel_size: int = 5,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, num_heads, window_size, "relu", qkv_bias, kernel_size, proj_drop, device=device, dtype=dtype
        )


class FocusedLinearAttention(LinearAttention):
    """FLatten's linear attention, with features that keep the norm of all channels of a token.

    Parameter names and shapes are those of the paper's modules for windows (``qkv``, ``proj``, ``dwc``, ``scale``,
    ``positional_encoding``), so their published weights load. As there, the norms are taken over all heads together,
    of queries and keys divided by :math:`\\operatorname{softplus}(\\mathtt{scale})`; PyTorch computes these features.
    ``LinearAttention(feature_map="focused")`` takes the norms in each head, inside the kernel.

    Args:
        dim: channels of the input.
        num_heads: number of heads.
        window_size: sizes of the map that the encoding is made for, as in :class:`LinearAttention`.
        qkv_bias: whether ``qkv`` has a bias.
        focusing_factor: the power, a number greater than 0.
        kernel_size: of the convolution, an odd number.
        proj_drop: dropout of the output, in training.
        device: of the parameters.
        dtype: of the parameters.

    Source: Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention" (2023), section 4, and
    its published code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: int | tuple[int, int] = 7,
        qkv_bias: bool = True,
        focusing_factor: float = 3,
        kernel_size: int = 5,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, num_heads, window_size, "identity", qkv_bias, kernel_size, proj_drop, device=device, dtype=dtype
        )
        if isinstance(focusing_factor, bool) or not isinstance(focusing_factor, (int, float)) or focusing_factor <= 0:
            raise RuntimeError(
                f"vitkernels.nn.FocusedLinearAttention: focusing_factor is {focusing_factor!r}, takes a number greater "
                "than 0"
            )
        self.focusing_factor = focusing_factor
        self.scale = nn.Parameter(torch.zeros(1, 1, dim, device=device, dtype=dtype))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self._focused(q).to(v.dtype), self._focused(k).to(v.dtype)  # [B, N, H, d]
        return linear_attention(q, k, v, feature_map="identity", eps=self.eps)

    def _focused(self, t: Tensor) -> Tensor:
        wide = torch.promote_types(t.dtype, torch.float32)
        u = (t.flatten(2).to(wide).relu() + 1e-6) / F.softplus(self.scale.to(wide))  # [B, N, dim]
        # The largest channel divides out again; without it high powers overflow, and it needs no gradient.
        base = u / u.detach().amax(-1, keepdim=True) if self.focusing_factor > 3 else u
        powers = base**self.focusing_factor
        features: Tensor = powers * (u.norm(dim=-1, keepdim=True) / powers.norm(dim=-1, keepdim=True))
        return features.view(t.shape)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}, focusing_factor={self.focusing_factor}"


class LinearAngularAttention(nn.Module):
    r"""Linear attention by the angle of queries and keys, without a denominator: Castling-ViT's and ShiftAddViT's.

    Every token's :math:`\frac12 v_i + \frac1\pi \hat q_i \sum_j \hat k_j^T v_j`, with unit vectors :math:`\hat q`,
    :math:`\hat k`, is divided by its norm in each head; a convolution of the values along the tokens (``dconv``, one
    filter for each head) is added. Parameter names and shapes are those of Castling-ViT's module, without its masked
    softmax branch. ShiftAddViT binarises queries and keys in addition; this is its floating form.

    Args:
        dim: channels of the input.
        num_heads: number of heads.
        qkv_bias: whether ``qkv`` has a bias.
        res_kernel_size: of ``dconv``, an odd number of tokens.
        proj_drop: dropout of the output, in training.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: if ``dim`` is not a multiple of ``num_heads``, or on an even ``res_kernel_size``.

    Source: You et al., "Castling-ViT: Compressing Self-Attention via Switching Towards Linear-Angular Attention"
    (2023), eq. 8; You et al., "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer"
    (2023).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        res_kernel_size: int = 9,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        name = "LinearAngularAttention"
        check_heads(name, "dim", dim, num_heads)
        padding = odd_padding(name, "res_kernel_size", res_kernel_size)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dconv = nn.Conv2d(
            num_heads, num_heads, (res_kernel_size, 1), padding=(padding, 0), groups=num_heads, bias=False, **factory
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, dim)`` to the same."""
        check_input(self, x, "(B, N, dim)")
        if x.shape[1] == 0:
            return x
        q, k, v = torch.unflatten(self.qkv(x), -1, (3, self.num_heads, -1)).unbind(-3)  # [B, N, H, d]
        out = linear_attention(
            q, k, v, feature_map="identity", normalize=False, scale=1 / math.pi, qk_norm="l2", residual_v=0.5
        )
        out = F.normalize(out, dim=-1) + self.dconv(v.transpose(1, 2)).transpose(1, 2)  # [B, N, H, d]
        output: Tensor = self.proj_drop(self.proj(out.flatten(2)))
        return output

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def _held(projection: Tensor, factory: dict[str, Any]) -> Tensor:
    """Of the module's own: who gave it may change it."""
    return projection.detach().to(**factory, copy=True)
