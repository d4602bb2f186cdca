"""The backward's fast paths on a GPU: which calls take them, and that they agree with float64 where their own code may
fail."""

import pytest
import torch
import vitkernels as vk
from support.devices import HALF
from support.emulation import conflicts, nbytes, needs_emulator
from support.operands import ROUNDING, operands, tokens
from vitkernels import reference

pytestmark = needs_emulator

#: What sums for the tokens, by path.
KERNELS = {
    "plain": ["_delta", "_keys", "_queries"],
    "resident": ["_delta", "_keys"],
    "general": ["_delta", "", ""],
}


def kernels_of(emulator):
    """Those of the backward."""
    names = [launch.kernel.removeprefix("vitkernels::") for launch in emulator.launches()]
    return [name.removeprefix("attention_backward") for name in names if name.startswith("attention_backward")]


def leaf(value):
    """A tensor, or tensors, that require a gradient; anything else as it is."""
    if isinstance(value, list):
        return [leaf(v) for v in value]
    return value.detach().requires_grad_() if isinstance(value, torch.Tensor) else value


def gradients(attention, call, grads, options):
    """Of the operands and of all terms."""
    inputs, terms = [leaf(t) for t in call], {name: leaf(t) for name, t in options.items()}
    results = attention(*inputs, return_lse=True, **terms)
    flat = [t for value in terms.values() for t in (value if isinstance(value, list) else [value])]
    return torch.autograd.grad(results, [*inputs, *(t for t in flat if isinstance(t, torch.Tensor))], grads)


def wide(value):
    if isinstance(value, list):
        return [wide(v) for v in value]
    return value.double() if isinstance(value, torch.Tensor) else value


def gradients_of_results(call):
    b, q, h, _ = call[0].shape
    return tokens(b, q, h, call[2].size(3), dtype=call[0].dtype, seed=5), tokens(b, q, h, dtype=torch.float32, seed=6)


def check(call, tolerance=4.0, **options):
    """Against float64: in units of the dtype's rounding, of the largest gradient."""
    grads = gradients_of_results(call)
    found = gradients(vk.attention, call, grads, options)
    expected = gradients(
        reference.attention, wide(list(call)), wide(list(grads)), {n: wide(t) for n, t in options.items()}
    )
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.isfinite().all(), i
        largest = max(1e-30, other.abs().max().item())
        error = (one.double() - other).abs().max().item() / largest / ROUNDING[call[0].dtype]
        assert error <= tolerance, f"{[*'qkv', *options, 'more'][min(i, 3 + len(options))]}: {error:.2f}"
    return found


def path(k, d=32, v=0, **_):
    return "resident" if 128 < k <= 256 and max(d, v or 0) <= 64 else "plain"


SHAPES = [
    {"q": 1, "k": 2, "d": 8}, {"q": 128, "k": 64, "d": 72}, {"q": 129, "k": 300, "d": 64},
    {"q": 33, "k": 197, "d": 64}, {"q": 300, "k": 48, "d": 128}, {"b": 2, "q": 32, "k": 129, "h": 3, "d": 32},
    {"b": 3, "q": 5, "k": 97, "h": 6, "kv_heads": 2, "d": 96}, {"q": 600, "k": 200, "h": 1, "d": 16},
    {"b": 2, "q": 70, "k": 140, "h": 6, "kv_heads": 2, "d": 48}, {"q": 17, "k": 130, "d": 40, "v": 16},
    {"q": 17, "k": 130, "d": 16, "v": 72}, {"q": 2, "k": 1100, "d": 64}, {"b": 2, "q": 257, "k": 257, "h": 1, "d": 24},
    {"q": 64, "k": 2, "d": 8}, {"q": 197, "k": 197, "d": 64}, {"q": 700, "k": 65, "d": 64},
    {"q": 256, "k": 256, "h": 1, "d": 64},
]  # fmt: skip


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, has_bias, cuda_kernels):
    call = operands(**shape, dtype=dtype)
    (_, q, h, _), k = call[0].shape, call[1].size(1)
    bias = tokens(1, h, q, k + k % 2, dtype=torch.float32, seed=3)[..., :k] if has_bias else None
    check(call, **{"bias": bias} if has_bias else {})
    is_wide = max(shape["d"], shape.get("v", 0)) > 64
    expected = KERNELS["general" if has_bias and is_wide else path(**shape)]
    assert kernels_of(cuda_kernels) == [*expected, *["_term"] * has_bias]


#: Numbers of keys that take each of the two paths.
KEYS = {"plain": 50, "resident": 130}
each_path = pytest.mark.parametrize("k", KEYS.values(), ids=KEYS)

