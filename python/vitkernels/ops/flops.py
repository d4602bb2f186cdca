"""FLOP formulas of the operators, for :class:`torch.utils.flop_counter.FlopCounterMode`.

They follow its conventions: two FLOPs for each multiply-add of a matrix product, none for a softmax, five products in a
backward of softmax attention, and ``is_causal`` of dense attention counts as if every key were seen. Over a map only
the pairs of a query and a key that see each other count (those beyond ``radius``, too); between routed regions, those
of whole regions, and of lists all that they have room for.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitkernels.ops.schema import Arguments, Operator
from vitkernels.reference.pattern import AxisRule

__all__: list[str] = []

Count = Callable[[Arguments], int]


def _lengths(offsets: Tensor, longest: int) -> list[int]:
    """Of packed sequences; where only shapes are known, all are as long as the longest."""
    if type(offsets) is not Tensor or offsets.is_meta:
        return [longest] * (offsets.size(0) - 1)
    return [int(n) for n in offsets.diff().tolist()]


def _pairs_on_axis(integers: list[int], num_queries: int, num_keys: int, has_outside: bool) -> int:
    rule, step, size, key_size, shift, halo, stride, is_causal = integers
    whole = AxisRule(
        rule, step, size, key_size, shift, halo, stride, bool(is_causal), num_queries, num_keys, has_outside
    )
    return sum(
        len(of_class.keys(u)) for of_class in map(whole.of_class, range(step)) for u in range(of_class.num_queries)
    )


def _pairs(given: Arguments) -> int:
    """How many pairs of a query and a key have a logit."""
    query, key = given["query"], given["key"]
    heads: int = query.size(-2)
    if "cu_seqlens_q" in given:
        lengths = (_lengths(given[f"cu_seqlens_{side}"], given[f"max_seqlen_{side}"]) for side in "qk")
        return sum(heads * q * k for q, k in zip(*lengths, strict=True))
    batch: int = key.size(0)
    if "key_index" in given:
        listed: int = given["key_index"].size(-1)
        return batch * heads * int(query.size(1)) * listed
    if "region_graph" in given:
        seen: int = given["region_graph"].size(-1) * prod(given["kv_region_size"])
        rows: int = prod(query.shape[1:-2])
        return batch * heads * rows * seen
    if "axes" not in given:
        return batch * heads * int(query.size(1) * key.size(1))
    maps = [tuple((key if given["is_shared_query"] else query).shape[1:-2]), tuple(key.shape[1:-2])]
    axes = [list(given["axes"][i : i + 8]) for i in range(0, len(given["axes"]), 8)]
    each = zip(axes, *maps, strict=True)
    return batch * heads * prod(_pairs_on_axis(axis, q, k, given["has_outside"]) for axis, q, k in each)


def _of_pairs(of_query: int, of_value: int) -> Count:
    """So many products as deep as a query, and as a value, for each pair."""

    def count(given: Arguments) -> int:
        value = given["value"] if "value" in given else given["value_q"]
        return 2 * _pairs(given) * int(of_query * given["query"].size(-1) + of_value * value.size(-1))

    return count


def _of_tokens(of_queries: int, of_keys: int) -> Count:
    """So many products with a state for each query, and for each key."""

    def count(given: Arguments) -> int:
        query, key, value = (given[name] for name in ("query", "key", "value"))
        rows = of_queries * prod(query.shape[:-1]) + of_keys * prod(key.shape[:-1])
        return int(2 * rows * query.size(-1) * value.size(-1))

    return count


def _of_channels(products: int) -> Count:
    """So many products of a query's and a key's channels for each token of query, and of value."""

    def count(given: Arguments) -> int:
        query, value = given["query"], given["value"]
        rows = prod(query.shape[:3]) + prod(value.shape[:3])
        return int(2 * products * rows * query.size(-1) * value.size(-1))

    return count


def _of_blocks(products: int) -> Count:
    """So many products with both weights for each row."""

    def count(given: Arguments) -> int:
        return int(2 * products * given["x"].size(0) * (given["w1"].numel() + given["w2"].numel()))

    return count


def _of_lags(convolutions: int) -> Count:
    """So many convolutions, as PyTorch counts them: each tap at each position."""

    def count(given: Arguments) -> int:
        return int(2 * convolutions * given["x"].numel() * given["filter"].size(1))

    return count


def _of_positions(convolutions: int) -> Count:
    """So many circular convolutions of maps, as PyTorch counts convolutions: each position at each position."""

    def count(given: Arguments) -> int:
        x = given["x"]
        return int(2 * convolutions * x.numel() * x.size(1) * x.size(2))

    return count


def _register(name: str, count: Count) -> None:
    names = Operator(name).arguments

    def formula(*args: Any, out_val: Any = None, **options: Any) -> int:
        return count(dict(zip(names, args, strict=False)) | options)

    registered: Callable[..., Any] = register_flop_formula(getattr(torch.ops.vitkernels, name), get_raw=True)
    registered(formula)


for _name in (
    "attention",
    "attention_varlen",
    "attention_transposed",
    "indexed_attention",
    "regional_routing_attention",
    "spatial_attention",
):
    _register(_name, _of_pairs(1, 1))
    _register(f"{_name}_backward", _of_pairs(3, 2))
_register("channel_attention", _of_channels(1))
_register("channel_attention_backward", _of_channels(2))
_register("blockdiag_butterfly_multiply", _of_blocks(1))
_register("blockdiag_butterfly_multiply_backward", _of_blocks(2))
_register("long_conv", _of_lags(1))
_register("long_conv_backward", _of_lags(2))
_register("spectral_gating", _of_positions(1))
_register("spectral_gating_backward", _of_positions(2))
_register("decayed_linear_attention", _of_tokens(1, 1))
_register("decayed_linear_attention_backward", _of_tokens(2, 2))
_register("linear_attention_quadratic", _of_pairs(1, 1))
_register("linear_attention_quadratic_backward", _of_pairs(3, 2))
for _name in ("linear_attention", "linear_attention_varlen"):
    _register(_name, _of_tokens(1, 1))
    _register(f"{_name}_backward", _of_tokens(2, 2))
