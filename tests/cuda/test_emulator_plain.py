"""The forward's fast paths on a GPU: which calls take them, and that they agree with float64 where their own code may
fail."""

import pytest
import torch
import vitkernels as vk
from support.devices import HALF
from support.emulation import needs_emulator
from support.operands import ROUNDING, operands, tokens
from vitkernels import reference

pytestmark = needs_emulator


def kernels_of(emulator):
    return [launch.kernel.removeprefix("vitkernels::") for launch in emulator.launches()]


def check(call, **options):
    """Against float64: the output in units of the dtype's rounding, the LSE to float32's."""
    found, lse = vk.attention(*call, return_lse=True, **options)
    wide = {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in options.items()}
    expected, expected_lse = reference.attention(*(t.double() for t in call), return_lse=True, **wide)
    largest = max(1.0, call[2].double().abs().max().item())
    assert (found.double() - expected).abs().max() <= 2 * ROUNDING[call[0].dtype] * largest
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-4)


#: Queries that take each of the two paths, with few keys and columns.
QUERIES = {"plain": 40, "resident": 70}
each_path = pytest.mark.parametrize("q", QUERIES.values(), ids=QUERIES)


def path(q, k, d=32, v=0, **_):
    return "attention_resident" if q >= 64 and k <= 256 and max(d, v) <= 64 else "attention_plain"


SHAPES = [
    {"q": 1, "k": 2, "d": 8}, {"q": 128, "k": 64, "d": 72}, {"q": 129, "k": 300, "d": 64},
    {"q": 33, "k": 197, "d": 64}, {"q": 300, "k": 48, "d": 128},
    {"b": 3, "q": 5, "k": 97, "h": 6, "kv_heads": 2, "d": 96},
    {"q": 17, "k": 130, "d": 40, "v": 16}, {"q": 17, "k": 130, "d": 16, "v": 72}, {"q": 2, "k": 1100, "d": 64},
    {"b": 2, "q": 257, "k": 257, "h": 1, "d": 24}, {"q": 64, "k": 2, "d": 8}, {"q": 197, "k": 197, "d": 64},
    {"q": 70, "k": 64, "d": 32}, {"q": 65, "k": 65, "d": 64}, {"q": 256, "k": 256, "h": 1, "d": 64},
    {"b": 3, "q": 64, "k": 192, "h": 6, "kv_heads": 2, "d": 48, "v": 24}, {"q": 100, "k": 209, "d": 16, "v": 40},
]  # fmt: skip


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, has_bias, cuda_kernels):
    call = operands(**shape, dtype=dtype)
    (_, q, h, _), k = call[0].shape, call[1].size(1)
    bias = tokens(1, h, q, k + k % 2, dtype=torch.float32, seed=3)[..., :k] if has_bias else None
    check(call, bias=bias)
    assert kernels_of(cuda_kernels)[0] == path(**shape)


@pytest.mark.parametrize(
    "bias_shape", [(2, 3, 40, 50), (1, 3, 40, 50), (2, 1, 40, 50), (1, 1, 1, 50), (40, 50)], ids=str
)
def test_biases_are_broadcast(bias_shape, cuda_kernels):
    check(operands(b=2, h=3), bias=tokens(*bias_shape, dtype=torch.float32, seed=3))
    assert kernels_of(cuda_kernels) == ["attention_plain"]


TERMS = ("bias", "key_bias")
GENERAL = {
    "float32": lambda: {"dtype": torch.float32}, "wide": lambda: {"d": 136}, "odd rows": lambda: {"d": 30},
    "causal": lambda: {"is_causal": True}, "head map": lambda: {"head_map": torch.tensor([1, 0])},
    "no scale": lambda: {"scale": 0.0}, "negative scale": lambda: {"scale": -0.5}, "scale": lambda: {"scale": 3e38},
    "scale of heads": lambda: {"scale": torch.tensor([0.5, 2.0])},
    "multiplier": lambda: {"multiplier": torch.ones(1, 2, 40, 50)},
    "bias and multiplier": lambda: {"key_bias": torch.ones(50), "multiplier": torch.ones(1, 2, 40, 50)},
    "long bias": lambda: {"k": 3001, "q": 1400, "h": 4, "d": 8, "bias": torch.ones(4, 1, 1).expand(-1, 1400, 3001)},
}  # fmt: skip


