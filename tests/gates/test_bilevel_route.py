"""Which regions of keys are most like a region of queries: by the formula, and what changes no bit of the graph."""

import pytest
import torch
import vitkernels as vk
from support.layouts import LAYOUTS

route = vk.bilevel_route
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def maps(*sizes, heads=2, dim=8, dtype=torch.float32):
    return (torch.randn(2, *sizes, heads, dim).to(dtype) for _ in range(2))


def means(t, region):
    """``(B, regions, heads * d)`` in float64: each token is added to the region that its coordinates give."""
    number = torch.zeros((), dtype=torch.int64)
    count = 1
    for size, length in zip(t.shape[1:-2], region, strict=True):
        along = -(-size // length)
        number = number[..., None] * along + torch.arange(size) // length
        count *= along
    total = torch.zeros(t.size(0), count, t[0, 0].numel() // t[0, 0, ..., 0, 0].numel(), dtype=torch.float64)
    total.index_add_(1, number.flatten(), t.flatten(-2).flatten(1, -2).double())
    return total / number.flatten().bincount(minlength=count)[:, None]


def formula(q, k, region, kv_region, topk):
    affinity = means(q, region) @ means(k, kv_region).transpose(1, 2)
    return torch.sort(affinity, descending=True, stable=True)[1][:, None, :, :topk]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "region", "kv_size", "kv_region"),
    [
        ((8, 12), (4, 4), (8, 12), (4, 4)),
        ((15, 13), (4, 5), (15, 13), (4, 5)),
        ((3, 4), (7, 7), (3, 4), (7, 7)),
        ((41, 37), (3, 2), (9, 50), (1, 3)),
        ((29,), (3,), (100,), (2,)),
        ((5, 6, 7), (2, 2, 2), (4, 3, 5), (3, 1, 2)),
    ],
)
def test_formula(size, region, kv_size, kv_region, dtype):
    q, _ = maps(*size, heads=3, dtype=dtype)
    k, _ = maps(*kv_size, heads=3, dtype=dtype)
    topk = min(5, means(k, kv_region).size(1))
    assert torch.equal(route(q, k, region, topk, kv_region), formula(q, k, region, kv_region, topk))


def test_all_regions():
    q, k = maps(9, 10)
    assert torch.equal(route(q, k, 2, 25), formula(q, k, (2, 2), (2, 2), 25))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype):
    """Regions of noise alone differ in the last bits of their products, which decide the order of equal ones."""
    q, k = (t.expand(2, 40, 40, 2, 32) * 0.3 for t in maps(1, 1, dim=32, dtype=dtype))
    noisy = k + 1e-7 * torch.randn(k.shape).to(dtype)
    threads = torch.get_num_threads()
    for keys in (k, noisy):
        found = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found.append(route(q, keys, 8, 25))
        torch.set_num_threads(threads)
        assert all(torch.equal(graph, found[0]) for graph in found[1:])
    assert torch.equal(route(q, k, 8, 25), torch.arange(25).expand(2, 1, 25, 25))


def test_equal_regions_are_in_order():
    q = torch.ones(1, 8, 8, 1, 4, requires_grad=True)
    graph = route(q, q, 2, 5)
    assert graph.tolist() == [[[[0, 1, 2, 3, 4]] * 16]] and not graph.requires_grad


