"""The score of a call and its keys: every argument of them, and what operators take for them, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from vitkernels._torch_private import sizes_are_tensors
from vitkernels.functional.arguments import (
    check_floating,
    check_stored,
    check_tensors,
    converted,
    held_in_trace,
    in_statistics_dtype,
    number,
    whole_number,
)
from vitkernels.functional.merge_attentions import merge_attentions
from vitkernels.functional.rel_pos import embeddings
from vitkernels.functional.words import Words
from vitkernels.ops import attention as _ops

__all__ = [
    "Options",
    "Outside",
    "PackedOptions",
    "Score",
    "ScoreOptions",
    "SpatialOptions",
    "in_options",
    "normalized",
    "of_each_head",
    "operands",
    "with_additional_keys",
]

Outside = Literal["zero"] | tuple[Tensor, Tensor]


class _AnyOptions(TypedDict, total=False):
    scale: float | Tensor | None
    qk_norm: Literal["l2"] | None
    key_bias: Tensor | None
    head_map: Tensor | None


class PackedOptions(_AnyOptions, total=False):
    """Of sequences: options that mean what they mean in :func:`vitkernels.attention`."""

    bias: Tensor | None
    multiplier: Tensor | None


class Options(_AnyOptions, total=False):
    """Of windows: options that mean what they mean in :func:`vitkernels.spatial_attention`."""

    multiplier_table: Tensor | None
    rel_pos: Sequence[Tensor] | None
    additional_keys: Tensor | None
    additional_values: Tensor | None


class ScoreOptions(PackedOptions, Options, total=False):
    """Of :func:`vitkernels.attention`."""

    bias_table: Tensor | None
    num_prefix_tokens: int


class SpatialOptions(Options, total=False):
    """Of :func:`vitkernels.spatial_attention`."""

    bias_table: Tensor | None
    outside: Outside | None
    radius: float | None


class Score(NamedTuple):
    """What a call was given. What its function does not take is as if it had not been given."""

    scale: float | Tensor | None = None
    qk_norm: Literal["l2"] | None = None
    bias: Tensor | None = None
    key_bias: Tensor | None = None
    multiplier: Tensor | None = None
    bias_table: Tensor | None = None
    multiplier_table: Tensor | None = None
    rel_pos: Sequence[Tensor] | None = None
    num_prefix_tokens: int = 0
    head_map: Tensor | None = None
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None
    outside: Outside | None = None
    radius: float | None = None


#: A query and its keys, the fragments of the score and of the keys as csrc/schema.cpp has them, additional keys.
Operands = tuple[Tensor, Tensor, tuple[Any, ...], tuple[Any, ...], Tensor | None]

_TERMS = Score._fields[2:7]  # bias to multiplier_table
_OPTIONS = Options.__optional_keys__
_NO_EMBEDDINGS = (None,) * 3
_EPSILON = 1e-12  # torch.nn.functional.normalize's
_NO_MAP = (0.0, False, None, None)  # radius, has_outside, key_fill, value_fill
_NO_TERMS = (None,) * len(_TERMS) + _NO_EMBEDDINGS


def operands(op: str, query: Tensor, key: Tensor, value: Tensor, score: Score, num_axes: int | None = None) -> Operands:
    """Raise on what no operator sees, and bring the arguments of a call into the form that operators take.

    ``num_axes`` is that of the grid, where something else than its tables says it.
    """
    scale, qk_norm, *tensors, rel_pos, num_prefix_tokens, head_map, extra_keys, extra_values, outside, radius = score
    key_fill, value_fill, factor, head_scale = None, None, 1.0, None
    if head_map is not None:
        check_tensors(op, head_map=head_map)
    if extra_keys is not None or extra_values is not None:
        _check_additional(op, value, extra_keys, extra_values)
    if radius is None:
        radius = 0.0
    else:
        query = held_in_trace(op, query, radius=radius)
        radius = number(op, "radius", radius, torch.float64)
        if radius <= 0.0:
            raise RuntimeError(f"vitkernels::{op}: radius is {radius}, takes a positive number or None")
    if outside is not None and not (isinstance(outside, str) and outside == "zero"):
        key_fill, value_fill = _fills(op, query, outside)
    shape = query.shape
    if len(shape) > 3 and shape[0] == 1 and len(shape) == key.dim() and key.size(0) != 1:
        query = query.expand(key.size(0), *shape[1:])
    if qk_norm is not None:
        if qk_norm != "l2":
            raise RuntimeError(f"vitkernels::{op}: qk_norm is {qk_norm!r}, takes None or 'l2'")
        if not norms_in_operator(score, num_axes):
            query, key = normalized(op, "query", query), normalized(op, "key", key)
        key_fill = None if key_fill is None else normalized(op, "outside[0]", key_fill)
        extra_keys = None if extra_keys is None else normalized(op, "additional_keys", extra_keys)
    if isinstance(scale, Tensor):
        head_scale = of_each_head(op, query, scale)
    elif scale is not None:
        factor = number(op, "scale", scale, _ops.statistics_dtype(query.dtype))
    elif shape and shape[-1]:
        factor = (int(shape[-1]) if sizes_are_tensors() else shape[-1]) ** -0.5
    for i, term in enumerate(tensors):
        if term is not None:
            check_tensors(op, **{_TERMS[i]: term})
            tensors[i] = in_statistics_dtype(op, query, _TERMS[i], term)
    if type(num_prefix_tokens) is not int:
        query = held_in_trace(op, query, num_prefix_tokens=num_prefix_tokens)
        num_prefix_tokens = whole_number(op, "num_prefix_tokens", num_prefix_tokens)
    by_axis = _NO_EMBEDDINGS if rel_pos is None else embeddings(op, query, rel_pos, num_axes or _axes_of(score))
    keys = (head_map, radius, outside is not None, key_fill, value_fill)
    return query, key, (factor, head_scale, *tensors, *by_axis, num_prefix_tokens), keys, extra_keys


def norms_in_operator(score: Score, num_axes: int | None) -> bool:
    """Whether ``qk_norm`` is an argument of the operator. With additional keys, two operators read the unit vectors."""
    return num_axes is not None and score.additional_keys is None


def of_each_head(op: str, query: Tensor, scale: Tensor) -> Tensor:
    """A tensor ``scale`` as operators take it, ``(heads,)``; one number stands for all heads."""
    check_tensors(op, scale=scale)
    scale = in_statistics_dtype(op, query, "scale", scale)
    if scale.dim() == 0 or (scale.dim() == 1 and scale.size(0) == 1 and query.dim() > 1):
        check_stored(op, scale=scale)
        scale = scale.expand(query.shape[-2:-1])
    return scale


def in_options(function: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raise, as Python would for ``function``, unless all of ``options`` are in :class:`Options`."""
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return options