def test_largest_scale(cuda_kernels):
    """Its product with log2(e) overflows, but logits are zero."""
    query, key, value = operands()
    torch.testing.assert_close(vk.attention(query * 0, key, value, scale=3e38), vk.attention(query * 0, key, value))


@pytest.mark.parametrize("name", GENERAL)
def test_other_calls_take_the_general_kernel(name, cuda_kernels):
    options = GENERAL[name]()
    call = operands(**{n: options.pop(n) for n in ("dtype", "d", "q", "k", "h") if n in options})
    vk.attention(*call, **options)
    assert kernels_of(cuda_kernels)[0] == "attention"


def odd(*shape):
    return tokens(*shape[:-1], shape[-1] + 1, dtype=torch.float32, seed=3)[..., :-1]


# Terms whose sum becomes a dense bias, and for how many (batch, heads) it differs.
EXPANDED = {
    "odd rows": (lambda: {"bias": odd(40, 50)}, (1, 1)), "of queries": (lambda: {"bias": odd(3, 40, 1)}, (1, 3)),
    "shifted": (lambda: {"bias": tokens(2001, dtype=torch.float32)[1:].view(40, 50)}, (1, 1)),
    "of keys": (lambda: {"key_bias": odd(2, 1, 50)}, (2, 1)),
    "two": (lambda: {"key_bias": odd(3, 50), "bias": odd(2, 1, 40, 50)}, (2, 3)),
    "table": (lambda: {"bias_table": odd(3, 3, 75), "scale": torch.tensor([0.5, 1.0, -2.0])}, (1, 3)),
    "shared table": (lambda: {"bias_table": odd(1, 3, 75), "bias": odd(40, 50)}, (1, 1)),
    "embeddings": (lambda: {"rel_pos": [odd(3, 32), odd(75, 32)], "key_bias": odd(50)}, (2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPANDED)
def test_terms_that_become_a_bias(name, cuda_kernels):
    make, (batch, heads) = EXPANDED[name]
    terms = make()
    on_grid = "bias_table" in terms or "rel_pos" in terms
    if on_grid:  # of 2 x 38 tokens
        terms |= {n: odd(*(76 if s in (40, 50) else s for s in t.shape)) for n, t in terms.items() if n in TERMS}
    check(operands(b=2, h=3, **({"q": 76, "k": 76} if on_grid else {})), **terms)
    *before, expand, attention = cuda_kernels.launches()
    expected = ["vitkernels::expand_bias", f"vitkernels::{path(76 if on_grid else 40, 76 if on_grid else 50)}"]
    assert [expand.kernel, attention.kernel] == expected
    assert expand.grid[0] == batch * heads * (5 if on_grid else 3)  # tiles of 16 queries and 128 keys
    assert len(before) == ("rel_pos" in terms)


@each_path
def test_biases_take_any_scale(q, cuda_kernels):
    for scale in (-0.5, 0.0, torch.tensor([0.5, -2.0])):
        check(operands(q=q), bias=tokens(q, 50, dtype=torch.float32, seed=3), scale=scale)
    assert set(kernels_of(cuda_kernels)) == {path(q, 50)}


def test_shared_queries_and_strides_of_one_token(cuda_kernels):
    """A stride of an axis that has one element says nothing about alignment."""
    query, key, value = operands(b=2, q=1)
    odd = torch.zeros(2 * 64 + 3, dtype=query.dtype).as_strided((2, 1, 2, 32), (64, 3, 32, 1)).copy_(query)
    check((odd, key, value))
    check((query[:1].expand(2, -1, -1, -1), key, value))
    assert kernels_of(cuda_kernels) == ["attention_plain"] * 2


@pytest.mark.parametrize(("q", "k"), [(4, 200), (4, 600), (64, 200)], ids=["plain", "split", "resident"])
def test_rows_that_see_no_key(q, k, cuda_kernels):
    """At first, at last, or at all: -inf is no number to subtract."""
    bias = torch.zeros(q, k)
    bias[0, : k - 70], bias[1, 70:], bias[2] = -torch.inf, -torch.inf, -torch.inf
    call = operands(q=q, k=k)
    check(call, bias=bias)
    out, lse = vk.attention(*call, bias=bias, return_lse=True)
    assert not out[:, 2].any() and (lse[:, 2] == -torch.inf).all()


@each_path
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_nan_stays_nan(has_bias, q, cuda_kernels):
    """In its row, and in no other."""
    query, key, value = operands(q=q)
    query[:, 3, :, 5] = torch.nan
    out, lse = vk.attention(query, key, value, bias=torch.zeros(q, 50) if has_bias else None, return_lse=True)
    for found in (out, lse):
        assert found[:, 3].isnan().all() and found.isnan().sum() == found[:, 3].numel()
    assert kernels_of(cuda_kernels) == [path(q, 50)]


@each_path
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e30], ids=str)
def test_masks_of_the_lowest_number(lowest, q, cuda_kernels):
    """A row of nothing else is a mean, as in torch; in other rows it is no key."""
    bias = torch.zeros(q, 130)
    bias[0], bias[1, 40:], bias[2, :40] = lowest, lowest, lowest
    call = operands(q=q, k=130)
    out = vk.attention(*call, bias=bias)
    torch.testing.assert_close(out[:, 0].float(), call[2].float().mean(1), atol=4e-3, rtol=0)
    torch.testing.assert_close(out[:, 1:], vk.reference.attention(*call, bias=bias)[:, 1:], atol=1e-2, rtol=0)


