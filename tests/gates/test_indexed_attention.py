"""Attention to listed keys beyond the sample table: what lists mean, and errors."""

import math

import pytest
import torch
import vitkernels as vk

op = vk.indexed_attention


def qkv(num_queries=12, num_keys=20, heads=2, dim=8, dtype=torch.float32):
    return [torch.randn(2, n, heads, dim).to(dtype) for n in (num_queries, num_keys, num_keys)]


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_all_keys_are_dense_attention(groups):
    q, k, v = qkv()
    out, lse = op(q, k, v, torch.arange(20).expand(2, 1, groups, 20), return_lse=True)
    dense, dense_lse = vk.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, dense)
    torch.testing.assert_close(lse, dense_lse)


def test_a_key_listed_twice_counts_twice():
    q, k, v = (t.requires_grad_() for t in qkv(dtype=torch.float64))
    lists = torch.tensor([[3, 5, 3], [7, 7, 7]]).expand(2, 1, 2, 3)
    out = op(q, k, v, lists)
    added = torch.full((12, 20), -torch.inf, dtype=torch.float64)
    added[:6, 3], added[:6, 5], added[6:, 7] = math.log(2), 0.0, 0.0
    dense = vk.attention(q, k, v, bias=added)
    torch.testing.assert_close(out, dense)
    grads, expected = (torch.autograd.grad(t.sin().sum(), (q, k, v)) for t in (out, dense))
    torch.testing.assert_close(grads, expected)


def test_counts_cut_lists():
    q, k, v = qkv()
    lists, counts = torch.randint(20, (2, 2, 12, 9)), torch.randint(10, (2, 2, 12))
    counts[:, :, 0] = 0
    out, lse = op(q, k, v, lists, counts, return_lse=True)
    k[:, 4], v[:, 4] = torch.nan, torch.nan
    read = ((lists == 4) & (torch.arange(9) < counts.unsqueeze(-1))).any(-1).transpose(1, 2)  # [B, Nq, H]
    poisoned = op(q, k, v, lists, counts)
    assert poisoned[read].isnan().all() and torch.equal(poisoned[~read], out[~read])
    assert (out[:, 0] == 0).all() and (lse[:, 0] == -torch.inf).all()


def test_queries_of_several_groups_get_the_mean():
    q, k, v = qkv(dtype=torch.float64)
    queries, lists = torch.tensor([[0, 3], [3, 9], [3, 0]]).expand(2, 1, 3, 2), torch.randint(20, (2, 1, 3, 5))
    out = op(q, k, v, lists, query_index=queries)
    each = [vk.attention(q[:1], k[:1, lists[0, 0, g]], v[:1, lists[0, 0, g]])[0] for g in range(3)]
    expected = torch.zeros_like(out[0])
    expected[0], expected[9] = (each[0][0] + each[2][0]) / 2, each[1][9]
    expected[3] = (each[0][3] + each[1][3] + each[2][3]) / 3
    torch.testing.assert_close(out[0], expected)


BAD = {
    "key_index is float32, takes int64 or int32": {"key_index": torch.zeros(2, 1, 12, 3)},
    "key_index has shape (2, 12, 3)": {"key_index": torch.zeros(2, 12, 3, dtype=torch.int64)},
    "key_index has 3 heads, takes 1 or 2": {"key_index": torch.zeros(2, 3, 12, 3, dtype=torch.int64)},
    "key_index has 5 groups, takes a divisor of query's 12 tokens": {
        "key_index": torch.zeros(2, 1, 5, 3, dtype=torch.int64)
    },
    "key_index has key 20, takes 0 to 19": {"key_index": torch.full((2, 1, 12, 3), 20)},
    "key_index has key -1, takes 0 to 19": {"key_index": torch.full((2, 1, 12, 3), -1)},
    "key_count has shape (2, 12)": {"key_count": torch.zeros(2, 12, dtype=torch.int64)},
    "key_count has 4, takes 0 to 3": {"key_count": torch.full((2, 1, 12), 4)},
    "query_index has shape (2, 1, 11, 2)": {"query_index": torch.zeros(2, 1, 11, 2, dtype=torch.int64)},
    "return_lse is True, takes False with query_index": {
        "query_index": torch.zeros(2, 1, 12, 2, dtype=torch.int64), "return_lse": True,
    },
    "query_index has query 12, takes 0 to 11": {"query_index": torch.full((2, 1, 12, 2), 12)},
    "query_index is torch.float32": {"query_index": torch.zeros(2, 1, 12, 2)},
    "duplicates is 'last', takes 'mean' or 'sum'": {"duplicates": "last"},
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_errors(text):
    q, k, v = qkv()
    given = {"query": q, "key": k, "value": v, "key_index": torch.zeros(2, 1, 12, 3, dtype=torch.int64)}
    with pytest.raises(RuntimeError) as raised:
        op(**given | BAD[text])
    assert f"vitkernels::indexed_attention: {text}" in str(raised.value)
