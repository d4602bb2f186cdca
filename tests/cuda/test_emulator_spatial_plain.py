"""The forward's fast path over maps on a GPU: which calls take it, and that it agrees with float64 where its own code
may fail."""

import pytest
import torch
import vitkernels as vk
from support.devices import HALF
from support.emulation import needs_emulator
from support.operands import ROUNDING, tokens
from vitkernels import reference

pytestmark = needs_emulator

PLAIN = "spatial_attention_plain"
Near = vk.Neighborhood


def kernels_of(emulator):
    return [launch.kernel.removeprefix("vitkernels::") for launch in emulator.launches()]


def operands(size, keys=None, b=2, h=2, kv_heads=None, d=32, v=None, dtype=torch.bfloat16):
    query = tokens(b, *size, h, d, dtype=dtype, seed=0)
    return [query, *(tokens(b, *(keys or size), kv_heads or h, n, dtype=dtype, seed=n) for n in (d, v or d))]


def table(call, heads, seed=3):
    """Of each offset on the map of the queries, or of the keys, whichever is longer."""
    sizes = [2 * max(n, m) - 1 for n, m in zip(call[0].shape[1:-2], call[1].shape[1:-2], strict=True)]
    return tokens(heads, *sizes, dtype=torch.float32, seed=seed)


def check(call, axes, **options):
    """Against float64: the output in units of the dtype's rounding, the LSE to float32's."""
    found, lse = vk.spatial_attention(*call, axes, return_lse=True, **options)
    wide = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    expected, expected_lse = reference.spatial_attention(*(t.double() for t in call), axes, return_lse=True, **wide)
    largest = max(1.0, call[2].double().abs().max().item())
    assert (found.double() - expected).abs().max() <= 2 * ROUNDING[call[0].dtype] * largest
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-4)


#: Axes, sizes, and other options.
CALLS = {
    "2-d": ([Near(7)] * 2, {"size": (18, 21)}, {}),
    "64 columns": ([Near(5)] * 2, {"size": (9, 20), "d": 64, "v": 40}, {}),
    "128 columns": ([Near(5)] * 2, {"size": (9, 20), "d": 72, "v": 128}, {}),
    "3-d": ([Near(3), Near(5), Near(3)], {"size": (4, 6, 5)}, {}),
    "short": ([Near(9)], {"size": (27,)}, {}),
    "dilated": ([Near(3, dilation=2), Near(5, dilation=3)], {"size": (9, 17)}, {}),
    "stride": ([Near(6, stride=3), Near(4, stride=2)], {"size": (12, 13)}, {}),
    "causal": ([Near(5, is_causal=True), Near(7)], {"size": (11, 14)}, {}),
    "sliding": ([vk.Sliding(5), vk.Sliding(3)], {"size": (10, 12)}, {}),
    "zeros outside": ([vk.Sliding(5), vk.Sliding(3)], {"size": (10, 12)}, {"outside": "zero"}),
    "all keys of an axis": ([vk.Full(), Near(3)], {"size": (6, 30)}, {}),
    "all keys": ([Near(7), Near(9)], {"size": (7, 9)}, {}),
    "blocks": ([vk.Block(12), vk.Block(9)], {"size": (24, 18), "h": 1}, {}),
    "shifted blocks": ([vk.Block(10, shift=4), vk.Block(8, shift=3)], {"size": (25, 19), "h": 1}, {}),
    "causal blocks": ([vk.Block(10, is_causal=True), vk.Block(7)], {"size": (20, 14), "h": 1}, {}),
    "halos": ([vk.Halo(4, 2)] * 2, {"size": (12, 10)}, {}),
    "halos of zeros": ([vk.Halo(4, 3)] * 2, {"size": (8, 10)}, {"outside": "zero"}),
    "other keys": ([vk.Block(4, key_size=2), vk.Full()], {"size": (12, 9), "keys": (6, 11)}, {}),
    "grouped heads": ([Near(3)] * 2, {"size": (8, 8), "h": 6, "kv_heads": 2}, {}),
}  # fmt: skip


@pytest.mark.parametrize("has_table", [False, True], ids=["plain", "table"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_patterns(name, dtype, has_table, cuda_kernels):
    axes, sizes, options = CALLS[name]
    call = operands(**sizes, dtype=dtype)
    check(call, axes, **options, **({"bias_table": table(call, call[0].size(-2))} if has_table else {}))
    assert kernels_of(cuda_kernels) == [PLAIN]


@pytest.mark.parametrize("size", [1e2, 3e3, 1e5, 1e9], ids=str)
def test_large_logits(size, cuda_kernels):
    """Of a row that has seen no key yet, the mask is no maximum; and differences of large logits are exact enough."""
    query, key, value = operands((12, 20))
    found, lse = vk.spatial_attention(query * size, key, value, [Near(3)] * 2, return_lse=True)
    wide = [t.double() for t in (query * size, key, value)]
    expected, expected_lse = reference.spatial_attention(*wide, [Near(3)] * 2, return_lse=True)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-4)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02 + min(1.0, size * 2.0**-19) * 4)
    assert kernels_of(cuda_kernels) == [PLAIN]