GENERAL = {
    "float32": lambda: {"dtype": torch.float32}, "wide": lambda: {"d": 136}, "odd rows": lambda: {"d": 30},
    "causal": lambda: {"is_causal": True}, "head map": lambda: {"head_map": torch.tensor([1, 0])},
    "no scale": lambda: {"scale": 0.0}, "negative scale": lambda: {"scale": -0.5}, "scale": lambda: {"scale": 3e38},
    "multiplier": lambda: {"multiplier": torch.ones(1, 2, 40, 50)},
    "wide bias": lambda: {"d": 72, "bias": torch.zeros(40, 50)},
}  # fmt: skip


@pytest.mark.parametrize("name", GENERAL)
def test_other_calls_take_the_general_kernels(name, cuda_kernels):
    options = GENERAL[name]()
    call = [leaf(t) for t in operands(**{n: options.pop(n) for n in ("dtype", "d") if n in options})]
    vk.attention(*call, **options).sum().backward()
    assert kernels_of(cuda_kernels) == KERNELS["general"]


def test_scales_of_heads_take_the_general_kernels(cuda_kernels):
    """Their gradient is a dot product of each query with its gradient."""
    check(operands(), scale=torch.tensor([0.5, 2.0]), bias=tokens(40, 50, dtype=torch.float32))
    assert kernels_of(cuda_kernels) == [*KERNELS["general"], "_term"]


def odd(*shape):
    return tokens(*shape[:-1], shape[-1] + 1, dtype=torch.float32, seed=3)[..., :-1]


# Of 2 x 38 or 2 x 70 tokens. A table's gradient is a sum of the batch's first.
TERMS = {
    "bias": (lambda n: {"bias": odd(3, n, n)}, ["_term"]),
    "bias of all": (lambda n: {"bias": odd(2, 1, n, n)}, ["_term"]),
    "bias of each": (lambda n: {"bias": odd(2, 3, n, n)}, ["_term"]),
    "bias of queries": (lambda n: {"bias": odd(3, n, 1)}, ["_term"]),
    "key bias": (lambda n: {"key_bias": odd(2, 1, n)}, ["_term"]),
    "key bias of all": (lambda n: {"key_bias": odd(n)}, ["_term"]),
    "two": (lambda n: {"bias": odd(1, 1, n, n), "key_bias": odd(3, n)}, ["_term"] * 2),
    "table": (lambda n: {"bias_table": odd(3, 3, n - 1)}, ["_term", "_table_of_sum"]),
    "shared table": (lambda n: {"bias": odd(n, n), "bias_table": odd(1, 3, n - 1)}, ["_term"] * 2 + ["_table_of_sum"]),
    "embeddings": (lambda n: {"key_bias": odd(n), "rel_pos": [odd(3, 32), odd(n - 1, 32)]}, ["_term"]),
    "embeddings of one axis": (lambda n: {"rel_pos": [odd(2 * n - 1, 32)]}, []),
}  # fmt: skip


@pytest.mark.parametrize("n", [76, 140], ids=["plain", "resident"])
@pytest.mark.parametrize("name", TERMS)
def test_terms(name, n, cuda_kernels):
    make, kernels = TERMS[name]
    terms = make(n)
    check(operands(b=2, h=3, q=n, k=n), **terms)
    # What reaches the queries through embeddings is known after the pass over the keys, so they have another pass.
    is_resident = n > 128 and "rel_pos" not in terms
    assert kernels_of(cuda_kernels) == KERNELS["resident" if is_resident else "plain"] + kernels
    names = [launch.kernel.removeprefix("vitkernels::") for launch in cuda_kernels.launches()]
    keys = names.index("attention_backward_keys")
    if "rel_pos" in terms:
        assert names[keys + 1 : keys + 4] == [
            "relative_logits_backward", "relative_grad_query", "attention_backward_queries",
        ]  # fmt: skip


def test_terms_by_offset_beside_tokens_off_the_grid(cuda_kernels):
    """Class tokens have no offsets, and tiles of queries begin among them."""
    rel_pos = [odd(7, 32), odd(7, 32)]
    check(operands(q=16 + 37, k=16 + 37), rel_pos=rel_pos, bias_table=odd(1, 7, 7), num_prefix_tokens=37)
    assert kernels_of(cuda_kernels) == [*KERNELS["plain"], "_term", "_table_of_sum"]


@each_path
def test_terms_without_a_gradient(k, cuda_kernels):
    """Nothing is stored for them."""
    call, bias = [leaf(t) for t in operands(k=k)], tokens(40, k, dtype=torch.float32)
    vk.attention(*call, bias=bias).sum().backward()
    without = cuda_kernels.counters()["vitkernels::attention_backward_keys"].written.total
    cuda_kernels.reset()
    vk.attention(*call, bias=bias.requires_grad_()).sum().backward()
    stored = cuda_kernels.counters()["vitkernels::attention_backward_keys"].written.total - without
    assert kernels_of(cuda_kernels) == [*KERNELS[path(k)], "_term"]
    assert stored == 2 * 64 * k * call[0].element_size(), "two heads, whole tiles of 32 queries"


