"""The operators of softmax attention, and their arguments as all of them take them."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels._torch_private import mark_constant
from vitkernels.ops.registration import register, register_constant
from vitkernels.ops.schema import Arguments

__all__ = [
    "SCORE_DTYPES",
    "allow_tf32",
    "attention",
    "attention_transposed",
    "attention_varlen",
    "bilevel_route",
    "indexed_attention",
    "merge_attentions",
    "regional_routing_attention",
    "spatial_attention",
    "statistics_dtype",
]

#: Of terms of the score, before they are converted.
SCORE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-sum-exps, biases and scales that go with tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _out_and_lse(given: Arguments) -> tuple[Tensor, Tensor]:
    query: Tensor = given["query"]
    # A query that all windows share has a result in each: on the map of the keys.
    rows = (*given["key" if given.get("is_shared_query") else "query"].shape[:-2], query.shape[-2])
    lse = query.new_empty(rows, dtype=statistics_dtype(query.dtype))
    return query.new_empty((*rows, given["value"].shape[-1])), lse


def _of_keys(given: Arguments) -> Tensor:
    query: Tensor = given["query"]
    return query.new_empty((*given["key"].shape[:2], *given["value_q"].shape[2:]))


def _like_first(given: Arguments) -> tuple[Tensor, ...]:
    outs, lses = given["outs"], given["lses"]
    if len(outs) != len(lses):
        raise RuntimeError(
            f"vitkernels::merge_attentions: lses has {len(lses)} tensors, takes as many as outs ({len(outs)})"
        )
    return tuple(given[name][0].new_empty(given[name][0].shape) for name in ("outs", "lses"))


def _graph(given: Arguments) -> Tensor:
    query: Tensor = given["query"]
    regions = 1
    for size, region in zip(query.shape[1:-2], given["region_size"], strict=True):
        regions *= (size + region - 1) // region
    return query.new_empty((query.shape[0], 1, regions, given["topk"]), dtype=torch.int64)


attention = register("attention", _out_and_lse)
attention_varlen = register("attention_varlen", _out_and_lse)
bilevel_route = register_constant("bilevel_route", _graph)
indexed_attention = register("indexed_attention", _out_and_lse)
regional_routing_attention = register("regional_routing_attention", _out_and_lse)
spatial_attention = register("spatial_attention", _out_and_lse)
attention_transposed = register("attention_transposed", _of_keys)
merge_attentions = register("merge_attentions", _like_first)


def allow_tf32(query: Tensor) -> bool:
    """Whether matrix products of ``query`` may round their operands to TF32."""
    return query.dtype == torch.float32 and _matmul_takes_tf32()


# Dynamo cannot trace the call, but compiles anew when its answer changes: a guard of its own covers the setting.
@mark_constant
def _matmul_takes_tf32() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # where the precision was set by backend, torch refuses to give it without one
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
