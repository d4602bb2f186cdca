"""Between the layouts of the models and the one of the kernels.

A size of -1 is only right where it follows from one axis: from all elements it cannot be found when there are none.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["map_of", "split_last", "tokens_of"]


def split_last(x: Tensor, *sizes: int) -> Tensor:
    """A view ``(*, *sizes)`` of ``x (*, C)``; one of the sizes may be -1."""
    return x.unflatten(-1, sizes)  # type: ignore[no-untyped-call,no-any-return]


def tokens_of(feature_map: Tensor) -> Tensor:
    """``(B, C, H, W)`` as ``(B, H * W, C)`` whose last stride is 1, as the kernel takes it."""
    return feature_map.flatten(2).transpose(1, 2).contiguous()


def map_of(tokens: Tensor, height: int, width: int) -> Tensor:
    """``(B, height * width, *)`` as ``(B, C, height, width)``."""
    return torch.unflatten(tokens.flatten(2).transpose(1, 2), 2, (height, width)).contiguous()
