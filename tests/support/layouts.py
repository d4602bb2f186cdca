"""The same tensor elsewhere in memory, with poison between and around its elements."""

from __future__ import annotations

import torch
from torch import Tensor


def poisoned(shape: list[int], like: Tensor) -> Tensor:
    """A value that makes a stray read visible."""
    return like.new_full(shape, torch.nan if like.is_floating_point() else 2**30)


def padded(tensor: Tensor) -> Tensor:
    """A view into larger memory: two elements before and three after, in every dimension."""
    memory = poisoned([n + 5 for n in tensor.shape], tensor)
    return memory[tuple(slice(2, 2 + n) for n in tensor.shape)].copy_(tensor)


def reordered(tensor: Tensor) -> Tensor:
    """Padded, with the dimensions but the last one in reverse order: (B, N, heads, d) in (heads, N, B, d)."""
    order = [*reversed(range(tensor.dim() - 1)), tensor.dim() - 1][-tensor.dim() :]
    return padded(tensor.permute(order)).permute([order.index(i) for i in range(tensor.dim())])


def spread(tensor: Tensor) -> Tensor:
    """Every other element of the last dimension, after a padding that breaks all alignment."""
    if tensor.dim() == 0:
        return tensor.clone()
    memory = poisoned([*tensor.shape[:-1], 2 * tensor.size(-1) + 1], tensor)
    return memory[..., 1::2].copy_(tensor)


def vast(tensor: Tensor) -> Tensor:
    """Absurd strides where strides have no meaning: in dimensions of length 1, and everywhere in an empty tensor."""
    free = [n == 1 or tensor.numel() == 0 for n in tensor.shape]
    strides = [2**61 + 1 if f else s for f, s in zip(free, tensor.stride(), strict=True)]
    return tensor.as_strided(tensor.shape, strides)


LAYOUTS = [padded, reordered, spread, vast]
