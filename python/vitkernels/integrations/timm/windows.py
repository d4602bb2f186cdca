"""Swin: the blocks whose attention is within shifted windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from vitkernels.integrations.shapes import split_last
from vitkernels.integrations.swap import DROPOUT, SOFTMAX, Fused
from vitkernels.integrations.timm.forward import packed_projection, scale_of
from vitkernels.integrations.windows import Projections, attend_in_windows, cosine_terms, pad_to_windows

__all__ = ["CosineWindowBlock", "WindowBlock"]

_WEIGHTS = {"attn.softmax": SOFTMAX, "attn.attn_drop": DROPOUT}


class WindowBlock(Fused):
    """Swin: a bias from a table, norms before."""

    operator = "spatial_attention"
    dropout_attribute = "attn.attn_drop"
    absorbed: ClassVar = {"attn": ("timm.models.swin_transformer.WindowAttention",), **_WEIGHTS}
    attributes = (
        "norm1", "norm2", "mlp", "drop_path1", "drop_path2", "window_size", "shift_size", "attn", "attn.qkv",
        "attn.num_heads", "attn.scale", "attn.relative_position_bias_table", "attn.proj", "attn.proj_drop",
    )  # fmt: skip

    def attend(self, x: Tensor) -> Tensor:
        table = self.attn.relative_position_bias_table
        out = _attend(self, self.norm1(x), scale=scale_of(self.attn), bias_table=table)
        x = x + self.drop_path1(out)
        return x + self.drop_path2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class CosineWindowBlock(Fused):
    """Swin V2: cosine attention, a bias from an MLP, norms after."""

    operator = "spatial_attention"
    dropout_attribute = "attn.attn_drop"
    absorbed: ClassVar = {"attn": ("timm.models.swin_transformer_v2.WindowAttention",), **_WEIGHTS}
    attributes = (
        "norm1", "norm2", "mlp", "drop_path1", "drop_path2", "window_size", "shift_size", "attn", "attn.qkv",
        "attn.q_bias", "attn.k_bias", "attn.v_bias", "attn.qkv_bias_separate", "attn.num_heads", "attn.logit_scale",
        "attn.cpb_mlp", "attn.relative_coords_table", "attn.proj", "attn.proj_drop",
    )  # fmt: skip

    def attend(self, x: Tensor) -> Tensor:
        terms = cosine_terms(self.attn.logit_scale, self.attn.cpb_mlp(self.attn.relative_coords_table))
        x = x + self.drop_path1(self.norm1(_attend(self, x, **terms)))
        return x + self.drop_path2(self.norm2(self.mlp(x)))  # type: ignore[no-any-return]


def _attend(block: Fused, x: Tensor, **terms: Any) -> Tensor:
    attn, window, shift = block.attn, block.window_size, block.shift_size

    def project(x: Tensor) -> Projections:
        q, k, v = split_last(packed_projection(attn, x), 3, attn.num_heads, -1).unbind(3)
        return q, k, v

    height, width = x.shape[1:3]
    if any(shift) and (height % window[0] or width % window[1]):
        # timm rolls before it pads, so the padding comes after what the shift takes to the end. Rolled back with its
        # padding, such a map is one of shifted windows again.
        x = _rolled(pad_to_windows(_rolled(x, shift, -1), window), shift, 1)
        out = _rolled(attend_in_windows(x, window, shift, project, **terms), shift, -1)
        out = _rolled(out[:, :height, :width], shift, 1)
    else:
        out = attend_in_windows(x, window, shift, project, **terms)
    return attn.proj_drop(attn.proj(out))  # type: ignore[no-any-return]


def _rolled(x: Tensor, shift: Sequence[int], direction: int) -> Tensor:
    return x.roll([direction * n for n in shift], (1, 2))