def test_a_nan_comes_first():
    q, k = maps(4, 6)
    k[0, 3, 5, 1, 2] = torch.nan
    k[0, 0, 3, 0, 0] = torch.nan
    assert (route(q, k, 2, 2)[0] == torch.tensor([1, 5])).all()
    assert torch.equal(route(q, k, 2, 2)[1], formula(q, k, (2, 2), (2, 2), 2)[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype):
    q, k = maps(7, 5, dtype=dtype)
    assert torch.equal(route(layout(q), layout(k), (2, 3), 3), route(q, k, (2, 3), 3))


def test_autocast_changes_no_bit():
    """A product of means that are rounded to bfloat16 is another graph."""
    q, k = maps(28, 28, heads=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(route(q, k, 4, 8), formula(q, k, (4, 4), (4, 4), 8))


def test_compiles_for_any_map():
    routes = torch.compile(lambda q, k: route(q, k, 3, 2), dynamic=True, fullgraph=True, backend="aot_eager")
    for size in ((6, 9), (7, 8), (9, 11)):
        q, k = maps(*size)
        assert torch.equal(routes(q, k), route(q, k, 3, 2))


@pytest.mark.parametrize("sizes", [(2, 6, 9, 2, 8), (0, 6, 9, 2, 8), (2, 6, 9, 0, 8), (2, 6, 9, 2, 0), (1, 1, 1, 1, 1)])
def test_opcheck(sizes):
    q, k = torch.randn(sizes), torch.randn(sizes)
    torch.library.opcheck(torch.ops.vitkernels.bilevel_route.default, (q, k, [2, 4], [2, 4], 1))


def test_vmap():
    q, k = torch.randn(3, 2, 6, 9, 2, 8), torch.randn(2, 6, 9, 2, 8)
    found = torch.vmap(lambda q: route(q, k, 2, 4))(q)
    assert torch.equal(found, torch.stack([route(each, k, 2, 4) for each in q]))


def test_empty_maps():
    q = torch.zeros(2, 0, 5, 2, 4)
    assert route(q, torch.zeros(2, 3, 3, 2, 4), 2, 1).shape == (2, 1, 0, 1)
    assert route(torch.zeros(2, 3, 3, 2, 4), q, 2, 0).shape == (2, 1, 4, 0)


BAD = {
    "topk is 5, takes 0 to the number of regions 4": {"topk": 5},
    "topk is -1, takes 0 to the number of regions 4": {"topk": -1},
    "topk is 1.5, takes an integer": {"topk": 1.5},
    "key has shape (2, 8, 8, 1, 4), takes query's": {"key": torch.zeros(2, 8, 8, 1, 4)},
    "region_size is -1": {"region_size": -1},
    "region_size is (2, 2, 2)": {"region_size": (2, 2, 2)},
    "kv_region_size is 0": {"kv_region_size": 0},
    "key is bfloat16, takes float32": {"key": torch.zeros(2, 8, 8, 2, 4, dtype=torch.bfloat16)},
    "key is on ": {"key": torch.zeros(2, 8, 8, 2, 4, device="meta")},
    "query is int64": {name: torch.zeros(2, 8, 8, 2, 4, dtype=torch.int64) for name in ("query", "key")},
    "query has shape (8, 2, 4)": {name: torch.zeros(8, 2, 4) for name in ("query", "key")},
    "query is None": {"query": None},
}


@pytest.mark.parametrize("text", BAD)
def test_errors(text):
    q = torch.zeros(2, 8, 8, 2, 4)
    with pytest.raises(RuntimeError) as raised:
        route(**{"query": q, "key": q, "region_size": 4, "topk": 1} | BAD[text])
    assert f"vitkernels::bilevel_route: {text}" in str(raised.value)


BAD_OPERANDS = {
    "region_size has 1 sizes": {2: [4]},
    "region_size has 0, takes sizes of at least 1": {2: [4, 0]},
    "kv_region_size has 3 sizes": {3: [4, 4, 4]},
    "key has shape (2, 8, 2, 4), takes 5 dimensions": {1: torch.zeros(2, 8, 2, 4)},
    "key has size 3 in dimension 0, takes 2": {1: torch.zeros(3, 8, 8, 2, 4)},
    "key has size 5 in dimension 4, takes 4": {1: torch.zeros(2, 8, 8, 2, 5)},
    "topk is 9": {4: 9},
}


@pytest.mark.parametrize("text", BAD_OPERANDS)
def test_errors_of_the_operator(text):
    q = torch.zeros(2, 8, 8, 2, 4)
    operands = dict(enumerate((q, q, [4, 4], [4, 4], 1))) | BAD_OPERANDS[text]
    with pytest.raises(RuntimeError) as raised:
        torch.ops.vitkernels.bilevel_route(*operands.values())
    assert f"vitkernels::bilevel_route: {text}" in str(raised.value)