def test_terms_of_general_kernels_are_not_expanded(cuda_kernels):
    """They read terms as they are, and take what the fast paths do not: a gradient that begins anywhere."""
    call, table = [leaf(t) for t in operands(q=64, k=64)], leaf(odd(2, 15, 15))
    out = vk.attention(*call, bias_table=table)
    assert "vitkernels::expand_bias" in cuda_kernels.counters()
    cuda_kernels.reset()
    grad_out = tokens(1, 64, 2, 40, seed=5)[..., 3:35]
    found = torch.autograd.grad(out, [*call, table], grad_out)
    assert "vitkernels::expand_bias" not in cuda_kernels.counters()
    assert kernels_of(cuda_kernels) == [*KERNELS["general"], "_table"]
    doubles = [leaf(t) for t in wide([*call, table])]
    expected = reference.attention(*doubles[:3], bias_table=doubles[3])
    for one, other in zip(found, torch.autograd.grad(expected, doubles, grad_out.double()), strict=True):
        torch.testing.assert_close(one.double(), other, atol=4 * ROUNDING[torch.bfloat16] * other.abs().max(), rtol=0)


def test_an_only_token_has_any_stride(cuda_kernels):
    check([t[:, :1, :, :32] for t in operands(b=1, q=3, k=3, h=1, d=33)])
    assert kernels_of(cuda_kernels) == KERNELS["plain"]


@each_path
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_queries_that_do_not_exist_cost_no_more_than_others(has_bias, k, cuda_kernels):
    """P of theirs is zero without the branch that a large LSE takes."""
    instructions = {}
    for q in (33, 64):
        call = [leaf(t) for t in operands(q=q, k=k)]
        out = vk.attention(*call, bias=torch.zeros(q, k) if has_bias else None)
        cuda_kernels.reset()
        out.sum().backward()
        counters = cuda_kernels.counters()
        instructions[q] = sum(
            sum(c.instructions.values()) for name, c in counters.items() if name.endswith(("_keys", "_queries"))
        )
    assert 0 < instructions[33] <= instructions[64]


@each_path
def test_rows_that_see_no_key(k, cuda_kernels):
    """At first, at last, or at all: their gradients are zero."""
    bias = torch.zeros(40, k)
    bias[0, : k - 20], bias[1, 20:], bias[2] = -torch.inf, -torch.inf, -torch.inf
    call = operands(k=k)
    grad_out = gradients_of_results(call)[0]
    inputs = [leaf(t) for t in call]
    term = leaf(bias)
    found = torch.autograd.grad(vk.attention(*inputs, bias=term), [*inputs, term], grad_out)
    narrow = [leaf(t) for t in wide(list(call))]
    expected = torch.autograd.grad(reference.attention(*narrow, bias=bias.double()), narrow, grad_out.double())
    for one, other in zip(found[:3], expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=4 * ROUNDING[torch.bfloat16] * other.abs().max(), rtol=0)
    assert not found[0][:, 2].any() and not found[3][2].any() and not found[3][0, : k - 20].any()
    assert kernels_of(cuda_kernels) == [*KERNELS[path(k)], "_term"]


