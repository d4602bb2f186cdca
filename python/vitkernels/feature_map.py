"""What linear attention makes of queries and keys before it multiplies them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["FeatureMap", "encode"]

_NAMES = ("identity", "relu", "elu", "exp", "focused")  # FeatureMap in csrc/linear_attention/linear_attention.h
_MAX_POWER = 16
_ALL = (*_NAMES, "performer")


@dataclass(frozen=True, eq=False)  # tensors have no one answer to ==
class FeatureMap:
    r"""A feature map :math:`\varphi` of :func:`vitkernels.linear_attention`.

    Args:
        name: ``"identity"``; ``"relu"``; ``"elu"``, which is :math:`\operatorname{elu}(x) + 1`; ``"exp"``;
            ``"focused"``, :math:`u^p \, \|u\| / \|u^p\|` with :math:`u = \operatorname{relu}(x) + 10^{-6}` and norms
            over the head dimension; ``"performer"``, positive random features
            :math:`\exp(W x - \|x\|^2 / 2) / \sqrt m`.
        power: :math:`p` of ``"focused"``, an integer from 1 to 16.
        projection: :math:`W` of ``"performer"``, ``(m, d)``. No gradient goes to it.

    Raises:
        RuntimeError: on an unknown name, a power out of range, or a projection that is missing or not wanted.

    Source: ``"relu"``: Cai et al., "EfficientViT" (2023); ``"elu"``: Katharopoulos et al., "Transformers are RNNs"
    (2020), eq. 7; ``"focused"``: Han et al., "FLatten Transformer" (2023), eq. 6; ``"performer"``: Choromanski et al.,
    "Rethinking Attention with Performers" (2021), eq. 5.
    """

    name: str
    power: int = 3
    projection: Tensor | None = None

    def __post_init__(self) -> None:
        op = "vitkernels::FeatureMap"
        if self.name not in _ALL:
            raise RuntimeError(f"{op}: name is {self.name!r}, takes one of {', '.join(map(repr, _ALL))}")
        if type(self.power) is not int or not 1 <= self.power <= _MAX_POWER:
            raise RuntimeError(f"{op}: power is {self.power!r}, takes an integer from 1 to {_MAX_POWER}")
        if self.name == "performer":
            t = self.projection
            is_matrix = isinstance(t, Tensor) and t.layout == torch.strided and t.is_floating_point()
            if t is None or not is_matrix or t.dim() != 2 or t.shape[0] == 0:
                what = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
                raise RuntimeError(f"{op}: projection is {what}, takes a floating tensor (features, d) for 'performer'")
        elif self.projection is not None:
            raise RuntimeError(f"{op}: projection is given, takes None for {self.name!r}")


def encode(op: str, feature_map: Any) -> tuple[FeatureMap, int]:
    """The map that is meant, and the operator's number of it: that of identity for what is computed before."""
    if isinstance(feature_map, str) and feature_map in _NAMES:
        return FeatureMap(feature_map), _NAMES.index(feature_map)
    if not isinstance(feature_map, FeatureMap):
        names = ", ".join(map(repr, _NAMES))
        raise RuntimeError(
            f"vitkernels::{op}: feature_map is {feature_map!r}, takes {names} or a vitkernels.FeatureMap"
        )
    return feature_map, _NAMES.index(feature_map.name) if feature_map.name in _NAMES else 0


def random_features(op: str, name: str, x: Tensor, projection: Tensor) -> Tensor:
    """Performer's, in float32 or better."""
    if projection.size(1) != x.size(-1):
        raise RuntimeError(
            f"vitkernels::{op}: feature_map has a projection of shape {tuple(projection.shape)}, takes "
            f"(features, {x.size(-1)}), the head dimension of {name}"
        )
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # In rows: of strided heads PyTorch would make a product for each token.
    rows = wide.flatten(0, -2)  # [tokens heads, d]
    products = rows @ projection.detach().to(wide).t()  # [tokens heads, m]
    features: Tensor = (products - rows.square().sum(-1, keepdim=True) / 2).exp() * projection.size(0) ** -0.5
    return features.view(*x.shape[:-1], projection.size(0))  # [*, m]