@each_path
@pytest.mark.parametrize("size", [1e2, 3e3, 1e5, 1e9, 1e18], ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_large_logits(size, has_bias, q, cuda_kernels):
    """Where the maximum times log2(e) is rounded by more than the differences between logits."""
    query, key, value = operands(q=q, k=150, d=16, dtype=torch.bfloat16)
    bias = tokens(q, 150, dtype=torch.float32, seed=3) * size if has_bias else None
    check((query * size, key, value), bias=bias)


def test_growing_and_falling_logits(cuda_kernels):
    """The reference of a row lags behind its maximum, in either order of the keys."""
    query = torch.ones(1, 3, 1, 8, dtype=torch.float16)
    value = tokens(1, 640, 1, 8, dtype=torch.float16)
    ramp = torch.linspace(0, 30, 640)[:, None].half() * torch.ones(8).half() / 8
    for key in (ramp, ramp.flip(0), ramp[torch.randperm(640, generator=torch.Generator().manual_seed(0))]):
        check((query, key[None, :, None].contiguous(), value), scale=1.0)


@each_path
def test_padding_is_never_read(q, cuda_kernels):
    """Rows and columns behind the last one hold NaN."""
    wide = [torch.full((1, n + 3, 2, 48), torch.nan, dtype=torch.bfloat16) for n in (q, 70, 70)]
    for t, source in zip(wide, operands(q=q, k=70, d=40), strict=True):
        t[:, : source.size(1), :, :40] = source
    call = [t[:, :-3, :, :40] for t in wide]
    bias = torch.full((q + 3, 72), torch.nan)
    bias[:q, :70] = 0.5
    check(call, bias=bias[:q, :70])
    assert kernels_of(cuda_kernels) == [path(q, 70)]


@pytest.mark.parametrize(("b", "h", "blocks"), [(1, 1, 3), (2, 3, 3), (43, 3, 2), (86, 3, 1)], ids=str)
def test_few_heads_share_their_queries_among_blocks(b, h, blocks, cuda_kernels):
    """By shapes alone, and at least four tiles of sixteen queries a block; results are the same."""
    query, key, value = operands(b=b, q=200, k=20, h=h, d=8)
    out = vk.attention(query, key, value)
    (launch,) = cuda_kernels.launches()
    assert launch.kernel == "vitkernels::attention_resident" and launch.grid[0] == b * h * blocks
    if b == 1:
        repeated = [t.expand(300, -1, -1, -1) for t in (query, key, value)]
        assert torch.equal(vk.attention(*repeated)[-1:], out)
        assert cuda_kernels.launches()[1].grid[0] == 300
