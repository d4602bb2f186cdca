"""What an error says: the operator, the argument, what it got and what it takes. (test_fuzz has the breadth.)"""

import re

import pytest
import torch
import vitkernels as vk
from calls import outputs_of
from devices import DEVICE, FUNCTIONS, ON_CPU, raised_alike


def tokens(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


QKV = {"query": tokens(2, 5, 4, 8), "key": tokens(2, 7, 2, 8), "value": tokens(2, 7, 2, 3)}
TRANSPOSED = {"query": QKV["query"], "key": QKV["key"], "value_q": tokens(2, 5, 4, 3), "lse": tokens(2, 5, 4)}
GRID = {"query": tokens(2, 7, 4, 8)}
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
    ({"bias": tokens(5, 7, dtype=torch.bool)}, "bias is torch.bool, takes a floating dtype"),
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
        GRID | {"rel_pos": [tokens(13, 7)]},
        "rel_pos_width has shape (13, 7), takes (2 n - 1, 8) or (4, 2 n - 1, 8) = (heads, offsets, d)",
    ),
    ({"head_map": torch.tensor([0, 1, 2, 0], device=DEVICE)}, "head_map[2] is 2, takes 0 to 1"),
    ({"head_map": torch.tensor([0, 1], device=DEVICE)}, "head_map has shape (2), takes (4)"),
    ({"head_map": tokens(4)}, "head_map is float32, takes int64 or int32"),
    ({"additional_keys": tokens(2, 1, 2, 8)}, "additional_keys and additional_values must be given together"),
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
ERRORS = [
    *((vk.attention, QKV | wrong, f"vitkernels::attention: {text}") for wrong, text in ATTENTION_ERRORS),
    *(
        (vk.attention_transposed, TRANSPOSED | wrong, f"vitkernels::attention_transposed: {text}")
        for wrong, text in TRANSPOSED_ERRORS
    ),
    *((vk.merge_attentions, PARTS | wrong, f"vitkernels::merge_attentions: {text}") for wrong, text in MERGE_ERRORS),
]


@pytest.mark.parametrize(("function", "call", "text"), ERRORS, ids=[text for _, _, text in ERRORS])
def test_text(function, call, text):
    if not ON_CPU and not raised_alike(function, call, text):
        pytest.skip("other words on this device, or none")
    with pytest.raises(RuntimeError, match=re.escape(text)):
        function(**call)


def test_the_calls_are_right_otherwise():
    """Else the errors above could have another reason."""
    for function, call, shape in (
        (vk.attention, QKV, (2, 5, 4, 3)),
        (vk.attention_transposed, TRANSPOSED, (2, 7, 4, 3)),
        (vk.merge_attentions, PARTS, (2, 5, 3)),
    ):
        if ON_CPU or torch.float32 in FUNCTIONS.get(function.__name__, ()):
            assert outputs_of(function(**call))[0].shape == shape
