"""Softmax attention between channels instead of tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vitkernels.functional.arguments import check_floating, check_stored, check_tensors, number, whole_number
from vitkernels.functional.score import of_each_head
from vitkernels.functional.words import Words
from vitkernels.ops.attention import allow_tf32, statistics_dtype
from vitkernels.ops.linear_attention import linear_attention as _linear_attention

__all__ = ["channel_attention"]

_OP = "channel_attention"
# What the two calls of the operator call what the caller gave.
_OF_PRODUCTS = Words(_OP, {"key": "query", "value": "key"})
_OF_WEIGHTS = Words(_OP, {"query": "value", "value": "query, key, scale"})
_NORM_EPSILON = 1e-12  # torch.nn.functional.normalize's
_PLAIN = (0, 1, False, 0.0, 1.0, 0.0)  # products of the data themselves: no features, denominator or residual


def channel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | Tensor | None = None,
    qk_norm: Literal["l2"] | None = None,
    groups: int | None = None,
) -> Tensor:
    r"""Attention of every channel of a head to all channels of that head, over all tokens.

    .. math::
        o_{nc} = \sum_{c'} \operatorname{softmax}_{c'}\Big(s_h \sum_m q_{mc} \, k_{mc'}\Big) \, v_{nc'}

    Args:
        query: ``(B, N, heads, d)``.
        key: ``(B, N, heads, dv)``.
        value: ``(B, M, heads, dv)``.
        scale: factor on the logits, a number or a differentiable tensor, ``(heads,)``, ``(1,)`` or ``()`` (XCiT's
            temperature). Default ``d ** -0.5``.
        qk_norm: ``"l2"`` divides every channel of query and key by its Euclidean norm over the tokens first.
        groups: divide the channels of all heads into so many groups instead, of equally many channels.

    All tensors may have any strides as long as the last one is 1. The dtypes are those of :func:`vitkernels.attention`;
    the logits are float32 (float64 for float64). On the CPU. DaViT calls its keys, values and queries what are the
    query, the key and the value here.

    Returns:
        ``(B, M, heads, d)`` in the dtype of ``query``, with the same bits in every run, gradients included.

    A NaN or infinity in a token reaches all tokens.

    Raises:
        RuntimeError: on a wrong rank, dtype, device, size or option, naming the argument and what it takes.

    Source: Ding et al., "DaViT: Dual Attention Vision Transformers" (2022), eq. 4; ``qk_norm``: El-Nouby et al., "XCiT:
    Cross-Covariance Image Transformers" (2021), eq. 3.
    """
    check_tensors(_OP, query=query, key=key, value=value)
    _check_shapes(query, key, value)
    check_stored(_OP, query=query, key=key, value=value)
    if groups is not None:
        query, key, value = (_grouped(name, t, groups) for name, t in _named(query, key, value))
    if qk_norm not in (None, "l2"):
        raise RuntimeError(f"vitkernels::{_OP}: qk_norm is {qk_norm!r}, takes None or 'l2'")
    heads, d, dv = query.shape[2], query.shape[3], key.shape[3]
    # The state of linear attention without queries is the product over the tokens.
    no_queries = query.new_empty(query.shape[0], 0, heads, d)
    products = _call(_OF_PRODUCTS, no_queries, query, key)[1][..., :dv]
    if qk_norm == "l2":
        products = products / _norms(query).unsqueeze(-1) / _norms(key).unsqueeze(-2)  # [B, H, d, dv]
    if isinstance(scale, Tensor):
        scale = of_each_head(_OP, query, scale)
        if scale.shape != (heads,):
            raise RuntimeError(f"vitkernels::{_OP}: scale has shape {tuple(scale.shape)}, takes ({heads},)")
        logits = products * scale[:, None, None]
    elif scale is None:
        logits = products * d**-0.5
    else:
        logits = products * number(_OP, "scale", scale, statistics_dtype(query.dtype))
    weights = logits.softmax(-1)  # [B, H, d, dv]
    # Read from a state: that of the weights' channels as keys, each with itself as its feature.
    one_each = torch.eye(dv, dtype=value.dtype, device=value.device)[None, :, None].expand(
        value.shape[0], -1, heads, -1
    )
    by_channel = weights.to(value.dtype).permute(0, 3, 1, 2)  # [B, dv, H, d]
    return _call(_OF_WEIGHTS, value, one_each, by_channel)[0]


def _call(words: Words, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    try:
        found: tuple[Tensor, Tensor] = _linear_attention(query, key, value, *_PLAIN, allow_tf32(query))
    except RuntimeError as error:
        raise words.of(error, "linear_attention") from None
    return found


def _named(query: Tensor, key: Tensor, value: Tensor) -> tuple[tuple[str, Tensor], ...]:
    return ("query", query), ("key", key), ("value", value)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    device = query.device.type
    is_cast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    for name, t in _named(query, key, value):
        check_floating(_OP, name, t)
        if t.dim() != 4:
            raise RuntimeError(f"vitkernels::{_OP}: {name} has shape {tuple(t.shape)}, takes (B, tokens, heads, d)")
        if t.dtype != query.dtype and not is_cast:
            raise RuntimeError(f"vitkernels::{_OP}: {name} is {t.dtype}, takes query's {query.dtype}")
        if t.device != query.device:
            raise RuntimeError(f"vitkernels::{_OP}: {name} is on {t.device}, takes query's device ({query.device})")
        if t.shape[0] != query.shape[0] or t.shape[2] != query.shape[2]:
            raise RuntimeError(
                f"vitkernels::{_OP}: {name} has shape {tuple(t.shape)}, takes query's batch size ({query.shape[0]}) "
                f"and number of heads ({query.shape[2]})"
            )
    if key.shape[1] != query.shape[1]:
        raise RuntimeError(
            f"vitkernels::{_OP}: key has shape {tuple(key.shape)}, takes query's number of tokens ({query.shape[1]})"
        )
    if value.shape[3] != key.shape[3]:
        raise RuntimeError(
            f"vitkernels::{_OP}: value has shape {tuple(value.shape)}, takes key's head dimension ({key.shape[3]})"
        )
    for name, t in _named(query, key, value):
        if t.shape[2] == 0 or t.shape[3] == 0:
            raise RuntimeError(f"vitkernels::{_OP}: {name} has shape {tuple(t.shape)}, takes one channel or more")


def _grouped(name: str, t: Tensor, groups: int) -> Tensor:
    count = whole_number(_OP, "groups", groups)
    channels = t.shape[2] * t.shape[3]
    if count < 1 or channels % count != 0:
        raise RuntimeError(f"vitkernels::{_OP}: groups is {groups}, takes a divisor of {name}'s {channels} channels")
    return torch.unflatten(t.flatten(2), 2, (count, -1))


def _norms(t: Tensor) -> Tensor:
    """Of each channel over the tokens, ``(B, heads, d)``, in the precision of the statistics."""
    norms: Tensor = torch.linalg.vector_norm(t, dim=1, dtype=statistics_dtype(t.dtype))
    # Of zeros, whose gradient would be divided by the epsilon, which float16 does not hold.
    return torch.where(norms == 0.0, 1.0, norms.clamp(min=_NORM_EPSILON))
