"""The rows of routed attention: a region of queries sees the regions of keys that a graph lists."""

from __future__ import annotations

from typing import Any

import torch
from support.sample import Input, RegionGraph, Sample, positive, statistic, uneven_map


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
]
