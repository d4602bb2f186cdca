"""Attention between routed regions beyond the sample table: what a graph means, memory, layouts and errors."""

import math

import pytest
import torch
import vitkernels as vk

op = vk.regional_routing_attention


def qkv(*sizes, heads=2, dim=8, dtype=torch.float32):
    return (torch.randn(2, *sizes, heads, dim).to(dtype) for _ in range(3))


def every_region(count, batch=2):
    return torch.arange(count).expand(batch, 1, count, count)


def test_all_regions_are_dense_attention():
    q, k, v = qkv(7, 10)
    out, lse = op(q, k, v, None, every_region(6), (4, 4), return_lse=True)
    dense, dense_lse = vk.attention(*(t.flatten(1, 2) for t in (q, k, v)), return_lse=True)
    torch.testing.assert_close(out.flatten(1, 2), dense)
    torch.testing.assert_close(lse.flatten(1, 2), dense_lse)


def test_a_region_listed_twice_counts_twice():
    q, k, v = (t.requires_grad_() for t in qkv(4, 8, dtype=torch.float64))
    graph = torch.tensor([[0, 1, 1], [1, 1, 1]]).expand(2, 1, 2, 3)
    out = op(q, k, v, None, graph, (4, 4))
    left, right = (half.flatten() for half in torch.arange(32).view(4, 8).tensor_split(2, 1))
    added = torch.zeros(32, 32, dtype=torch.float64)
    added[left[:, None], right] = math.log(2)
    added[right[:, None], left] = -torch.inf
    dense = vk.attention(*(t.flatten(1, 2) for t in (q, k, v)), bias=added).view_as(out)
    torch.testing.assert_close(out, dense)
    grads, expected = (torch.autograd.grad(t.sin().sum(), (q, k, v)) for t in (out, dense))
    torch.testing.assert_close(grads, expected)


def test_regions_see_no_other():
    q, k, v = qkv(8, 8)
    graph = torch.tensor([1, 0, 3, 2]).view(1, 1, 4, 1).expand(2, 1, 4, 1)
    out = op(q, k, v, None, graph, 4)
    k[:, :4, :4], v[:, :4, :4] = torch.nan, torch.nan
    poisoned = op(q, k, v, None, graph, 4)
    assert poisoned[:, :4, 4:].isnan().all()
    assert torch.equal(poisoned[:, 4:], out[:, 4:]) and torch.equal(poisoned[:, :4, :4], out[:, :4, :4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_no_bit(dtype):
    graph = torch.randint(6, (2, 1, 6, 2))
    packed = torch.randn(2, 6, 9, 3, 4, 16).to(dtype)
    views = {
        "packed": packed.unbind(3),
        "a crop": torch.randn(3, 2, 8, 12, 4, 16).to(dtype)[:, :, 1:7, 2:11],
        "channels first": torch.randn(3, 2, 4, 16, 6, 9).to(dtype).movedim((2, 3), (4, 5)),
        "mirrored axes": torch.randn(3, 2, 9, 6, 4, 16).to(dtype).transpose(2, 3),
        "every second": torch.randn(3, 2, 6, 18, 4, 16).to(dtype)[:, :, :, ::2],
        "expanded": torch.randn(3, 1, 6, 1, 4, 16).to(dtype).expand(3, 2, 6, 9, 4, 16),
    }
    for name, (q, k, v) in views.items():
        found = op(q, k, v, None, graph, (3, 3))
        assert torch.equal(found, op(q.contiguous(), k.contiguous(), v.contiguous(), None, graph, (3, 3))), name


def test_threads_change_no_bit():
    q, k, v = (t.requires_grad_() for t in qkv(24, 24, heads=1, dim=16))
    graph, threads, found = torch.randint(36, (2, 1, 36, 5)), torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        out = op(q, k, v, None, graph, 4)
        found.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_memory_of_a_large_map():
    """What a gather multiplies by the number of routes: here nothing but the result is made."""
    from benchmarks.measure import resident_peak

    q, k, v = (torch.randn(1, 600, 500, 1, 20) for _ in range(3))
    graph = vk.bilevel_route(q, k, (86, 72), 4)
    data = 4 * q.numel() * q.element_size()
    _, peak = resident_peak(lambda: op(q, k, v, None, graph, (86, 72)))
    assert peak < 0.5 * data


BAD = {
    "region_graph is int16": {"region_graph": torch.zeros(2, 1, 6, 1, dtype=torch.int16)},
    "region_graph has shape": {"region_graph": torch.zeros(2, 6, 1, dtype=torch.int64)},
    "region_graph has 3 heads, takes 1 or 2": {"region_graph": torch.zeros(2, 3, 6, 1, dtype=torch.int64)},
    "region_graph has size 5 in dimension 2, takes 6": {"region_graph": torch.zeros(2, 1, 5, 1, dtype=torch.int64)},
    "region_graph has size 1 in dimension 0, takes 2": {"region_graph": torch.zeros(1, 1, 6, 1, dtype=torch.int64)},
    "region_graph has region 6, takes 0 to 5": {"region_graph": torch.full((2, 1, 6, 1), 6)},
    "region_graph has region -1, takes 0 to 5": {"region_graph": torch.full((2, 1, 6, 1), -1)},
    "region_graph is None": {"region_graph": None},
    "region_size is 0": {"region_size": 0},
    "region_size is (4, 4, 4)": {"region_size": (4, 4, 4)},
    "kv_region_size is 'x'": {"kv_region_size": "x"},
    "kv_region_size has regions of too many tokens": {
        "kv_region_size": 2**30, "outside": "zero", "region_graph": torch.zeros(2, 1, 6, 1, dtype=torch.int64),
    },
    "outside is 'keys', takes None or 'zero'": {"outside": "keys"},
    "qk_norm is 'l1'": {"qk_norm": "l1"},
    "scale is nan": {"scale": float("nan")},
    "value has shape": {"value": torch.zeros(2, 7, 9, 2, 8)},
    "key is bfloat16": {"key": torch.zeros(2, 7, 10, 2, 8, dtype=torch.bfloat16)},
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_errors(text):
    q, k, v = qkv(7, 10)
    graph = torch.zeros(2, 1, 6, 1, dtype=torch.int64)
    given = {"query": q, "key": k, "value": v, "scale": None, "region_graph": graph, "region_size": 4}
    with pytest.raises(RuntimeError) as raised:
        op(**given | BAD[text])
    assert f"vitkernels::regional_routing_attention: {text}" in str(raised.value)