def test_logits_far_below_zero(cuda_kernels):
    """Rows whose logits are all negative, and tiles of keys that a row does not see before those that it sees."""
    query, key, value = operands((40, 16), b=1, h=1)
    check((query.abs() * 40, -key.abs() * 40, value), [Near(3)] * 2)
    assert kernels_of(cuda_kernels) == [PLAIN]


def test_tables_that_hide_keys(cuda_kernels):
    """-inf hides a key; a row may see none."""
    call = operands((10, 12), h=2)
    bias = table(call, 2)
    bias[0, 9, 11] = bias[1, 8:11, 10:13] = -torch.inf
    check(call, [Near(3)] * 2, bias_table=bias)
    lowest = torch.full_like(bias, torch.finfo(torch.float32).min)
    out = vk.spatial_attention(*call, [Near(5)] * 2, bias_table=lowest)
    even = vk.spatial_attention(call[0] * 0, *call[1:], [Near(5)] * 2)
    torch.testing.assert_close(out, even, rtol=0, atol=0.02)
    assert set(kernels_of(cuda_kernels)) == {PLAIN}


def test_tables_of_any_size(cuda_kernels):
    """Pairs that the pattern hides may read any entry."""
    call = operands((12, 20), h=1)
    bias = table(call, 1)
    bias[:, :9] = bias[:, -9:] = bias[..., :15] = bias[..., -15:] = 3e38
    check(call, [Near(3)] * 2, bias_table=bias)
    assert kernels_of(cuda_kernels) == [PLAIN]


def test_axes_of_one_token(cuda_kernels):
    """Their stride says nothing, also where there are keys outside the map."""
    call = [tokens(2, 200, 2, 32, seed=i).unsqueeze(-1).movedim(-1, 1) for i in range(3)]
    check(call, [vk.Sliding(5)] * 2, outside="zero")
    assert kernels_of(cuda_kernels) == [PLAIN]


def test_any_strides(cuda_kernels):
    packed = tokens(2, 9, 14, 3, 2, 32)
    check(packed.unbind(3), [Near(3)] * 2)
    check([t[:, ::2, :, :, :24] for t in operands((28, 14))], [Near(5)] * 2)
    check([t.transpose(1, 2) for t in operands((7, 21))], [Near(5)] * 2)
    check([t[:1].expand(3, -1, -1, -1, -1) for t in operands((9, 9))], [Near(5)] * 2)
    assert set(kernels_of(cuda_kernels)) == {PLAIN}


def test_shared_query(cuda_kernels):
    query = tokens(2, 10, 10, 2, 32)
    check([query, *operands((20, 20))[1:]], [vk.Block(10)] * 2, is_shared_query=True)
    assert kernels_of(cuda_kernels) == [PLAIN]


def test_same_bits_in_every_run(cuda_kernels):
    call = operands((20, 20))
    found = vk.spatial_attention(*call, [Near(7)] * 2, bias_table=table(call, 2))
    cuda_kernels.configure(multiprocessors=132, seed=1)
    assert torch.equal(found, vk.spatial_attention(*call, [Near(7)] * 2, bias_table=table(call, 2)))


#: Options, and arguments of `operands`. (The emulator knows memory from the fixture on.)
GENERAL = {
    "float32": lambda: ({}, {"dtype": torch.float32}), "odd rows": lambda: ({}, {"d": 30}),
    "wide": lambda: ({}, {"d": 136}), "radius": lambda: ({"radius": 2.0}, {}),
    "no scale": lambda: ({"scale": 0.0}, {}), "negative scale": lambda: ({"scale": -0.5}, {}),
    "scale of heads": lambda: ({"scale": torch.tensor([0.5, 2.0])}, {}),
    "key bias": lambda: ({"key_bias": torch.ones(9, 9)}, {}),
    "multiplier": lambda: ({"multiplier_table": torch.ones(2, 17, 17)}, {}),
    "embeddings": lambda: ({"rel_pos": [torch.ones(17, 32, dtype=torch.bfloat16)] * 2}, {}),
    "fills": lambda: ({"outside": (torch.ones(2, 32, dtype=torch.bfloat16),) * 2}, {}),
    "large table": lambda: ({"bias_table": torch.ones(2, 49, 49)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", GENERAL)
def test_other_calls_take_the_general_kernel(name, cuda_kernels):
    options, sizes = GENERAL[name]()
    vk.spatial_attention(*operands((9, 9), **sizes), [vk.Sliding(3)] * 2, **options)
    assert kernels_of(cuda_kernels)[-1] == "spatial_attention"


def test_long_neighborhoods_take_the_general_kernel(cuda_kernels):
    """Its tiles may have more queries on an axis than a mask has columns, and share more keys."""
    vk.spatial_attention(*operands((400,)), [Near(129)])
    assert kernels_of(cuda_kernels) == ["spatial_attention"]
