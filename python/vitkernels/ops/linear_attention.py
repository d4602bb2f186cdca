"""The operators of linear attention."""

from __future__ import annotations

from torch import Tensor

from vitkernels.ops.attention import statistics_dtype
from vitkernels.ops.registration import register
from vitkernels.ops.schema import Arguments

__all__ = [
    "channel_attention",
    "decayed_linear_attention",
    "linear_attention",
    "linear_attention_quadratic",
    "linear_attention_varlen",
]


def _out_and_state(given: Arguments) -> tuple[Tensor, Tensor]:
    query, value = given["query"], given["value"]
    batch = given["cu_seqlens_q"].shape[0] - 1 if "cu_seqlens_q" in given else query.shape[0]
    state = query.new_empty(
        (batch, value.shape[-2], query.shape[-1], value.shape[-1] + 1), dtype=statistics_dtype(query.dtype)
    )
    return query.new_empty((*query.shape[:-1], value.shape[-1])), state


linear_attention = register("linear_attention", _out_and_state)
linear_attention_varlen = register("linear_attention_varlen", _out_and_state)


def _out(given: Arguments) -> Tensor:
    query: Tensor = given["query"]
    return query.new_empty((*query.shape[:-1], given["value"].shape[-1]))


linear_attention_quadratic = register("linear_attention_quadratic", _out)


def _decayed_out_and_state(given: Arguments) -> tuple[Tensor, Tensor]:
    query, value = given["query"], given["value"]
    sizes = (query.shape[0], *query.shape[2:], value.shape[3])
    return value.new_empty(value.shape), query.new_empty(sizes, dtype=statistics_dtype(query.dtype))


decayed_linear_attention = register("decayed_linear_attention", _decayed_out_and_state)


def _read_and_products(given: Arguments) -> tuple[Tensor, Tensor]:
    query, value = given["query"], given["value"]
    batch, _, heads, d = query.shape
    state = query.new_empty((batch, heads, d + 1, value.shape[3] + 1), dtype=statistics_dtype(query.dtype))
    return query.new_empty((batch, value.shape[1], heads, d)), state


channel_attention = register("channel_attention", _read_and_products)
