"""The table of samples: the calls that every gate makes. A new operator gets all gates with its rows here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import vitkernels as vk
from support.sample import (
    Fill,
    Input,
    Length,
    Offsets,
    RandomFeatures,
    Sample,
    empty,
    fraction,
    lowest,
    lowest_only,
    lowest_rows,
    lse_like,
    lse_of_some,
    masked,
    masked_rows,
    normal,
    ones,
    positive,
    statistic,
    times,
    uneven_map,
)  # fmt: skip
from support.samples_monarch import MONARCH_SAMPLES
from support.samples_routed import ROUTED_SAMPLES
from support.samples_spatial import SPATIAL_SAMPLES

DATA = {"query": "bqhd", "key": "bkgd", "value": "bkgv"}


def attention(
    id: str, *, b: int = 2, q: int = 17, k: int = 33, h: int = 3, g: int | None = None, d: int = 16, v: int = 24,
    grid: tuple[int, ...] = (), tags: str = "", **arguments: Any,
) -> Sample:  # fmt: skip
    sizes = {"b": b, "q": q, "k": k, "h": h, "g": h if g is None else g, "d": d, "v": v, "a": 5}
    if grid:
        sizes |= {"p": arguments.get("num_prefix_tokens", 0), **dict(zip("zyx"[-len(grid) :], grid, strict=True))}
    data = {name: Input(axes) for name, axes in DATA.items()}
    return Sample("attention", id, {**data, "return_lse": True, **arguments}, sizes, frozenset(tags.split()))


def varlen(
    id: str, *, n: int = 5, t: int = 131, u: int = 203, h: int = 3, g: int | None = None, offsets: Any = torch.int32,
    tags: str = "", **arguments: Any,
) -> Sample:  # fmt: skip
    """``n`` sequences with ``t`` queries and ``u`` keys in total."""
    sizes = {"n": n, "t": t, "u": u, "h": h, "g": h if g is None else g, "d": 16, "v": 24}
    tensors = {
        "query": Input("thd"), "key": Input("ugd"), "value": Input("ugv"), "cu_seqlens_q": Offsets("n", "t", offsets),
        "cu_seqlens_k": Offsets("n", "u", offsets), "max_seqlen_q": Length("t"), "max_seqlen_k": Length("u"),
    }  # fmt: skip
    return Sample("attention_varlen", id, {**tensors, "return_lse": True, **arguments}, sizes, frozenset(tags.split()))


def linear_varlen(id: str, *, h: int = 4, g: int = 2, **arguments: Any) -> Sample:
    packed = varlen(id, h=h, g=g, **arguments)
    given = {name: value for name, value in packed.arguments.items() if name != "return_lse"}
    return replace(packed, operator="linear_attention_varlen", arguments=given)


def transposed(
    id: str, *, b: int = 2, q: int = 17, k: int = 33, h: int = 3, g: int | None = None, d: int = 16, v: int = 24,
    tags: str = "", **arguments: Any,
) -> Sample:  # fmt: skip
    sizes = {"b": b, "q": q, "k": k, "h": h, "g": h if g is None else g, "d": d, "v": v}
    tensors = {
        "query": Input("bqhd"), "key": Input("bkgd"), "value_q": Input("bqhv"), "lse": statistic("bqh", lse_like),
    }  # fmt: skip
    return Sample("attention_transposed", id, {**tensors, **arguments}, sizes, frozenset(tags.split()))


def linear(
    id: str, *, b: int = 2, q: int = 97, k: int = 131, h: int = 4, g: int = 2, d: int = 16, v: int = 24, tags: str = "",
    **arguments: Any,
) -> Sample:  # fmt: skip
    sizes = {"b": b, "q": q, "k": k, "h": h, "g": g, "d": d, "v": v}
    data = {name: Input(axes) for name, axes in DATA.items()}
    return Sample("linear_attention", id, {**data, **arguments}, sizes, frozenset(tags.split()))


def decayed(
    id: str, *, b: int = 2, k: int = 131, h: int = 3, d: int = 16, v: int = 24, tags: str = "", **arguments: Any
) -> Sample:
    data = {"query": Input("bkhd"), "key": Input("bkhd"), "value": Input("bkhv")}
    decay = {"decay": statistic("h", fraction, learns=False)}
    sizes = {"b": b, "k": k, "h": h, "d": d, "v": v}
    return Sample("decayed_linear_attention", id, {**data, **decay, **arguments}, sizes, frozenset(tags.split()))


def channels(
    id: str, *, b: int = 2, q: int = 131, k: int = 97, h: int = 3, d: int = 16, v: int = 24, tags: str = "",
    **arguments: Any,
) -> Sample:  # fmt: skip
    """``q`` tokens of queries and keys, ``k`` of values."""
    data = {"query": Input("bqhd"), "key": Input("bqhv"), "value": Input("bkhv")}
    return Sample(
        "channel_attention", id, {**data, **arguments}, {"b": b, "q": q, "k": k, "h": h, "d": d, "v": v},
        frozenset(tags.split()),
    )  # fmt: skip


SAME_DIMS = {"key": Input("bqhd"), "value": Input("bkhd")}
OWN_VALUE = {name: Input(f"bk{heads}") for name, heads in (("query", "hd"), ("key", "gd"), ("value", "gv"))}


def merge(
    id: str, parts: int, *, lses: tuple[Fill, ...] = (), learns: bool = True, tags: str = "", **sizes: int
) -> Sample:
    fills = lses + (times(3.0),) * (parts - len(lses))
    arguments = {"outs": [Input("bqhv")] * parts, "lses": [statistic("bqh", fill, learns=learns) for fill in fills]}
    at = {"b": 2, "q": 131, "h": 3, "v": 33, **sizes}
    return Sample("merge_attentions", id, arguments, at, frozenset(tags.split()))


def rel_pos(axes: int, heads: str = "") -> list[Input]:
    return [statistic(f"{heads}{a}d") for a in "ZYX"[-axes:]]


# Around the kernels' tiles: 84 and 224 queries, 320 and 768 keys; around vectors and register tiles.
TOKENS = [
    (1, 1), (1, 2), (2, 1), (1, 801), (15, 16), (16, 15), (17, 31), (31, 33), (49, 49), (84, 320), (85, 321),
    (113, 197), (197, 203), (203, 257), (224, 768), (225, 769), (257, 113), (769, 15), (801, 801), (505, 1537),
]  # fmt: skip
HEAD_DIMS = [
    (1, 1), (2, 3), (7, 16), (16, 130), (24, 1), (33, 300), (64, 64), (80, 7), (96, 96), (111, 111), (256, 256),
]  # fmt: skip
NO_GRADIENT = {name: Input(axes, learns=False) for name, axes in DATA.items()}
TABLES = [
    ("hX", (1,)), ("1X", (17,)), ("hX", (333,)), ("hYX", (7, 7)), ("1YX", (1, 19)), ("hYX", (13, 2)), ("hYX", (19, 43)),
    ("hZYX", (2, 7, 7)), ("1ZYX", (4, 1, 5)),
]  # fmt: skip


def name(axes: str, grid: tuple[int, ...]) -> str:
    return f"{axes}-{'x'.join(map(str, grid))}"


MAP = Input("h", uneven_map, dtype=torch.int64)
BIASES = ["bhqk", "1hqk", "b1qk", "11qk", "hqk", "qk", "k", "bhq1", "1h1k", "b11k", "bh11", "q1", "1"]

SAMPLES = [
    *(attention(f"tokens-{q}-{k}", q=q, k=k) for q, k in TOKENS),
    *(attention(f"tokens-{q}-{k}-bias", q=q, k=k, bias=statistic("1hqk")) for q, k in TOKENS[::3]),
    *(attention(f"dims-{d}-{v}", d=d, v=v) for d, v in HEAD_DIMS),
    attention("plain", tags="core linear-memory"),
    # On a GPU the longer side is split.
    attention("few-queries", b=1, q=3, k=601, h=2, g=1, scale=statistic("h", positive), tags="core"),
    attention("few-keys", b=1, q=601, k=3, h=2, g=1, tags="core"),
    attention("no-lse", return_lse=False, tags="core"),
    attention("number-scale", scale=0.3),
    attention("head-scale", scale=statistic("h", positive), tags="core"),
    attention("head-scale-multiplier", h=4, g=2, scale=statistic("h", positive), multiplier=statistic("hqk")),
    *(attention(f"bias-{axes}", q=49, k=49, bias=statistic(axes)) for axes in BIASES),
    attention("bias-grouped-long", b=2, q=97, k=801, h=4, g=2, bias=statistic("1hqk"), tags="core"),
    attention("bias-expanded-heads", bias=statistic("b1qk", expand="bhqk")),
    attention("bias-expanded-batch", bias=statistic("1hqk", expand="bhqk"), tags="core"),
    attention("bias-expanded-keys", bias=statistic("bhq1", expand="bhqk")),
    attention("bias-fixed", bias=statistic("1hqk", learns=False)),
    attention("bias-float16", bias=statistic("1hqk", dtype=torch.float16)),
    attention("masked", q=33, k=197, bias=statistic("bhqk", masked), tags="core"),
    attention("masked-rows", q=33, k=197, bias=statistic("b1qk", masked_rows), tags="core"),
    attention("masked-rows-long", q=97, k=801, bias=statistic("1hqk", masked_rows)),
    attention("masked-keys", q=33, k=197, key_bias=statistic("b1k", masked)),
    attention("lowest", q=33, k=197, bias=statistic("b1qk", lowest)),
    # Forward only: lse is too large to hold log(k), without which the backward cannot tell the probabilities.
    *(
        attention(f"lowest-rows-{k}", q=33, k=k, bias=statistic("b1qk", lowest_rows, learns=False), **NO_GRADIENT)
        for k in (197, 801)
    ),
    attention(
        "lowest-rows-few-queries", b=1, q=4, k=601, h=1, bias=statistic("qk", lowest_rows, learns=False), **NO_GRADIENT
    ),
    *(attention(f"key-bias-{axes}", k=49, key_bias=statistic(axes)) for axes in ("bhk", "1hk", "b1k", "k", "1")),
    attention("key-bias-long", q=97, k=801, h=4, g=2, key_bias=statistic("b1k"), tags="core linear-memory"),
    *(attention(f"multiplier-{axes}", q=49, k=49, multiplier=statistic(axes)) for axes in ("bhqk", "11qk", "h11")),
    attention(
        "all-terms", q=97, k=333, h=4, g=2, tags="core",
        scale=statistic("h", positive), multiplier=statistic("b1qk"), bias=statistic("1hqk"), key_bias=statistic("bhk"),
    ),
    attention("all-terms-causal", q=97, k=333, is_causal=True, multiplier=statistic("1h1k"), bias=statistic("bhqk")),
    *(attention(f"causal-{q}-{k}", q=q, k=k, is_causal=True) for q, k in [(33, 33), (9, 203), (203, 9), (1, 33)]),
    attention("causal-long", q=801, k=801, is_causal=True, tags="core"),
    attention("causal-longer-queries", q=700, k=401, is_causal=True, bias=statistic("11qk", masked)),
    attention("grouped", q=49, k=57, h=6, g=2, tags="core"),
    attention("one-kv-head", h=4, g=1),
    attention("head-map", h=4, g=3, head_map=Input("h", uneven_map, dtype=torch.int64), tags="core"),
    attention("head-map-int32", h=4, g=3, head_map=Input("h", uneven_map, dtype=torch.int32), bias=statistic("hqk")),
    attention("shared-query", query=Input("1qhd"), b=3, tags="core"),
    attention("expanded-query", query=Input("1qhd", expand="bqhd"), b=3),
    attention("qk-norm", qk_norm="l2", scale=statistic("h", positive), tags="core mixed"),
    attention(
        "additional", q=49, k=197, additional_keys=Input("bagd"), additional_values=Input("bagv"), tags="core deploy",
        bias=statistic("1hqk"), is_causal=True,
    ),
    attention(
        "additional-only", k=0, h=4, g=2, qk_norm="l2", tags="mixed",
        additional_keys=Input("bagd"), additional_values=Input("bagv"),
    ),
    *(attention(f"bias-table-{name(a, grid)}", grid=grid, bias_table=statistic(a)) for a, grid in TABLES),
    *(
        attention(f"multiplier-table-{name(a, grid)}", grid=grid, multiplier_table=statistic(a))
        for a, grid in TABLES[::2]
    ),
    attention("bias-table", grid=(14, 14), b=9, bias_table=statistic("hYX"), tags="core linear-memory"),
    attention("bias-table-prefix", grid=(5, 7), bias_table=statistic("1YX"), num_prefix_tokens=3, tags="core"),
    attention("bias-table-grouped", grid=(31, 33), h=4, g=2, bias_table=statistic("hYX"), num_prefix_tokens=1),
    attention("bias-table-head-map", grid=(5, 3), h=4, g=3, bias_table=statistic("hYX"), head_map=MAP),
    attention("bias-table-causal", grid=(801,), bias_table=statistic("1X"), is_causal=True),
    attention("bias-table-fixed", grid=(6, 5), bias_table=statistic("hYX", learns=False)),
    attention("bias-table-expanded", grid=(6, 5), bias_table=statistic("1YX", expand="hYX")),
    attention("bias-table-masked", grid=(7, 9), bias_table=statistic("hYX", masked)),
    attention("bias-table-float16", grid=(7, 9), bias_table=statistic("1YX", dtype=torch.float16)),
    attention("tables", grid=(4, 6), bias_table=statistic("hYX"), multiplier_table=statistic("1YX"), tags="core"),
    attention(
        "tables-shared-query", grid=(3, 5), b=3, query=Input("1qhd"), bias_table=statistic("1YX"),
        multiplier_table=statistic("hYX"), num_prefix_tokens=1, scale=statistic("h", positive),
    ),
    attention("rel-pos-1", grid=(33,), rel_pos=rel_pos(1), tags="linear-memory"),
    attention("rel-pos-2", grid=(5, 7), rel_pos=rel_pos(2)),
    attention("rel-pos-3", grid=(3, 4, 5), rel_pos=rel_pos(3)),
    attention("rel-pos-heads", grid=(5, 7), rel_pos=rel_pos(2, "h"), num_prefix_tokens=2, tags="core"),
    attention("rel-pos-causal", grid=(401,), rel_pos=rel_pos(1, "h"), is_causal=True),
    attention("rel-pos-long", grid=(30, 31), h=4, g=2, rel_pos=rel_pos(2), qk_norm="l2", tags="mixed linear-memory"),
    attention(
        "all-terms-on-grid", grid=(5, 9), h=4, g=2, num_prefix_tokens=1, tags="core", is_causal=True,
        scale=statistic("h", positive), multiplier=statistic("b1qk"), bias=statistic("1hqk"), key_bias=statistic("bhk"),
        bias_table=statistic("1YX"), multiplier_table=statistic("hYX"), rel_pos=rel_pos(2),
        additional_keys=Input("bagd"), additional_values=Input("bagv"),
    ),
    attention("bias-table-no-batch", b=0, grid=(3, 4), bias_table=statistic("hYX"), rel_pos=rel_pos(2)),
    attention("large-logits", query=Input("bqhd", times(30.0)), key=Input("bkgd", times(30.0))),
    attention(
        "huge-logits", d=64, k=801, tags="beyond-lse", query=Input("bqhd", times(1e4)), key=Input("bkgd", times(1e4))
    ),
    attention("one-key-dominates", key_bias=statistic("bhk", times(60.0)), k=801),
    attention("no-batch", b=0, tags="core"),
    attention("no-queries", q=0, bias=statistic("1hqk")),
    attention("no-keys", k=0, scale=statistic("h", positive), bias=statistic("1hqk"), key_bias=statistic("bhk")),
    attention("nothing", b=0, q=0, k=0),
    varlen("plain", tags="core deploy"),
    varlen("no-lse", return_lse=False),
    varlen("int64-offsets", offsets=torch.int64),
    varlen("one-sequence", n=1, is_causal=True),
    varlen("many-sequences", n=30, h=4, g=2, bias=statistic("1h11")),
    varlen("long", n=2, t=1203, u=1801),
    varlen("long-causal-bias", n=2, t=403, u=1401, is_causal=True, bias=statistic("1htu")),
    varlen("bias", bias=statistic("nhtu"), tags="core"),
    varlen("bias-masked", bias=statistic("11tu", masked_rows), h=4, g=2),
    varlen(
        "all-terms", h=4, g=2, is_causal=True, tags="core",
        scale=statistic("h", positive), multiplier=statistic("n1tu"), bias=statistic("1htu"), key_bias=statistic("nhu"),
    ),
    varlen("key-bias", key_bias=statistic("1hu"), qk_norm="l2", tags="mixed"),
    varlen("head-map", h=4, g=3, head_map=Input("h", uneven_map, dtype=torch.int64)),
    varlen("no-keys", u=0),
    varlen("no-tokens", t=0, u=0, n=2),
    *(transposed(f"tokens-{q}-{k}", q=q, k=k) for q, k in TOKENS),
    *(transposed(f"tokens-{q}-{k}-one-column", q=q, k=k, v=1) for q, k in TOKENS[::2]),
    *(transposed(f"dims-{d}-{v}", d=d, v=v) for d, v in [*HEAD_DIMS, (16, 8), (16, 9)]),
    transposed("plain", tags="core deploy linear-memory"),
    transposed("column-sums", q=197, k=203, v=1, value_q=Input("1111", ones, expand="bqhv", learns=False), tags="core"),
    transposed("expanded-values", v=3, value_q=Input("b1h1", expand="bqhv")),
    transposed("few-queries", b=1, q=3, k=601, h=2, g=1, query_weight=statistic("q1"), tags="core"),
    transposed("few-keys", b=1, q=601, k=3, h=2, g=1, query_weight=statistic("bqh"), tags="core"),
    transposed("few-heads", b=1, q=113, k=401, h=1, v=5),
    *(transposed(f"query-weight-{axes}", query_weight=statistic(axes)) for axes in ("bqh", "1qh", "b1h", "q1", "1")),
    transposed("query-weight-long", q=505, k=97, v=2, query_weight=statistic("bq1"), tags="core"),
    transposed("query-weight-expanded", query_weight=statistic("1q1", expand="bqh")),
    transposed("query-weight-float16", query_weight=statistic("1q1", dtype=torch.float16)),
    transposed("number-scale", scale=0.3),
    transposed("head-scale", scale=statistic("h", fraction), tags="core"),
    *(transposed(f"bias-{axes}", q=49, k=49, bias=statistic(axes)) for axes in ("bhqk", "1hqk", "qk", "bhq1", "1h1k")),
    transposed("bias-grouped-long", q=97, k=801, h=4, g=2, bias=statistic("1hqk"), tags="core"),
    transposed("bias-expanded-batch", bias=statistic("1hqk", expand="bhqk"), v=1),
    transposed("masked", q=33, k=197, bias=statistic("bhqk", masked)),
    transposed("masked-rows", q=33, k=197, bias=statistic("b1qk", masked_rows), lse=statistic("bqh", lse_of_some)),
    transposed("empty-rows", q=97, k=33, lse=statistic("bqh", lse_of_some), query_weight=statistic("bqh"), tags="core"),
    transposed("empty-rows-one-column", q=97, k=333, v=1, lse=statistic("bqh", lse_of_some)),
    transposed("all-rows-empty", lse=statistic("bqh", empty)),
    *(transposed(f"key-bias-{axes}", k=49, key_bias=statistic(axes)) for axes in ("bhk", "k", "1")),
    *(transposed(f"multiplier-{axes}", q=49, k=49, multiplier=statistic(axes)) for axes in ("bhqk", "h11")),
    transposed(
        "all-terms", q=97, k=333, h=4, g=2, tags="core", query_weight=statistic("1qh"), scale=statistic("h", fraction),
        multiplier=statistic("b1qk", fraction), bias=statistic("1hqk"), key_bias=statistic("bhk"),
    ),
    transposed("all-terms-causal", q=97, k=333, is_causal=True, multiplier=statistic("1h1k"), bias=statistic("bhqk")),
    *(
        transposed(f"causal-{q}-{k}", q=q, k=k, v=v, is_causal=True)
        for q, k, v in [(33, 33, 24), (9, 203, 1), (203, 9, 24), (1, 33, 1)]
    ),
    transposed("causal-long", q=401, k=801, v=1, is_causal=True, tags="core"),
    transposed("causal-longer-queries", q=700, k=401, is_causal=True, bias=statistic("11qk", masked)),
    transposed("grouped", q=49, k=57, h=6, g=2),
    transposed("one-kv-head", h=4, g=1, k=801, v=1),
    transposed("head-map", h=4, g=3, head_map=Input("h", uneven_map, dtype=torch.int64), tags="core"),
    transposed("shared-query", query=Input("1qhd"), b=3, tags="core"),
    transposed("qk-norm", qk_norm="l2", scale=statistic("h", positive), tags="core mixed"),
    transposed("no-batch", b=0, tags="core"),
    transposed("no-queries", q=0, bias=statistic("1hqk"), query_weight=statistic("bqh")),
    transposed("no-keys", k=0, scale=statistic("h", positive), bias=statistic("1hqk"), query_weight=statistic("q1")),
    transposed("nothing", b=0, q=0, k=0),
    *(merge(f"parts-{parts}", parts) for parts in (1, 3)),
    merge("parts-2", 2, tags="core"),
    merge("parts-4", 4, b=1, q=601, v=7),
    merge("wide", 2, q=5, v=300),
    merge("empty-part", 3, lses=(normal, empty), tags="core"),
    merge("all-empty", 2, lses=(empty, empty)),
    merge("far-apart", 2, lses=(times(300.0),)),
    # An lse this large does not change by the step of a numerical derivative.
    merge("lowest", 3, lses=(lowest_only,) * 3, learns=False),
    merge("no-tokens", 2, q=0),
    merge("no-dims", 2, v=0),
    linear("relu", tags="core deploy"),
    linear("elu", feature_map="elu", q=601, k=1100, h=2, tags="core"),  # the keys are split
    linear("exp", feature_map="exp", d=5, v=33),
    linear("focused", feature_map="focused", tags="core"),
    linear("focused-power", feature_map=vk.FeatureMap("focused", power=6), d=33, v=5),
    linear("performer", feature_map=RandomFeatures(20), tags="mixed"),
    linear("unnormalized", feature_map="identity", normalize=False, g=4, scale=0.3),
    linear(
        "angular", feature_map="identity", normalize=False, qk_norm="l2", scale=0.3, residual_v=0.5, tags="mixed",
        **OWN_VALUE,
    ),
    linear("residual", eps=0.1, scale=2.0, residual_v=-1.0, g=1, tags="core", **OWN_VALUE),
    linear("one-of-each", b=1, q=1, k=1, h=1, g=1, d=1, v=1),
    linear("shared-key", key=Input("1kgd", expand="bkgd"), query=Input("bq1d", expand="bqhd")),
    # In the quadratic form.
    linear("few-queries", q=2, k=257, d=33, v=24, eps=0.5, tags="core"),
    linear("few-keys", q=200, k=2, d=20, v=33, feature_map="elu", eps=0.1),
    linear("few-tokens-focused", q=2, k=9, d=33, feature_map="focused", scale=0.5),
    linear("few-tokens-residual", residual_v=0.5, normalize=False, g=4, scale=0.3, k=2, d=32, **OWN_VALUE),
    linear("few-head-map", q=70, k=2, g=3, feature_map="exp", head_map=Input("h", uneven_map, dtype=torch.int64)),
    linear("head-map", g=3, head_map=Input("h", uneven_map, dtype=torch.int64), tags="core"),
    linear(
        "head-map-residual", g=3, residual_v=0.5, head_map=Input("h", uneven_map, dtype=torch.int32), **OWN_VALUE
    ),
    linear_varlen("relu", tags="core deploy"),
    linear_varlen("int64-offsets", feature_map="elu", offsets=torch.int64),
    linear_varlen("one-sequence", n=1, feature_map="exp", h=2),
    linear_varlen("many-sequences", n=30, feature_map="focused"),
    linear_varlen("long", n=2, t=1203, u=1801, h=2, g=1, tags="core"),
    linear_varlen("performer", feature_map=RandomFeatures(20), tags="mixed"),
    linear_varlen(
        "head-map", g=3, head_map=Input("h", uneven_map, dtype=torch.int64), normalize=False,
        feature_map="identity", scale=0.3, qk_norm="l2", tags="mixed",
    ),
    linear_varlen(
        "residual", eps=1.0, residual_v=0.5, key=Input("tgd"), value=Input("tgv"),
        cu_seqlens_k=Offsets("n", "t", torch.int32), max_seqlen_k=Length("t"),
    ),
    linear_varlen("no-keys", u=0),
    linear_varlen("no-tokens", t=0, u=0, n=2),
    *ROUTED_SAMPLES,
    *MONARCH_SAMPLES,
    channels("plain", tags="core deploy"),
    channels("number-scale", scale=0.05, d=33, v=5),
    channels("head-scale", scale=statistic("h", fraction), tags="core"),
    channels("qk-norm", qk_norm="l2", scale=statistic("h", positive), tags="core"),
    channels("qk-norm-dims", qk_norm="l2", scale=3.0, d=20, v=38),
    channels("one-scale", qk_norm="l2", scale=statistic("1", positive)),
    channels("groups", groups=2, h=4, scale=0.05, **SAME_DIMS, tags="core"),
    # Tokens are split.
    channels("long", q=1100, k=1300, h=2, d=32, v=32, scale=0.02, tags="core"),
    channels("long-qk-norm", b=1, q=1300, k=1100, h=1, d=5, v=33, qk_norm="l2", scale=statistic("h", positive)),
    channels("few-values", b=1, q=1300, k=3, h=2, scale=0.02),
    channels("few-queries", b=1, q=3, k=1300, h=2, qk_norm="l2"),
    channels("one-of-each", b=1, q=1, k=1, h=1, d=1, v=1),
    channels("expanded", scale=0.05, key=Input("1qhv", expand="bqhv"), value=Input("bk1v", expand="bkhv")),
    channels("no-batch", b=0, scale=statistic("h", positive), tags="core"),
    channels("no-queries", q=0, qk_norm="l2"),
    channels("no-values", k=0, scale=statistic("h", positive)),
    decayed("plain", tags="core deploy"),
    decayed("one-block", k=64, d=33, v=5, decay=0.9),
    decayed("state", initial_state=statistic("bhdv"), return_state=True, tags="core"),
    decayed("state-fixed", k=65, initial_state=statistic("bhdv", learns=False), decay=1.0),
    decayed("two-sided", is_causal=False, decay=0.95, tags="core"),
    # In chunks, which threads share where there are few heads.
    decayed("long", b=1, k=2117, h=1, tags="core"),
    decayed("long-state", k=1100, initial_state=statistic("bhdv"), return_state=True),
    decayed("long-two-sided", b=1, k=1024, h=2, d=5, v=3, is_causal=False, decay=0.999),
    decayed("tiny", k=300, decay=1e-38),
    decayed("zero", decay=0.0, is_causal=False),
    decayed("one-of-each", b=1, k=1, h=1, d=1, v=1, return_state=True),
    decayed("no-batch", b=0, tags="core"),
    decayed("no-tokens", k=0, initial_state=statistic("bhdv"), return_state=True),
    linear("no-batch", b=0, tags="core"),
    linear("no-queries", q=0),
    linear("no-keys", k=0),
    linear("nothing", b=0, q=0, k=0),
    *SPATIAL_SAMPLES,
]  # fmt: skip
assert len({*map(str, SAMPLES)}) == len(SAMPLES), "two samples have the same name"


def _unique_when_small() -> list[Sample]:
    """Rows that differ in more than their sizes."""
    seen: dict[str, Sample] = {}
    for sample in SAMPLES:
        seen.setdefault(repr((sample.operator, sample.arguments, sample.small())), sample)
    return list(seen.values())


def _features(sample: Sample) -> set[tuple[str, str, str]]:
    """The arguments of a call, and the kind of each."""

    def kind(argument: Any) -> str:
        return str(argument) if isinstance(argument, bool | str) else type(argument).__name__

    return {(sample.operator, name, kind(argument)) for name, argument in sample.arguments.items()}


def _covering(samples: list[Sample]) -> list[Sample]:
    """Few rows that together have all features: operators are registered by the names of arguments."""
    left, chosen = set().union(*map(_features, samples)), []
    while left:
        best = max(samples, key=lambda s: len(_features(s) & left))
        chosen.append(best)
        left -= _features(best)
    return chosen


def each_of(samples: list[Sample], short: list[Sample] | None = None) -> pytest.MarkDecorator:
    """One test for each; those not in ``short``, if it is given, run in ``make test-all`` only."""
    rows = [pytest.param(s, id=str(s), marks=() if short is None or s in short else pytest.mark.full) for s in samples]
    return pytest.mark.parametrize("sample", rows)


def tagged(tag: str) -> list[Sample]:
    """Rows for a gate that is slow, or that does not apply to all.

    ``core`` covers every argument, ``deploy`` every operator; ``linear-memory`` must not allocate an N x N matrix, and
    in ``mixed`` PyTorch computes a part.
    """
    chosen = [s for s in SAMPLES if tag in s.tags]
    assert chosen, f"no sample has the tag {tag}"
    return chosen


SMALL_SAMPLES = _unique_when_small()
CORE = tagged("core")
COVERING = _covering(CORE)
each_sample = each_of(SAMPLES)
each_small_sample = each_of(SMALL_SAMPLES)
COVERING_SMALL = _covering(SMALL_SAMPLES)
#: For gates that see only the arguments of a call, as a compiler does.
each_covering = each_of(CORE, short=COVERING)


def each_tagged(tag: str) -> pytest.MarkDecorator:
    return each_of(tagged(tag))
