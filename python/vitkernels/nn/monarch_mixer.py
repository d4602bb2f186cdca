"""Monarch Mixer: long convolutions with gates for attention, and Monarch matrices for the weights of the MLP."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkernels.functional import long_conv
from vitkernels.nn.hooks import is_as_made
from vitkernels.nn.long_filters import ExplicitFilter, ImplicitFilter
from vitkernels.nn.maps import check_input, check_stored_input, integers
from vitkernels.nn.monarch import MonarchLinear

__all__ = ["MonarchMLP", "MonarchMixer"]


class MonarchMixer(nn.Module):
    r"""M2's mixer of tokens, in the place of an attention module: a long convolution between two gates.

    .. math::
        (x_1, x_2, v) = \operatorname{short}(W_{in} x), \qquad
        y = W_{out} \, (x_2 \odot (h * (x_1 \odot v)) + h_2 * x)

    ``short`` is a convolution of each channel with three taps, those of a token and of the two before it, in both
    directions of ``h`` too: the mixer has an order of tokens, and needs no positional encoding. ``h`` has a tap for
    every lag; ``h_2`` is there with ``residual_long_conv`` only.

    Parameter and buffer names and shapes are those of HazyResearch's ``MonarchMixerSequenceMixing``, whose files load.
    What differs: the frequencies of the sines, one parameter there, are one of each layer; ``filter_fn.pos_emb.z`` is a
    buffer, where theirs learns at a rate of 1e-5; the filter's dropout, which is without effect there, and the norm and
    dropout of ``hyena_training_additions`` are left out; the result is a tensor, not a pair.

    Args:
        dim: channels of the input.
        max_length: the largest number of tokens.
        is_causal: whether a token sees those before it alone.
        nblocks: blocks of the factors of ``in_linear`` and ``out_linear``, which are :class:`MonarchLinear`.
            ``None``: dense layers, as in M2-BERT.
        filter: ``"implicit"``: an MLP of the position with sines between its layers, times an exponential decay, in
            float32 or float64, also under autocast and in modules of 16 bits, where its parameters stay float32: of
            rounded frequencies, sines of sines would be another filter. ``"explicit"``: a parameter for each tap
            (``filter_fn.weight``), not of M2.
        residual_long_conv: whether there is ``h_2``; ``filter_fn2``.
        filter_emb_dim: features of a position that the MLP sees, an odd number from 3 on.
        filter_order: width of the MLP.
        filter_freq: initial frequency of its sines.
        proj_drop: dropout of the output, in training.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: on an option out of range.

    Source: Fu et al., "Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture" (2023), section 5 and its
    published code; the filter: Poli et al., "Hyena Hierarchy: Towards Larger Convolutional Language Models" (2023),
    section 3.3.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        is_causal: bool = False,
        nblocks: int | None = None,
        filter: str = "implicit",
        residual_long_conv: bool = False,
        filter_emb_dim: int = 5,
        filter_order: int = 128,
        filter_freq: float = 10.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, n in (("dim", dim), ("max_length", max_length), ("filter_order", filter_order)):
            integers("MonarchMixer", name, n, 1)
        integers("MonarchMixer", "filter_emb_dim", filter_emb_dim, 1, at_least=3)
        _refuse("filter_emb_dim", filter_emb_dim, "an odd number", filter_emb_dim % 2 == 0)
        _refuse("is_causal", is_causal, "True or False", not isinstance(is_causal, bool))
        is_flag = isinstance(residual_long_conv, bool)
        _refuse("residual_long_conv", residual_long_conv, "True or False", not is_flag)
        _refuse("filter", filter, "'implicit' or 'explicit'", filter not in ("implicit", "explicit"))
        is_number = isinstance(filter_freq, (int, float)) and not isinstance(filter_freq, bool)
        _refuse("filter_freq", filter_freq, "a finite number", not is_number or not math.isfinite(filter_freq))
        self.dim, self.max_length, self.is_causal = dim, max_length, is_causal
        self.nblocks, self.filter = nblocks, filter

        def long_filter() -> nn.Module:
            if filter == "explicit":
                return ExplicitFilter(dim, max_length, is_causal, **factory)
            return ImplicitFilter(dim, max_length, is_causal, filter_emb_dim, filter_order, filter_freq, **factory)

        self.filter_fn = long_filter()
        self.filter_fn2 = long_filter() if residual_long_conv else None
        self.in_linear = _projection(dim, 3 * dim, nblocks, **factory)
        self.out_linear = _projection(dim, dim, nblocks, **factory)
        self.short_filter = _ShortFilter(3 * dim, 3 * dim, 3, groups=3 * dim, padding=2, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Mix the tokens of each sequence.

        Args:
            x: ``(B, N, dim)`` with N up to ``max_length``.
            attn_mask: ``None``, which the blocks of timm pass.
            is_causal: as ``attn_mask``; ``True`` asks for what a mixer is that was made with ``is_causal``.

        Returns:
            The shape of ``x``.

        Raises:
            RuntimeError: if ``x`` has another shape than that, or on a mask, or if the mixer is not causal.
        """
        layout = f"(B, N, {self.dim})"
        check_input(self, x, layout)
        length = x.shape[1]
        if x.shape[2] != self.dim or length > self.max_length:
            takes = f"{layout} with N up to max_length ({self.max_length})"
            raise RuntimeError(f"vitkernels.nn.MonarchMixer: x has shape {tuple(x.shape)}, takes {takes}")
        if attn_mask is not None:
            what = f"attn_mask is a {type(attn_mask).__name__}"
            raise RuntimeError(f"vitkernels.nn.MonarchMixer: {what}, takes None: a long convolution has no mask")
        _refuse("is_causal", is_causal, "False where the mixer was made without it", is_causal and not self.is_causal)
        projected: Tensor = self.in_linear(x)  # [B, N, 3 dim]
        if length == 0:
            out: Tensor = self.out_linear(projected[..., : self.dim])
            return out
        x1, x2, v = self.short_filter(projected).chunk(3, -1)  # [B, N, dim]
        out = self._convolved(self.filter_fn, x1 * v) * x2  # [B, N, dim]
        if self.filter_fn2 is not None:
            out = out + self._convolved(self.filter_fn2, x.to(out.dtype))
        output: Tensor = self.proj_drop(self.out_linear(out))
        return output

    def _convolved(self, filter_fn: nn.Module, tokens: Tensor) -> Tensor:
        taps = filter_fn(tokens.shape[1]).to(tokens.dtype)  # [dim, M]
        return long_conv(tokens.mT, taps, is_causal=self.is_causal).mT  # [B, N, dim]

    def extra_repr(self) -> str:
        options = f"dim={self.dim}, max_length={self.max_length}, is_causal={self.is_causal}"
        return f"{options}, nblocks={self.nblocks}, filter={self.filter!r}"


class MonarchMLP(nn.Module):
    """M2's mixer of channels: two layers with Monarch weights and GELU between.

    ``fc1`` and ``fc2`` are the names of timm's ``Mlp``, but their weights are those of :class:`MonarchLinear`. (M2-BERT
    has a gated MLP of the same layers.) Where no gradient is recorded, GELU is computed of the product before it is
    rounded to the dtype, so outputs differ in the last bits from those with gradients.

    Args:
        dim: channels of the input and the output.
        hidden_dim: channels between the layers, default four times ``dim``.
        nblocks: blocks of each Monarch factor.
        bias: whether the layers have biases.
        drop: dropout behind GELU and of the output, in training.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: on sizes out of range.

    Source: Fu et al., "Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture" (2023), section 5.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        nblocks: int = 4,
        bias: bool = True,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        integers("MonarchMLP", "dim", dim, 1)
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        integers("MonarchMLP", "hidden_dim", hidden_dim, 1)
        integers("MonarchMLP", "nblocks", nblocks, 1)
        self.dim = dim
        self.fc1 = MonarchLinear(dim, hidden_dim, nblocks, bias, **factory)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = MonarchLinear(hidden_dim, dim, nblocks, bias, **factory)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., dim)`` to the same."""
        layout = f"(..., {self.dim})"
        check_stored_input(self, x, layout)
        if x.dim() == 0 or x.size(-1) != self.dim:
            raise RuntimeError(f"vitkernels.nn.MonarchMLP: x has shape {tuple(x.shape)}, takes {layout}")
        # In one pass, unless a gradient is recorded, whose backward would repeat a product to have GELU's argument.
        is_one_pass = not torch.is_grad_enabled() and is_as_made(self.fc1, MonarchLinear)
        hidden = self.fc1(x, "gelu") if is_one_pass else F.gelu(self.fc1(x))
        out: Tensor = self.drop2(self.fc2(self.drop1(hidden)))
        return out


class _ShortFilter(nn.Conv1d):
    """A depthwise convolution of tokens ``(B, N, channels)`` that sees those before."""

    def forward(self, tokens: Tensor) -> Tensor:
        # PyTorch's convolutions of signals take five times as long as those of a map of one row in channels last.
        padding = 2
        if torch.is_grad_enabled() and tokens.requires_grad:
            # A copy, but the backward of a convolution with padding takes ten times as long in bfloat16.
            tokens, padding = F.pad(tokens, (0, 0, 2, 0)), 0  # [B, N + 2, channels]
        row = tokens.mT.unsqueeze(2)  # [B, channels, 1, N or N + 2]
        weight = self.weight.unsqueeze(2)  # [channels, 1, 1, 3]
        out = F.conv2d(row, weight, self.bias, padding=(0, padding), groups=self.groups)  # [B, channels, 1, N or N + 2]
        out = out.squeeze(2).mT  # [B, N or N + 2, channels]
        return out[:, : tokens.shape[1]] if padding else out


def _projection(inputs: int, outputs: int, nblocks: int | None, **factory: Any) -> nn.Module:
    if nblocks is None:
        return nn.Linear(inputs, outputs, **factory)
    integers("MonarchMixer", "nblocks", nblocks, 1)
    return MonarchLinear(inputs, outputs, nblocks, **factory)


def _refuse(name: str, option: object, takes: str, is_wrong: bool) -> None:
    if is_wrong:
        raise RuntimeError(f"vitkernels.nn.MonarchMixer: {name} is {option!r}, takes {takes}")
