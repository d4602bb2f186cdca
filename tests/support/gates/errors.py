"""What an error says: the operator, the argument, what it got and what it takes. (test_fuzz has the breadth.)"""

import inspect
import re

import pytest
import torch
import vitkernels as vk
from support.devices import DEVICE, FUNCTIONS, ON_CPU
from vitkernels.functional.score import Options


def tokens(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def integers(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


QKV = {"query": tokens(2, 5, 4, 8), "key": tokens(2, 7, 2, 8), "value": tokens(2, 7, 2, 3)}
TRANSPOSED = {"query": QKV["query"], "key": QKV["key"], "value_q": tokens(2, 5, 4, 3), "lse": tokens(2, 5, 4)}
GRID = {"query": tokens(2, 7, 4, 8)}
VARLEN = {
    "query": tokens(5, 4, 8), "key": tokens(7, 2, 8), "value": tokens(7, 2, 3), "cu_seqlens_q": integers(0, 2, 5),
    "cu_seqlens_k": integers(0, 6, 7), "max_seqlen_q": 3, "max_seqlen_k": 6,
}  # fmt: skip
PARTS = {"outs": [tokens(2, 5, 3)] * 2, "lses": [tokens(2, 5)] * 2}

ATTENTION_ERRORS = [
    ({"query": tokens(5, 4, 8)}, "query has shape (5, 4, 8), takes 4 dimensions (B, Nq, heads, d)"),
    ({"query": tokens(2, 5, 3, 8)}, "key has 2 heads, takes a divisor of query's 3 (or a head_map)"),
    ({"query": tokens(2, 5, 4, 8, dtype=torch.int64)}, "query is int64, takes float64, float32, bfloat16 or float16"),
    ({"key": tokens(3, 7, 2, 8)}, "key has size 3 in dimension 0, takes 2 (query's batch size)"),
    ({"key": tokens(2, 7, 2, 9)}, "key has size 9 in dimension 3, takes 8 (query's head dimension)"),
    ({"value": tokens(2, 6, 2, 3)}, "value has size 6 in dimension 1, takes 7 (key's number of tokens)"),
    ({"value": tokens(2, 7, 2, 3, dtype=torch.bfloat16)}, "value is bfloat16, takes float32"),
    ({"key": tokens(2, 7, 2, 8).to("meta")}, f"key is on meta, takes query's device ({tokens().device})"),
    ({"scale": float("nan")}, "scale is nan, takes a finite number"),
    ({"scale": tokens(3)}, "scale has shape (3), takes (4)"),
    ({"query": tokens(2, 5, 4, 8, dtype=torch.int64), "qk_norm": "l2"}, "query is torch.int64, takes a floating dtype"),
    ({"qk_norm": "l1"}, "qk_norm is 'l1', takes None or 'l2'"),
    ({"bias": tokens(5, 6)}, "bias has shape (5, 6), takes one that broadcasts to (2, 4, 5, 7) = (B, heads, Nq, Nk)"),
    (
        {"bias": tokens(5, 7, dtype=torch.bool)},
        "bias is torch.bool, takes a floating dtype (bias=torch.where(bias, 0.0, -torch.inf))",
    ),
    (
        {"multiplier": tokens(5, 7, dtype=torch.bool)},
        "multiplier is torch.bool, takes a floating dtype (multiplier=multiplier.float())",
    ),
    ({"scale": tokens(dtype=torch.bool)}, "scale is torch.bool, takes a floating dtype"),
    ({"query": tokens(2, 5, 4, 8, dtype=torch.complex64)}, "query is complex64, takes float64, float32, bfloat16"),
    ({"num_prefix_tokens": "one"}, "num_prefix_tokens is 'one', takes an integer"),
    ({"key_bias": tokens(1, 2, 4, 7)}, "key_bias has shape (1, 2, 4, 7), takes one that broadcasts to (2, 4, 7)"),
    ({"bias_table": tokens(4, 13)}, "key has 7 tokens, takes query's 5 with a table by offset"),
    ({"num_prefix_tokens": 1}, "num_prefix_tokens is 1, takes 0 without a table by offset"),
    (
        GRID | {"bias_table": tokens(4, 5, 4)},
        "bias_table has shape (4, 5, 4), takes 1 or 4 (heads), then an odd number 2 n - 1 for each of one to three",
    ),
    (GRID | {"bias_table": tokens(3, 13)}, "bias_table has shape (3, 13), takes 1 or 4 (heads)"),
    (
        GRID | {"multiplier_table": tokens(1, 5, 3)},
        "multiplier_table is of a grid of 1 x 3 x 2 tokens, takes one of 7 = query's 7 less num_prefix_tokens",
    ),
    (GRID | {"bias_table": tokens(1, 13), "num_prefix_tokens": 7}, "num_prefix_tokens is 7, takes 0 to less than"),
    (
        GRID | {"bias_table": tokens(1, 13), "multiplier_table": tokens(1, 3, 13)},
        "multiplier_table has shape (1, 3, 13), of 2 tokens on an axis that has 1 in bias_table",
    ),
    (GRID | {"bias_table": tokens(1, 13, dtype=torch.int64)}, "bias_table is torch.int64, takes a floating dtype"),
    (GRID | {"rel_pos": tokens(13, 8)}, "rel_pos is Tensor, takes a sequence of one table for each of one to three"),
    (GRID | {"rel_pos": []}, "rel_pos has 0 tables, takes a sequence of one table for each of one to three axes"),
    (
        GRID | {"bias_table": tokens(4, 3, 5), "rel_pos": [tokens(5, 8)]},
        "rel_pos has 1 tables, takes one for each of 2 axes",
    ),
    (
        GRID | {"rel_pos": [tokens(13, 7)]},
        "rel_pos[0] has shape (13, 7), takes (2 n - 1, 8) or (4, 2 n - 1, 8) = (heads, offsets, d)",
    ),
    ({"head_map": integers(0, 1)}, "head_map has shape (2), takes (4)"),
    ({"head_map": tokens(4)}, "head_map is float32, takes int64 or int32"),
    ({"additional_keys": tokens(2, 1, 2, 8)}, "additional_keys and additional_values must be given together"),
]
VARLEN_ERRORS = [
    ({"query": tokens(1, 5, 4, 8)}, "query has shape (1, 5, 4, 8), takes 3 dimensions (tokens, heads, d)"),
    ({"value": tokens(6, 2, 3)}, "value has size 6 in dimension 0, takes 7 (key's number of tokens)"),
    ({"cu_seqlens_q": tokens(3)}, "cu_seqlens_q is float32, takes int64 or int32"),
    ({"cu_seqlens_q": tokens(dtype=torch.int64)}, "cu_seqlens_q has shape (), takes 1 dimensions (integers)"),
    ({"cu_seqlens_q": integers(0, 5)}, "cu_seqlens_k has 3 elements, takes as many as cu_seqlens_q (2)"),
    ({"cu_seqlens_k": integers()}, "cu_seqlens_k is empty, takes 0 and the end of each sequence"),
    ({"max_seqlen_q": -1}, "max_seqlen_q is -1, takes 0 to 2147483648"),
    ({"max_seqlen_q": 5.0}, "max_seqlen_q is 5.0, takes an integer"),
    ({"max_seqlen_k": True}, "max_seqlen_k is True, takes an integer"),
    (
        {"bias": tokens(2, 4, 3, 7)},
        "bias has shape (2, 4, 3, 7), takes one that broadcasts to (2, 4, 3, 6) = (B, heads, Nq, Nk)",
    ),
]
# Of values inside tensors, which a GPU does not read up front.
HEAD_MAP_ERRORS = [
    ({"head_map": integers(0, 1, 2, 0)}, "head_map[2] is 2, takes 0 to 1"),
    ({"head_map": integers(0, -(2**31), 1, 0, dtype=torch.int32)}, "head_map[1] is -2147483648, takes 0 to 1"),
]
OFFSET_ERRORS = [
    ({"cu_seqlens_q": integers(1, 2, 5)}, "cu_seqlens_q[0] is 1, takes 0"),
    (
        {"cu_seqlens_q": integers(0, 6, 5)},
        "cu_seqlens_q[1] is 6, takes at least its predecessor and at most the number of tokens 5",
    ),
    (
        {"cu_seqlens_k": integers(0, 2, 1, dtype=torch.int32)},
        "cu_seqlens_k[2] is 1, takes at least its predecessor and at most the number of tokens 7",
    ),
    ({"cu_seqlens_k": integers(0, 2, 6)}, "cu_seqlens_k ends with 6, takes the number of tokens 7"),
    (
        {"cu_seqlens_k": integers(0, 9, 7)[::2]} | {"cu_seqlens_q": integers(0, 5), "max_seqlen_q": 5},
        "cu_seqlens_k gives sequence 0 the length 7, takes at most the largest length 6",
    ),
]
TRANSPOSED_ERRORS = [
    ({"key": tokens(3, 7, 2, 8)}, "key has size 3 in dimension 0, takes 2 (query's batch size)"),
    ({"value_q": tokens(2, 5, 3)}, "value_q has shape (2, 5, 3), takes 4 dimensions (B, Nq, heads, dv)"),
    ({"value_q": tokens(2, 7, 4, 3)}, "value_q has size 7 in dimension 1, takes 5 (query's number of tokens)"),
    ({"value_q": tokens(2, 5, 2, 3)}, "value_q has size 2 in dimension 2, takes 4 (query's number of heads)"),
    ({"value_q": tokens(2, 5, 4, 0)}, "value_q has head dimension 0, takes at least 1"),
    ({"value_q": tokens(2, 5, 4, 3, dtype=torch.float16)}, "value_q is float16, takes float32"),
    ({"lse": tokens(2, 4, 5)}, "lse has shape (2, 4, 5), takes (2, 5, 4)"),
    ({"lse": tokens(2, 5, 4, dtype=torch.bfloat16)}, "lse is bfloat16, takes float32"),
    (
        {"query_weight": tokens(5)},
        "query_weight has shape (5), takes one that broadcasts to (2, 5, 4) = (B, Nq, heads)",
    ),
    ({"query_weight": tokens(5, 1, dtype=torch.bool)}, "query_weight is torch.bool, takes a floating dtype"),
    ({"qk_norm": "l1"}, "qk_norm is 'l1', takes None or 'l2'"),
]
MERGE_ERRORS = [
    ({"outs": [], "lses": []}, "outs is empty, takes at least one tensor"),
    ({"lses": [tokens(2, 5)]}, "lses has 1 tensors, takes as many as outs (2)"),
    ({"outs": [tokens(2, 5, 3), tokens(2, 5, 4)]}, "outs has shape (2, 5, 4), takes (2, 5, 3)"),
    ({"lses": [tokens(2, 5), tokens(2, 6)]}, "lses has shape (2, 6), takes (2, 5)"),
    ({"lses": [tokens(2, 5, dtype=torch.float64)] * 2}, "lses is float64, takes float32"),
]
WIDE = torch.full((5, 7), 1e39, dtype=torch.float64, device=DEVICE)
HOLDS = "takes numbers that torch.float32 holds (to 3.403e+38)"
# Of numbers that a conversion would lose, which is looked for on the CPU alone.
CONVERTED_ERRORS = [
    (vk.attention, QKV | {name: wrong}, f"vitkernels::attention: {name} has {number}, {HOLDS}")
    for name, wrong, number in (
        ("scale", WIDE[0, 0], "1e+39"), ("bias", WIDE, "1e+39"), ("key_bias", WIDE[0], "1e+39"),
        ("multiplier", WIDE, "1e+39"),
    )
]  # fmt: skip
VALUE_ERRORS = [
    *((vk.attention, QKV | wrong, f"vitkernels::attention: {text}") for wrong, text in HEAD_MAP_ERRORS),
    *(
        (vk.attention_varlen, VARLEN | wrong, f"vitkernels::attention_varlen: {text}")
        for wrong, text in HEAD_MAP_ERRORS + OFFSET_ERRORS
    ),
    *((vk.linear_attention, QKV | wrong, f"vitkernels::linear_attention: {text}") for wrong, text in HEAD_MAP_ERRORS),
    *(
        (vk.linear_attention_varlen, VARLEN | wrong, f"vitkernels::linear_attention_varlen: {text}")
        for wrong, text in HEAD_MAP_ERRORS + OFFSET_ERRORS
    ),
]
ON_MAP = {
    "query": tokens(2, 5, 7, 4, 8), "key": tokens(2, 5, 7, 2, 8), "value": tokens(2, 5, 7, 2, 3),
    "axes": (vk.Block(2), vk.Neighborhood(3)),
}  # fmt: skip
SPATIAL_ERRORS = [
    ({"query": tokens(2, 35, 8)}, "query has shape (2, 35, 8), takes 4 to 6 dimensions"),
    ({"key": tokens(2, 35, 2, 8)}, "key has shape (2, 35, 2, 8), takes 5 dimensions"),
    ({"value": tokens(2, 5, 6, 2, 3)}, "value has size 6 in dimension 2, takes 7 (key's map)"),
    ({"query": tokens(2, 5, 7, 3, 8)}, "key has 2 heads, takes a divisor of query's 3 (or a head_map)"),
    ({"axes": (vk.Block(2),)}, "axes has 8 integers, takes 16 = 8 for each axis of query's map"),
    ({"axes": "windows"}, "axes is 'windows', takes a sequence of vitkernels.Full, Block, ..."),
    ({"axes": (vk.Block(2), vk.Neighborhood(8))}, "axes gives axis 1 the size 8, which exceeds its 7 keys"),
    (
        {"axes": (vk.Block(2), vk.Neighborhood(3, dilation=3))},
        "axes gives axis 1 the size 3, which exceeds its 2 keys of",
    ),
    ({"axes": (vk.Block(2, 2), vk.Full())}, "axes gives axis 0 the shift 2, takes 0 to 1"),
    ({"axes": (vk.Full(9), vk.Full())}, "axes gives axis 0 the step 9, takes 1 to 5"),
    ({"axes": (vk.Full(), vk.Neighborhood(3, 4))}, "axes gives axis 1 the stride 4, takes 1 to 3"),
    ({"radius": 0.0}, "radius is 0.0, takes a positive number or None"),
    ({"outside": "one"}, "outside is 'one', takes None, 'zero' or (key_fill, value_fill)"),
    (
        {"query": tokens(2, 5, 7, 4, 8, dtype=torch.int8), "outside": (tokens(2, 8), tokens(2, 3))},
        "query is int8, takes",
    ),
    ({"outside": (tokens(2, 8), tokens(2, 4))}, "outside[1] has shape (2, 4), takes (2, 3)"),
    ({"outside": (tokens(2, 8, dtype=torch.int64), tokens(2, 3))}, "outside[0] is torch.int64, takes a floating dtype"),
    ({"key_bias": tokens(7, 5)}, "key_bias has shape (7, 5), takes one that broadcasts to (2, 4, 5, 7)"),
    ({"bias_table": tokens(4, 3, 3)}, "bias_table has 3 offsets on axis 1, takes at least 5"),
    ({"bias_table": tokens(4, 3, 4)}, "bias_table has shape (4, 3, 4), takes 1 or 4 (heads), then an odd number"),
    ({"bias_table": tokens(4, 5)}, "bias_table has shape (4, 5), takes 3 dimensions"),
    ({"rel_pos": [tokens(5, 8)] * 3}, "rel_pos has 3 tables, takes one for each of 2 axes"),
    ({"is_shared_query": True}, "axes gives axis 0 another rule than blocks that divide key's 5 tokens"),
    ({"scale": float("nan")}, "scale is nan, takes a finite number"),
    ({"qk_norm": "l1"}, "qk_norm is 'l1', takes None or 'l2'"),
    ({"additional_keys": tokens(2, 1, 2, 8)}, "additional_keys and additional_values must be given together"),
]
DATA_ON_MAP = {name: ON_MAP[name] for name in ("query", "key", "value")}
HALVES = {"key": tokens(2, 5, 7, 4, 8), "value": tokens(2, 5, 7, 4, 3)}
NAMED_ERRORS = [
    (vk.na2d, {"kernel_size": (3, 9)}, "kernel_size 9 exceeds the map's axis 1 (7)"),
    (vk.na2d, {"kernel_size": 3, "dilation": 2}, "kernel_size 3 times dilation 2 exceeds the map's axis 0 (5)"),
    (vk.na2d, {"kernel_size": 3, "stride": 4}, "stride is 4, takes at most kernel_size (3)"),
    (vk.na2d, {"kernel_size": (3, 3, 3)}, "kernel_size is (3, 3, 3), takes one value or one for each of 2 axes"),
    (vk.na2d, {"kernel_size": 3, "rpb": tokens(4, 5, 3)}, "rpb has shape (4, 5, 3), takes (heads, 5, 5)"),
    (
        vk.na2d,
        {"kernel_size": 3, "rpb": tokens(4, 5, 5).bool()},
        "rpb is torch.bool, takes a floating dtype (rpb=torch.",
    ),
    (vk.na1d, {"kernel_size": 3}, "query has shape (2, 5, 7, 4, 8), takes 4 dimensions (B, length, heads, d)"),
    (vk.window_attention, {"window_size": (2, 3, 4)}, "window_size is (2, 3, 4), takes one value or one for each of 2"),
    (
        vk.window_attention,
        {"window_size": 3, "bias_table": tokens(24, 4)},
        "bias_table has shape (24, 4), takes (5 * 5, heads)",
    ),
    (vk.grid_attention, {"grid_size": (5, 3)}, "grid_size is 3, takes a divisor of the map's axis 1 (7)"),
    (
        vk.halo_attention,
        {"block_size": 3, "halo_size": 1, "query": tokens(2, 2, 7, 4, 8)},
        "block_size is 3, but 3 tokens of 5 are not a whole number of those of 2 on the other map",
    ),
    (
        vk.criss_cross_attention,
        {"query": tokens(2, 7, 4, 8)},
        "query has shape (2, 7, 4, 8), takes 5 dimensions (B, height, width, heads, d)",
    ),
    (vk.cross_shaped_window_attention, {"stripe_width": 2}, "query has shape (2, 5, 7, 4, 8), takes (B, height, width"),
    (
        vk.cross_shaped_window_attention,
        HALVES | {"stripe_width": 2, "query": tokens(2, 35, 4, 8)},
        "query has shape (2, 35, 4, 8), takes 5 dimensions (B, height, width, heads, d)",
    ),
    (vk.cross_shaped_window_attention, HALVES | {"stripe_width": 0}, "stripe_width is 0, takes an integer from 1 on"),
    (vk.cross_shaped_window_attention, HALVES | {"stripe_width": 2, "scale": tokens(3)}, "scale has shape (3,), takes"),
    # What another function computes, in the words of the one that was called.
    (vk.na2d, {"kernel_size": 3.0}, "kernel_size is 3.0, takes an integer from 1 on"),
    (vk.na2d, {"kernel_size": 3, "is_causal": "no"}, "is_causal is 'no', takes True or False"),
    (vk.na2d, {"kernel_size": 3, "is_causal": (True,)}, "is_causal is (True,), takes one value or one for each of 2"),
    (vk.na2d, {"kernel_size": 3, "scale": tokens(3)}, "scale has shape (3), takes (4)"),
    (vk.na2d, {"kernel_size": 3, "rpb": tokens(3, 5, 5)}, "rpb has shape (3, 5, 5), takes 1 or 4 (heads)"),
    (
        vk.na2d,
        {"kernel_size": 3, "additional_keys": tokens(2, 1, 2, 9), "additional_values": tokens(2, 1, 2, 3)},
        "additional_keys has size 9 in dimension 3, takes 8 (query's head dimension)",
    ),
    (vk.window_attention, {"window_size": 0}, "window_size is 0, takes an integer from 1 on"),
    (vk.window_attention, {"window_size": 5000}, "window_size is 5000 on axis 0, takes 1 to 4096"),
    (vk.window_attention, {"window_size": 3, "shift": 3}, "shift is 3, takes less than window_size (3)"),
    (vk.window_attention, {"window_size": 3, "shift_size": 3}, "shift_size is 3, takes less than window_size (3)"),
    (
        vk.window_attention,
        {"window_size": 3, "shift": 1, "shift_size": 1},
        "shift is 1, takes 0 where shift_size is given (1)",
    ),
    (
        vk.window_attention,
        {"window_size": 3, "rel_pos": [tokens(3, 8)] * 2},
        "rel_pos[0] has 3 offsets on axis 0, takes at least 5",
    ),
    (
        vk.window_attention,
        {"window_size": 3, "is_shared_query": True},
        "window_size is 3, takes a divisor of the map's axis 0 (5) with a shared query",
    ),
    (
        vk.window_attention,
        {"window_size": (5, 7), "is_shared_query": True, "query": tokens(2, 5, 6, 4, 8)},
        "query has shape (2, 5, 6, 4, 8), takes one window (5, 7) with is_shared_query",
    ),
    (vk.grid_attention, {"grid_size": (5, 7), "key_bias": tokens(7, 5)}, "key_bias has shape (7, 5), takes one that"),
    (vk.halo_attention, {"block_size": 2, "halo_size": -1}, "halo_size is -1, takes an integer from 0 on"),
    (vk.halo_attention, {"block_size": 2, "halo_size": 9000}, "halo_size is 9000 on axis 0, takes 0 to 4096"),
    (
        vk.halo_attention,
        {"block_size": 2, "halo_size": 1, "outside": (tokens(2, 7), tokens(2, 3))},
        "outside[0] has shape (2, 7), takes (2, 8)",
    ),
    (vk.criss_cross_attention, {"key_bias": tokens(7, 5)}, "key_bias has shape (7, 5), takes one that broadcasts to"),
    (
        vk.na1d,
        {"query": tokens(2, 5, 4, 8), "key": tokens(2, 6, 2, 8), "value": tokens(2, 6, 2, 3), "kernel_size": 3},
        "query has shape (2, 5, 4, 8), takes key's map (6,)",
    ),
    (
        vk.na3d,
        {name: t[:, None] for name, t in DATA_ON_MAP.items()} | {"query": tokens(2, 1, 5, 6, 4, 8), "kernel_size": 1},
        "query has shape (2, 1, 5, 6, 4, 8), takes key's map (1, 5, 7)",
    ),
]
NAMED = {
    vk.na2d: {"kernel_size": 3},
    vk.window_attention: {"window_size": 3},
    vk.grid_attention: {"grid_size": (5, 7)},
    vk.halo_attention: {"block_size": 3, "halo_size": 1},
    vk.cross_shaped_window_attention: HALVES | {"stripe_width": 2},
    vk.criss_cross_attention: {},
}
CHANNELS = {"query": tokens(2, 5, 4, 8), "key": tokens(2, 5, 4, 3), "value": tokens(2, 7, 4, 3)}
CALLS = [
    (vk.attention, QKV),
    (vk.attention_varlen, VARLEN),
    (vk.attention_transposed, TRANSPOSED),
    (vk.spatial_attention, ON_MAP),
    (vk.linear_attention, QKV),
    (vk.linear_attention_varlen, VARLEN),
    (vk.channel_attention, CHANNELS),
    *((f, DATA_ON_MAP | options) for f, options in NAMED.items()),
]
NESTED = torch.nested.nested_tensor([tokens(5, 4, 8), tokens(3, 4, 8)], layout=torch.jagged)
# Of every function that has the argument.
COMMON_ERRORS = [
    *(
        ({name: wrong}, f"{name} is {text}")
        for name in ("query", "key", "value", "value_q", "lse", "cu_seqlens_q", "cu_seqlens_k")
        for wrong, text in (
            (None, "None, takes a tensor"),
            ([1.0], "a list, takes a tensor"),
            (NESTED, "a nested tensor, takes a strided one"),
            (tokens(2, 5).to_sparse(), "a torch.sparse_coo tensor, takes a strided one"),
            (torch.quantize_per_tensor(tokens(2, 5), 0.1, 0, torch.qint8), "a quantized tensor, takes a strided one"),
        )
    ),
    *(
        ({name: 0.5}, f"{name} is a float, takes a tensor")
        for name in ("bias", "key_bias", "multiplier", "bias_table", "multiplier_table", "head_map", "query_weight")
    ),
    ({"scale": 1e39}, "scale is 1e+39, takes a finite number in torch.float32"),
    ({"scale": 10**400}, f"scale is 1{'0' * 400}, takes a number"),
    ({"scale": "1"}, "scale is '1', takes a number"),
    ({"scale": NESTED}, "scale is a nested tensor, takes a strided one"),
    ({"radius": "1"}, "radius is '1', takes a number"),
    ({"is_causal": "no"}, "is_causal is 'no', takes True or False"),
    ({"return_lse": "no"}, "return_lse is 'no', takes True or False"),
    ({"is_shared_query": 1}, "is_shared_query is 1, takes True or False"),
]


def takes(function, name):
    parameters = inspect.signature(function).parameters
    return name in parameters or ("options" in parameters and name in Options.__optional_keys__)


LINEAR_ERRORS = [
    (
        {"feature_map": "gelu"},
        "feature_map is 'gelu', takes 'identity', 'relu', 'elu', 'exp', 'focused' or a vitkernels.",
    ),
    ({"normalize": 1}, "normalize is 1, takes True or False"),
    ({"eps": -1e-3}, "eps is -0.001, takes a number that is not negative"),
    ({"eps": float("nan")}, "eps is nan, takes a finite number in torch.float32"),
    ({"scale": tokens(4)}, "scale is a tensor, takes a number"),
    ({"qk_norm": "l1"}, "qk_norm is 'l1', takes None or 'l2'"),
    ({"residual_v": 0.5}, "residual_v is 0.5, takes 0 where query has 5 tokens and key 7"),
    ({"key": tokens(2, 7, 3, 8)}, "value has size 2 in dimension 2, takes 3 (key's number of heads)"),
    ({"key": tokens(2, 7, 3, 8), "value": tokens(2, 7, 3, 3)}, "key has 3 heads, takes a divisor of query's 4"),
    ({"key": tokens(1, 7, 2, 8)}, "key has size 1 in dimension 0, takes 2 (query's batch size)"),
    ({"query": tokens(2, 5, 4)}, "query has shape (2, 5, 4), takes 4 dimensions (B, Nq, heads, d)"),
    (
        {"feature_map": vk.FeatureMap("performer", projection=tokens(6, 8)), "key": tokens(2, 7, 2, 8).to(torch.int8)},
        "key is torch.int8, takes a floating dtype",
    ),
    (
        {"feature_map": vk.FeatureMap("performer", projection=tokens(6, 8)), "value": tokens(2, 7, 2, 3).half()},
        "value is torch.float16, takes query's torch.float32",
    ),
    (
        {"feature_map": vk.FeatureMap("performer", projection=tokens(6, 7))},
        "feature_map has a projection of shape (6, 7), takes (features, 8), the head dimension of query",
    ),
]

ERRORS = [
    *((vk.linear_attention, QKV | wrong, f"vitkernels::linear_attention: {text}") for wrong, text in LINEAR_ERRORS),
    *(
        (vk.linear_attention_varlen, VARLEN | wrong, f"vitkernels::linear_attention_varlen: {text}")
        for wrong, text in VARLEN_ERRORS
        if "bias" not in wrong
    ),
    *(
        (vk.spatial_attention, ON_MAP | wrong, f"vitkernels::spatial_attention: {text}")
        for wrong, text in SPATIAL_ERRORS
    ),
    *((f, DATA_ON_MAP | wrong, f"vitkernels::{f.__name__}: {text}") for f, wrong, text in NAMED_ERRORS),
    *(
        (f, call | wrong, f"vitkernels::{f.__name__}: {text}")
        for f, call in CALLS
        for wrong, text in COMMON_ERRORS
        if takes(f, *wrong)
    ),
    *(
        (f, DATA_ON_MAP | options | {name: other}, f"vitkernels::{f.__name__}: {name} has shape {tuple(other.shape)}")
        for f, options in NAMED.items()
        for name, other in (("query", tokens(2, 5, 6, 4, 8)), ("value", tokens(2, 5, 6, 2, 3)))
        if name == "value" or f not in (vk.window_attention, vk.halo_attention)  # whose maps may differ
    ),
    *((vk.attention, QKV | wrong, f"vitkernels::attention: {text}") for wrong, text in ATTENTION_ERRORS),
    *((vk.attention_varlen, VARLEN | wrong, f"vitkernels::attention_varlen: {text}") for wrong, text in VARLEN_ERRORS),
    *(
        (vk.attention_transposed, TRANSPOSED | wrong, f"vitkernels::attention_transposed: {text}")
        for wrong, text in TRANSPOSED_ERRORS
    ),
    *((vk.merge_attentions, PARTS | wrong, f"vitkernels::merge_attentions: {text}") for wrong, text in MERGE_ERRORS),
]


def each_error(rows):
    return pytest.mark.parametrize(("function", "call", "text"), rows, ids=[text[:120] for _, _, text in rows])


def check_text(function, call, text):
    if not ON_CPU and function.__name__ not in FUNCTIONS:
        pytest.skip("other words on this device, or none")
    with pytest.raises(RuntimeError, match=re.escape(text)):
        function(**call)
