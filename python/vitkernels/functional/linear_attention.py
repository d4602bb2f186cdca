"""Attention without a softmax: linear in the number of tokens."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from vitkernels.feature_map import FeatureMap, encode, random_features
from vitkernels.functional.arguments import check_flag, check_floating, check_rank, check_tensors, number
from vitkernels.functional.score import normalized
from vitkernels.ops.attention import allow_tf32, statistics_dtype
from vitkernels.ops.linear_attention import linear_attention as _linear_attention

__all__ = ["linear_attention"]

_OP = "linear_attention"


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str | FeatureMap = "relu",
    normalize: bool = True,
    eps: float = 1e-6,
    scale: float = 1.0,
    qk_norm: Literal["l2"] | None = None,
    residual_v: float = 0.0,
) -> Tensor:
    r"""Attention of every query to every key by products of features, without any matrix of size queries times keys.

    .. math::
        o_i = \frac{s \, \varphi(q_i) \sum_j \varphi(k_j)^T v_j}{s \, \varphi(q_i) \cdot \sum_j \varphi(k_j) + \epsilon}
        + r \, v_i

    The sums over the keys are float32 (float64 for float64), and the features are never stored.

    Args:
        query: ``(B, Nq, heads, d)``.
        key: ``(B, Nk, kv_heads, d)``; ``heads`` must be a multiple of ``kv_heads``.
        value: ``(B, Nk, kv_heads, dv)``; ``dv`` may differ from ``d``.
        feature_map: :math:`\varphi`: ``"identity"``, ``"relu"``, ``"elu"``, ``"exp"``, ``"focused"``, or a
            :class:`vitkernels.FeatureMap`, which has options.
        normalize: whether there is a denominator.
        eps: :math:`\epsilon` of the denominator. Where that is 0 all the same, so is the output.
        scale: :math:`s`, a number.
        qk_norm: ``"l2"`` divides every query and key by its Euclidean norm first.
        residual_v: :math:`r`; not 0 only where there are as many queries as keys. With ``feature_map="identity"``,
            ``qk_norm="l2"``, ``normalize=False``, ``scale=1 / math.pi`` and 0.5 here this is linear-angular attention.

    All three tensors may have any strides as long as the last one is 1. The dtypes are those of
    :func:`vitkernels.attention`. On the CPU, and on CUDA up to a head dimension of 128 in bfloat16 and of 64 in
    float32, which float16 becomes there, and bfloat16 for ``"focused"``. Positive random features are made by PyTorch
    before the kernel.

    Returns:
        ``(B, Nq, heads, dv)`` in the dtype of ``query``, with the same bits in every run, gradients included.

    A NaN or infinity in a key or value reaches all queries.

    Raises:
        RuntimeError: on a wrong rank, dtype, device, size or option, naming the argument and what it takes.

    Source: Katharopoulos et al., "Transformers are RNNs" (2020), eq. 5; ``residual_v``: You et al., "Castling-ViT:
    Compressing Self-Attention via Switching Towards Linear-Angular Attention" (2023), eq. 8.
    """
    op = _OP
    check_tensors(op, query=query, key=key, value=value)
    check_rank(op, query=query, key=key, value=value)
    check_flag(op, "normalize", normalize)
    chosen, code = encode(op, feature_map)
    statistics = statistics_dtype(query.dtype)
    numbers = (_number(op, *each, statistics) for each in (("eps", eps), ("scale", scale), ("residual_v", residual_v)))
    eps, scale, residual = numbers
    if qk_norm is not None:
        if qk_norm != "l2":
            raise RuntimeError(f"vitkernels::{op}: qk_norm is {qk_norm!r}, takes None or 'l2'")
        query, key = normalized(op, "query", query), normalized(op, "key", key)
    options = code, chosen.power, normalize, eps, scale, residual
    if chosen.projection is not None:
        return _by_random_features(query, key, value, chosen.projection, options)
    out: Tensor = _linear_attention(query, key, value, *options, allow_tf32(query))[0]
    return out


def _by_random_features(
    query: Tensor, key: Tensor, value: Tensor, projection: Tensor, options: tuple[object, ...]
) -> Tensor:
    """The features stay in the precision in which they are made, and so do the values."""
    device, dtype = query.device.type, query.dtype
    is_cast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    _check_for_features(projection, is_cast, query=query, key=key, value=value)
    if is_cast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False) if is_cast else nullcontext():
        q, k = (random_features(_OP, name, t, projection) for name, t in (("query", query), ("key", key)))
        out: Tensor = _linear_attention(q, k, value.to(q.dtype), *options, allow_tf32(q))[0]
    return out.to(dtype)


def _number(op: str, name: str, value: object, dtype: torch.dtype) -> float:
    """A tensor would lose its gradient."""
    if isinstance(value, Tensor):
        check_tensors(op, **{name: value})
        raise RuntimeError(f"vitkernels::{op}: {name} is a tensor, takes a number")
    return number(op, name, value, dtype)


def _check_for_features(projection: Tensor, is_cast: bool, **data: Tensor) -> None:
    """What the operator would refuse, of data that PyTorch converts before."""
    query = data["query"]
    for name, t in data.items():
        check_floating(_OP, name, t)
        if t.dtype != query.dtype and not is_cast:
            raise RuntimeError(f"vitkernels::{_OP}: {name} is {t.dtype}, takes query's {query.dtype}")
        if t.device != projection.device and t.device.type != "meta":
            raise RuntimeError(
                f"vitkernels::{_OP}: {name} is on {t.device}, takes the device of feature_map's projection "
                f"({projection.device})"
            )
