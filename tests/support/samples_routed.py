"""The rows of attention to listed keys: of regions that a graph lists, or of tokens."""

from __future__ import annotations

from typing import Any

import torch
from support.sample import Indices, Input, RegionGraph, Sample, positive, statistic, uneven_map


def routed(
    id: str, query_map: tuple[int, ...], region: tuple[int, ...], *, key_map: tuple[int, ...] | None = None,
    kv_region: tuple[int, ...] | None = None, topk: int = 3, of_heads: bool = False, b: int = 2, h: int = 4, g: int = 2,
    d: int = 16, v: int = 24, tags: str = "", **arguments: Any,
) -> Sample:  # fmt: skip
    letters = "zyx"[-len(query_map) :]
    of_keys = letters if key_map is None else "jiw"[-len(key_map) :]
    data: dict[str, Any] = {
        "query": Input(f"b{letters}hd"), "key": Input(f"b{of_keys}gd"), "value": Input(f"b{of_keys}gv"), "scale": None,
        "region_graph": RegionGraph(letters, of_keys, region, kv_region or region, topk, "h" if of_heads else "1"),
        "region_size": region, "kv_region_size": kv_region,
    }  # fmt: skip
    sizes = {"b": b, "h": h, "g": g, "d": d, "v": v}
    sizes |= dict(zip(letters, query_map, strict=True)) | dict(zip(of_keys, key_map or query_map, strict=True))
    return Sample("regional_routing_attention", id, {**data, **arguments}, sizes, frozenset(tags.split()))


def indexed(
    id: str, key_index: str, *, b: int = 2, q: int = 33, k: int = 67, h: int = 4, g: int = 2, d: int = 16, v: int = 24,
    w: int = 21, tags: str = "", **arguments: Any,
) -> Sample:  # fmt: skip
    """Lists of ``w`` keys; where queries are listed, there are ``e`` groups of ``m``."""
    data = {"query": Input("bqhd"), "key": Input("bkgd"), "value": Input("bkgv"), "key_index": Indices(key_index, "k")}
    sizes = {"b": b, "q": q, "k": k, "h": h, "g": g, "d": d, "v": v, "w": w, "e": 7, "m": 11}
    return Sample("indexed_attention", id, {**data, **arguments}, sizes, frozenset(tags.split()))


ROUTED_SAMPLES = [
    routed("plain", (13, 10), (3, 5), tags="core deploy"),
    routed("of-heads", (8, 12), (4, 4), topk=2, of_heads=True, g=4, scale=statistic("h", positive), return_lse=True),
    routed("zero", (10, 13), (3, 5), outside="zero", scale=0.3, tags="core"),
    routed("key-map", (13, 10), (4, 5), key_map=(7, 6), kv_region=(3, 4), topk=2, return_lse=True, tags="mixed"),
    routed("large-regions", (3, 5), (7, 7), topk=1, outside="zero", g=1),
    routed("line", (131,), (20,), topk=4, g=4, d=33, v=7, qk_norm="l2", tags="mixed"),
    routed("volume", (3, 5, 6), (2, 2, 4), topk=5, g=1),
    routed("long", (38, 31), (31, 30), topk=3, b=1, h=2, g=1, d=8, v=8),
    routed("head-map", (8, 12), (3, 5), g=3, head_map=Input("h", uneven_map, dtype=torch.int64)),
    routed("of-tokens", (13, 10), (1, 1), topk=9, d=32, v=32),
    routed("no-routes", (5, 6), (2, 3), topk=0),
    routed("no-batch", (5, 6), (2, 3), b=0),
    indexed("plain", "b1qw", tags="core deploy"),
    indexed("counts", "bhqw", key_count=Indices("bhq", "w", "k"), g=4, scale=statistic("h", positive), return_lse=True),
    indexed("one-group", "bh1w", w=900, k=131, g=1, tags="mixed"),
    indexed("clusters", "bhew", query_index=Indices("bhem", "q"), key_count=Indices("bhe", "w", "k"), tags="core"),
    indexed(
        "all-heads",
        "b1ew",
        query_index=Indices("b1em", "q"),
        qk_norm="l2",
        g=3,
        d=33,
        v=5,
        tags="mixed",
        duplicates="sum",
        head_map=Input("h", uneven_map, dtype=torch.int64),
    ),
    indexed("no-keys", "b1qw", k=0),
]
