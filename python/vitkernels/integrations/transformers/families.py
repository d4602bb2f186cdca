"""Attention modules that compute on their own, without the registry: which class is replaced by what."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vitkernels.functional import attention
from vitkernels.integrations.shapes import split_last
from vitkernels.integrations.swap import DROPOUT, Fused, Swaps
from vitkernels.integrations.transformers.windows import CosineWindowLayer, WindowLayer

__all__ = ["FUSED", "SWAPS", "ConvolutionalProjections", "ReducedKeys", "ReducedKeysWithProjection"]


class ConvolutionalProjections(Fused):
    """CvT: a depthwise convolution before each projection, strided for keys and values."""

    dropout_attribute = "dropout"
    absorbed: ClassVar = {"dropout": DROPOUT}
    attributes = (
        "with_cls_token", "convolution_projection_query", "convolution_projection_key",
        "convolution_projection_value", "projection_query", "projection_key", "projection_value", "num_heads",
        "scale", "dropout",
    )  # fmt: skip

    def attend(self, hidden_state: Tensor, height: int, width: int) -> Tensor:
        first, pixels = hidden_state.tensor_split([hidden_state.size(1) - height * width], dim=1)
        feature_map = _feature_map(pixels, height, width)
        q = self.projection_query(self._with_first(first, self.convolution_projection_query(feature_map)))
        k = self.projection_key(self._with_first(first, self.convolution_projection_key(feature_map)))
        v = self.projection_value(self._with_first(first, self.convolution_projection_value(feature_map)))
        q, k, v = (split_last(t, self.num_heads, -1) for t in (q, k, v))
        return attention(q, k, v, scale=self.scale).flatten(2)

    def _with_first(self, first: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat((first, tokens), dim=1) if self.with_cls_token else tokens


class ReducedKeys(Fused):
    """PVT: keys and values from a strided convolution of the map."""

    condition = "stock path with output_attentions"
    dropout_attribute = "dropout"
    absorbed: ClassVar = {"dropout": DROPOUT}
    attributes: ClassVar[tuple[str, ...]] = (
        "query", "key", "value", "num_attention_heads", "sequences_reduction_ratio", "dropout",
    )  # fmt: skip

    def attend(
        self, hidden_states: Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        if output_attentions:
            return self.stock(hidden_states, height, width, output_attentions)  # type: ignore[no-any-return]
        return (self._context(hidden_states, self._source(hidden_states, height, width)),)

    def _source(self, x: Tensor, height: int, width: int) -> Tensor:
        """The tokens that keys and values are made of."""
        if self.sequences_reduction_ratio <= 1:
            return x
        return self.layer_norm(_tokens(self.sequence_reduction(_feature_map(x, height, width))))  # type: ignore[no-any-return]

    def _context(self, x: Tensor, source: Tensor) -> Tensor:
        projected = (self.query(x), self.key(source), self.value(source))
        q, k, v = (split_last(t, self.num_attention_heads, -1) for t in projected)
        return attention(q, k, v).flatten(2)


class ReducedKeysWithProjection(ReducedKeys):
    """PVTv2: or from one of its 7 x 7 average; the output projection is part of the module."""

    dropout_attribute = "attn_drop"
    absorbed: ClassVar = {"attn_drop": DROPOUT}
    attributes = (
        "query", "key", "value", "num_attention_heads", "spatial_reduction_ratio", "linear_attention", "attn_drop",
        "proj", "proj_drop",
    )  # fmt: skip

    def _source(self, x: Tensor, height: int, width: int) -> Tensor:
        if self.linear_attention:
            pooled = self.pool(_feature_map(x, height, width))
            return self.act(self.layer_norm(_tokens(self.spatial_reduction(pooled))))  # type: ignore[no-any-return]
        if self.spatial_reduction_ratio <= 1:
            return x
        return self.layer_norm(_tokens(self.spatial_reduction(_feature_map(x, height, width))))  # type: ignore[no-any-return]

    def _context(self, x: Tensor, source: Tensor) -> Tensor:
        return self.proj_drop(self.proj(super()._context(x, source)))  # type: ignore[no-any-return]


def _feature_map(x: Tensor, height: int, width: int) -> Tensor:
    return torch.unflatten(x.transpose(1, 2), 2, (height, width))


def _tokens(feature_map: Tensor) -> Tensor:
    return feature_map.flatten(2).transpose(1, 2)


_MODELS = "transformers.models"

#: Name of the accelerated class -> transformers' class, and the forward that goes before it.
FUSED: dict[str, tuple[str, type[Fused]]] = {
    "FusedCvtSelfAttention": (f"{_MODELS}.cvt.modeling_cvt.CvtSelfAttention", ConvolutionalProjections),
    "FusedPvtEfficientSelfAttention": (f"{_MODELS}.pvt.modeling_pvt.PvtEfficientSelfAttention", ReducedKeys),
    "FusedPvtV2SelfAttention": (f"{_MODELS}.pvt_v2.modeling_pvt_v2.PvtV2SelfAttention", ReducedKeysWithProjection),
    "FusedSwinLayer": (f"{_MODELS}.swin.modeling_swin.SwinLayer", WindowLayer),
    "FusedSwinv2Layer": (f"{_MODELS}.swinv2.modeling_swinv2.Swinv2Layer", CosineWindowLayer),
}

SWAPS = Swaps(__name__, FUSED)
__getattr__ = SWAPS.getattr
