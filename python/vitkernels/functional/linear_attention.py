"""Attention without a softmax: linear in the number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vitkernels._torch_private import surely
from vitkernels.feature_map import FeatureMap, encode, random_features
from vitkernels.functional.arguments import check_flag, check_floating, check_rank, check_tensors, number
from vitkernels.functional.score import normalized
from vitkernels.ops.attention import allow_tf32, statistics_dtype
from vitkernels.ops.linear_attention import linear_attention as _linear_attention
from vitkernels.ops.linear_attention import linear_attention_quadratic as _linear_attention_quadratic

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
    head_map: Tensor | None = None,
) -> Tensor:
    r"""Attention of every query to every key by products of features, without any matrix of size queries times keys.

    .. math::
        o_i = \frac{s \, \varphi(q_i) \sum_j \varphi(k_j)^T v_j}{s \, \varphi(q_i) \cdot \sum_j \varphi(k_j) + \epsilon}
        + r \, v_i

    The sums over the keys are float32 (float64 for float64), and the features are never stored. Where queries and keys
    are so few that this is less work, the CPU multiplies each query with each key instead.

    Args:
        query: ``(B, Nq, heads, d)``.
        key: ``(B, Nk, kv_heads, d)``; ``heads`` must be a multiple of ``kv_heads`` (or see ``head_map``).
        value: ``(B, Nk, kv_heads, dv)``; ``dv`` may differ from ``d``.
        feature_map: :math:`\varphi`: ``"identity"``, ``"relu"``, ``"elu"``, ``"exp"``, ``"focused"``, or a
            :class:`vitkernels.FeatureMap`, which has options.
        normalize: whether there is a denominator.
        eps: :math:`\epsilon` of the denominator. Where that is 0 all the same, so is the output.
        scale: :math:`s`, a number.
        qk_norm: ``"l2"`` divides every query and key by its Euclidean norm first.
        residual_v: :math:`r`; not 0 only where there are as many queries as keys. With ``feature_map="identity"``,
            ``qk_norm="l2"``, ``normalize=False``, ``scale=1 / math.pi`` and 0.5 here this is linear-angular attention.
        head_map: as in :func:`vitkernels.attention`.

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
    check_tensors(_OP, query=query, key=key, value=value)
    check_rank(_OP, query=query, key=key, value=value)
    options = Options(feature_map, normalize, eps, scale, qk_norm, residual_v, head_map)
    return linear(_OP, _linear_attention, query, key, value, (), options)


class Options(NamedTuple):
    """What linear attention takes beside its tensors and their packing."""

    feature_map: str | FeatureMap
    normalize: bool
    eps: float
    scale: float
    qk_norm: Literal["l2"] | None
    residual_v: float
    head_map: Tensor | None


def linear(
    op: str,
    operator: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: tuple[object, ...],
    given: Options,
) -> Tensor:
    """Call ``operator`` for the function ``op``, whose tensors are checked to be tensors."""
    check_flag(op, "normalize", given.normalize)
    if given.head_map is not None:
        check_tensors(op, head_map=given.head_map)
    chosen, code = encode(op, given.feature_map)
    statistics = statistics_dtype(query.dtype)
    eps, scale, residual = (
        _number(op, name, getattr(given, name), statistics) for name in ("eps", "scale", "residual_v")
    )
    if given.qk_norm is not None:
        if given.qk_norm != "l2":
            raise RuntimeError(f"vitkernels::{op}: qk_norm is {given.qk_norm!r}, takes None or 'l2'")
        query, key = normalized(op, "query", query), normalized(op, "key", key)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        options = code, chosen.power, given.normalize, eps, scale, residual, given.head_map, allow_tf32(query)
        if not packing and _is_quadratic(query, key, value):
            out: Tensor = _linear_attention_quadratic(query, key, value, *options)
            return out
        return operator(query, key, value, *packing, *options)[0]

    if chosen.projection is not None:
        return _by_random_features(op, run, query, key, value, chosen.projection)
    return run(query, key, value)


#: Elements of a head's keys and values that stay in the L2 cache, with what becomes of them.
_MAX_QUADRATIC = 1 << 16


def _is_quadratic(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a product for each pair of tokens is less work than a state. On a GPU both wait for memory."""
    if query.device.type != "cpu" or value.dim() != 4:
        return False
    queries, keys, d, dv = query.size(1), key.size(1), query.size(3), value.size(3)
    is_less = surely(queries * keys * (d + dv) <= (queries + keys) * d * dv)
    return is_less and surely(keys > 0) and surely(keys * (d + dv) <= _MAX_QUADRATIC)


def _by_random_features(
    op: str, run: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, projection: Tensor
) -> Tensor:
    """The features stay in the precision in which they are made, and so do the values."""
    device, dtype = query.device.type, query.dtype
    is_cast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    _check_for_features(op, projection, is_cast, query=query, key=key, value=value)
    if is_cast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False) if is_cast else nullcontext():
        q, k = (random_features(op, name, t, projection) for name, t in (("query", query), ("key", key)))
        out = run(q, k, value.to(q.dtype))
    return out.to(dtype)


def _number(op: str, name: str, value: object, dtype: torch.dtype) -> float:
    """A tensor would lose its gradient."""
    if isinstance(value, Tensor):
        check_tensors(op, **{name: value})
        raise RuntimeError(f"vitkernels::{op}: {name} is a tensor, takes a number")
    return number(op, name, value, dtype)


def _check_for_features(op: str, projection: Tensor, is_cast: bool, **data: Tensor) -> None:
    """What the operator would refuse, of data that PyTorch converts before."""
    query = data["query"]
    for name, t in data.items():
        check_floating(op, name, t)
        if t.dtype != query.dtype and not is_cast:
            raise RuntimeError(f"vitkernels::{op}: {name} is {t.dtype}, takes query's {query.dtype}")
        if t.device != projection.device and t.device.type != "meta":
            raise RuntimeError(
                f"vitkernels::{op}: {name} is on {t.device}, takes the device of feature_map's projection "
                f"({projection.device})"
            )
