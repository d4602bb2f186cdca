"""Rows for the functions that have other arguments than the operator they call, one or two for each."""

from __future__ import annotations

from typing import Any

import vitkernels as vk
from support.sample import Input, Sample, positive, statistic

ADDITIONAL = {"additional_keys": Input("bagd"), "additional_values": Input("bagv")}
SCALE = statistic("h", positive)


def on_map(
    function: str, id: str, *options: Any, size: tuple[int, ...] = (4, 6), h: int = 2, **arguments: Any
) -> Sample:
    """``options`` are sizes of the pattern, by their names in the function's signature."""
    letters = "zyx"[-len(size) :]
    data = {name: Input(f"b{letters}h{d}") for name, d in (("query", "d"), ("key", "d"), ("value", "v"))}
    sizes = {"b": 2, "h": h, "d": 5, "v": 3, "a": 3, "g": h, "r": 1, "f": 5, "w": 49}
    return Sample(function, id, {**data, **arguments}, sizes | dict(zip(letters, size, strict=True)))


def agents(id: str, **arguments: Any) -> Sample:
    data = {"query": Input("bqhd"), "key": Input("bkgd"), "value": Input("bkgv"), "agent": Input("bahd")}
    sizes = {"b": 2, "q": 17, "k": 33, "h": 4, "g": 2, "d": 8, "v": 5, "a": 6}
    return Sample("agent_attention", id, {**data, **arguments}, sizes)


NAMED_SAMPLES = [
    agents("biased", agent_bias=statistic("hak"), query_bias=statistic("hqa"), scale=SCALE),
    agents("shared", agent=Input("1ahd"), agent_bias=statistic("b1ak")),
    on_map("na1d", "causal", size=(9,), kernel_size=3, is_causal=True, scale=SCALE),
    on_map("na2d", "additional", size=(5, 6), kernel_size=3, rpb=statistic("hff"), return_lse=True, **ADDITIONAL),
    on_map("na3d", "plain", size=(2, 3, 4), kernel_size=2),
    on_map("window_attention", "shifted", window_size=4, shift=2, bias_table=statistic("wh")),
    on_map("window_attention", "additional", window_size=(2, 3), scale=SCALE, return_lse=True, **ADDITIONAL),
    on_map("grid_attention", "plain", size=(3, 4), grid_size=(3, 2), key_bias=statistic("hyx")),
    on_map("halo_attention", "zero", block_size=2, halo_size=1, outside="zero", rel_pos=[statistic("fd")] * 2),
    on_map("halo_attention", "fill", block_size=2, halo_size=1, outside=[Input("hd"), Input("hv")]),
    on_map("cross_shaped_window_attention", "scaled", stripe_width=2, scale=SCALE),
    on_map("criss_cross_attention", "key-bias", key_bias=statistic("byx"), return_lse=True),
]  # fmt: skip

_OPERATORS = {
    "attention",
    "attention_transposed",
    "attention_varlen",
    "blockdiag_butterfly_multiply",
    "channel_attention",
    "decayed_linear_attention",
    "indexed_attention",
    "linear_attention",
    "linear_attention_varlen",
    "long_conv",
    "merge_attentions",
    "regional_routing_attention",
    "spatial_attention",
    "spectral_gating",
}
# bilevel_route gives integers, which no gate compares: test_bilevel_route.
assert {s.operator for s in NAMED_SAMPLES} | _OPERATORS | {"bilevel_route"} == set(vk.functional.__all__), (
    "a function without a row"
)