def _axes_of(score: Score) -> int | None:
    """How many axes the grid of the tables has."""
    tables = [t for t in (score.bias_table, score.multiplier_table) if t is not None]
    return tables[0].dim() - 1 if tables else None


def _check_additional(op: str, value: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
    if keys is None or values is None:
        raise RuntimeError(f"vitkernels::{op}: additional_keys and additional_values must be given together")
    check_tensors(op, additional_keys=keys, additional_values=values)
    if values.shape[-1:] != value.shape[-1:]:
        raise RuntimeError(
            f"vitkernels::{op}: additional_values has shape {tuple(values.shape)}, takes value's head dimension "
            f"({value.shape[-1]}) as its last"
        )


def _fills(op: str, query: Tensor, outside: Outside) -> list[Tensor]:
    """The operator's ``key_fill`` and ``value_fill``."""
    if not isinstance(outside, (list, tuple)) or [isinstance(t, Tensor) for t in outside] != [True, True]:
        raise RuntimeError(f"vitkernels::{op}: outside is {outside!r}, takes None, 'zero' or (key_fill, value_fill)")
    for i, fill in enumerate(outside):
        check_tensors(op, **{f"outside[{i}]": fill})
    return [converted(op, f"outside[{i}]", fill, query.dtype) for i, fill in enumerate(outside)]


def normalized(op: str, name: str, t: Tensor) -> Tensor:
    """``t`` divided by its Euclidean norm over the last dimension. (float16 would hold neither norm nor epsilon.)

    As ``torch.nn.functional.normalize``, but where that has the gradient of zeros divided by its epsilon, which float16
    does not hold, they are divided by one.
    """
    check_floating(op, name, t)
    check_stored(op, **{name: t})
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / torch.where(norm == 0.0, 1.0, norm.clamp(min=_EPSILON))).to(t.dtype)


def with_additional_keys(
    words: Words, found: Sequence[Tensor], given: Operands, values: Tensor
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` as if the query ``(B, *, heads, d)`` had seen the additional keys: no term but the scale."""
    (out, lse), (query, _, terms, keys, additional_keys) = found, given
    try:
        extra: Sequence[Tensor] = _ops.attention(
            query.flatten(1, -3), additional_keys, values, *terms[:2], *_NO_TERMS, 0, keys[0], *_NO_MAP, False,
            _ops.allow_tf32(query),
        )  # fmt: skip
    except RuntimeError as error:
        additional = {"key": "additional_keys", "value": "additional_values"}
        raise Words(words.function, additional).of(error, "attention") from None
    extra = [t.reshape(query.shape[:-2] + t.shape[2:]) for t in extra]
    if extra[0].shape[1:-2] != out.shape[1:-2]:  # one query for all windows of the map
        extra = [_repeated(t, own.shape[1 : query.dim() - 2]) for t, own in zip(extra, (out, lse), strict=True)]
    return merge_attentions([out, extra[0]], [lse, extra[1]])


def _repeated(window: Tensor, sizes: Sequence[int]) -> Tensor:
    counts = [n // size for n, size in zip(sizes, window.shape[1:], strict=False)]
    return window.repeat(1, *counts, *(1,) * (window.dim() - 1 - len(counts)))
