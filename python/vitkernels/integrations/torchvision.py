"""torchvision: the attention of Swin and Swin V2, whose input is the map already."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkernels.integrations.shapes import split_last
from vitkernels.integrations.swap import Fused, Swaps
from vitkernels.integrations.windows import Projections, attend_in_windows, cosine_terms

__all__ = ["FUSED", "SWAPS", "CosineWindowAttention", "WindowAttention", "replace", "restore", "suspend"]


class WindowAttention(Fused):
    """Swin: a bias from a table."""

    operator = "spatial_attention"
    dropout_attribute = "attention_dropout"
    attributes: ClassVar[tuple[str, ...]] = (
        "qkv", "num_heads", "window_size", "shift_size", "proj", "dropout", "relative_position_bias_table",
    )  # fmt: skip

    def attend(self, x: Tensor) -> Tensor:
        sizes = zip(x.shape[1:3], self.window_size, self.shift_size, strict=True)
        shift = [shift if n > window else 0 for n, window, shift in sizes]
        out = attend_in_windows(x, self.window_size, shift, self._project, **self._terms())
        return F.dropout(self.proj(out), self.dropout, self.training)

    def _project(self, x: Tensor) -> Projections:
        q, k, v = split_last(self._packed(x), 3, self.num_heads, -1).unbind(3)
        return q, k, v

    def _packed(self, x: Tensor) -> Tensor:
        return self.qkv(x)  # type: ignore[no-any-return]

    def _terms(self) -> dict[str, Any]:
        return {"bias_table": self.relative_position_bias_table}


class CosineWindowAttention(WindowAttention):
    """Swin V2: cosine attention, a bias from an MLP, keys without a bias."""

    attributes = (
        "qkv", "num_heads", "window_size", "shift_size", "proj", "dropout", "logit_scale", "cpb_mlp",
        "relative_coords_table",
    )  # fmt: skip

    def _packed(self, x: Tensor) -> Tensor:
        if self.qkv.bias is None:
            return self.qkv(x)  # type: ignore[no-any-return]
        q, k, v = self.qkv.bias.chunk(3)
        return F.linear(x, self.qkv.weight, torch.cat((q, torch.zeros_like(k), v)))  # as the stock forward reads them

    def _terms(self) -> dict[str, Any]:
        return cosine_terms(self.logit_scale, self.cpb_mlp(self.relative_coords_table))


_SWIN = "torchvision.models.swin_transformer"

#: Name of the accelerated class -> torchvision's class, and the forward that goes before it.
FUSED: dict[str, tuple[str, type[Fused]]] = {
    "FusedShiftedWindowAttention": (f"{_SWIN}.ShiftedWindowAttention", WindowAttention),
    "FusedShiftedWindowAttentionV2": (f"{_SWIN}.ShiftedWindowAttentionV2", CosineWindowAttention),
}

SWAPS = Swaps(__name__, FUSED)
__getattr__ = SWAPS.getattr
replace, restore, suspend = SWAPS.replace, SWAPS.restore, SWAPS.suspend