@each_path
@pytest.mark.parametrize("size", [1e2, 3e3, 1e5, 1e9, 1e18], ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_large_logits(size, has_bias, k, cuda_kernels):
    """Where the LSE times log2(e) is rounded by more than the differences between logits. Rows far from each other, so
    that the float32 LSE tells which is the largest logit."""
    query, key, value = operands(k=k, d=16)
    bias = tokens(40, k, dtype=torch.float32, seed=3) * size if has_bias else None
    query = query * size
    inputs = [leaf(t) for t in (query, key, value)]
    grad_out = gradients_of_results((query, key, value))[0]
    found = torch.autograd.grad(vk.attention(*inputs, bias=bias), inputs, grad_out)
    doubles = [leaf(t) for t in wide([query, key, value])]
    expected = torch.autograd.grad(reference.attention(*doubles, bias=wide(bias)), doubles, grad_out.double())
    # P is as exact as float32 logits of this size.
    tolerance = ROUNDING[torch.bfloat16] * 4 + min(1.0, size * 8 * 2.0**-21)
    for one, other in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(one.double(), other, atol=tolerance * other.abs().max(), rtol=0)
    assert all(t.isfinite().all() for t in found)
    assert kernels_of(cuda_kernels) == KERNELS[path(k, 16)]


@each_path
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_nan_stays_nan(has_bias, k, cuda_kernels):
    """A query's NaN is in its own gradient, in those of all keys, and in no other query's."""
    query, key, value = (leaf(t) for t in operands(k=k))
    with torch.no_grad():
        query[:, 3, :, 5] = torch.nan
    out = vk.attention(query, key, value, bias=torch.zeros(40, k) if has_bias else None)
    grads = torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    assert grads[0][:, 3].isnan().all() and grads[0].isnan().sum() == grads[0][:, 3].numel()
    assert grads[1].isnan().all() and grads[2].isnan().all()


@each_path
def test_padding_is_never_read(k, cuda_kernels):
    """Rows and columns behind the last one hold NaN."""

    def padded(t):
        wide = torch.full((t.size(0), t.size(1) + 3, t.size(2), t.size(3) + 8), torch.nan, dtype=t.dtype)
        wide[:, :-3, :, :-8] = t
        return wide[:, :-3, :, :-8]

    call = [padded(t) for t in operands(k=k, d=40)]
    bias = torch.full((43, k + 2), torch.nan)
    bias[:40, :k] = 0.5
    inputs, term = [t.requires_grad_() for t in call], bias[:40, :k].requires_grad_()
    grad_out = padded(tokens(1, 40, 2, 40))
    found = torch.autograd.grad(vk.attention(*inputs, bias=term), [*inputs, term], grad_out)
    doubles = [leaf(t) for t in wide([*call, bias[:40, :k]])]
    expected = torch.autograd.grad(reference.attention(*doubles[:3], bias=doubles[3]), doubles, grad_out.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=4 * ROUNDING[torch.bfloat16] * other.abs().max(), rtol=0)
    assert kernels_of(cuda_kernels) == [*KERNELS[path(k)], "_term"]


def rows(count, tile):
    """Of whole tiles."""
    return -(-count // tile) * tile


STATISTICS = 16  # bytes of a query's


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("d", "k"), [(32, 120), (32, 200), (64, 120), (64, 200), (64, 264), (128, 200)], ids=str)
def test_traffic(d, k, dtype, cuda_kernels):
    """Tokens that blocks own are read once, those of the other side once for each tile of these; where a block owns
    all keys of a head, everything once. Results are written once, and no access meets a bank conflict."""
    query, key, value = (leaf(tokens(2, n, 1, d, dtype=dtype, seed=i)) for i, n in enumerate((152, k, k)))
    out, lse = vk.attention(query, key, value, return_lse=True)
    cuda_kernels.reset()
    torch.autograd.grad(out, (query, key, value), out.detach().clone())
    counters = {name.removeprefix("vitkernels::attention_backward"): c for name, c in cuda_kernels.counters().items()}
    assert set(counters) == set(KERNELS[path(k, d)])
    streamed = 2 * STATISTICS * rows(152, 32)
    delta, keys = counters["_delta"], counters["_keys"]
    assert delta.read.total == nbytes(out, out, lse, lse), "a warp has four rows, half a sector of lse"
    assert delta.read.distinct == nbytes(out, out, lse)
    assert delta.written.distinct == nbytes(lse) + streamed
    tiles_of_keys = 1 if path(k, d) == "resident" else -(-k // (128 if d <= 64 else 64))
    assert keys.read.total == nbytes(key, value) + tiles_of_keys * (nbytes(query, out) + streamed)
    assert keys.read.distinct == nbytes(key, value, query, out) + streamed
    results = (query, key, value) if path(k, d) == "resident" else (key, value)
    assert keys.written.distinct == nbytes(*results)
    assert keys.written.total == nbytes(*results, *results[:-2]), "a quad writes half a sector of dQ"
    assert conflicts(keys) == {}
    if path(k, d) == "plain":
        queries = counters["_queries"]
        assert queries.read.total == nbytes(query, out) + streamed + 2 * nbytes(key, value)
        assert queries.written.total == queries.written.distinct == nbytes(query)
        assert conflicts(queries) == {}


SPLITS = [
    ({"q": 700, "k": 90, "h": 1, "d": 16}, [1, 2, 6]), ({"q": 600, "k": 200, "h": 1, "d": 16}, [1, 2]),
    ({"q": 90, "k": 600, "h": 1, "d": 16}, [1, 5, 2]), ({"q": 520, "k": 140, "h": 4, "kv_heads": 2, "d": 16}, [1, 8]),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "blocks"), SPLITS, ids=str)
def test_other_tokens_are_split_by_shape(shape, blocks, cuda_kernels):
    """... whatever the GPU, and with the same bits in every run."""
    call = operands(**shape)
    found = check(call)
    grids = [launch.grid[0] for launch in cuda_kernels.launches() if "attention_backward" in launch.kernel]
    assert grids[1:] == blocks[1:]
    cuda_kernels.reset()
    cuda_kernels.configure(multiprocessors=132, seed=1)
    again = gradients(vk.attention, call, gradients_of_results(call), {})
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
