"""The forward's fast path on a GPU: which calls take it, that it agrees with float64 where its own code may fail, and
what it costs in memory."""

import pytest
import torch
import vitkernels as vk
from support.emulation import needs_emulator
from vitkernels import reference

pytestmark = needs_emulator

HALF = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def kernels_of(emulator):
    return [launch.kernel.removeprefix("vitkernels::") for launch in emulator.launches()]


def tokens(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(b=1, q=40, k=50, h=2, d=32, v=None, kv_heads=None, dtype=torch.bfloat16):
    g = kv_heads or h
    return (
        tokens(b, q, h, d, dtype=dtype), tokens(b, k, g, d, dtype=dtype, seed=1),
        tokens(b, k, g, v or d, dtype=dtype, seed=2),
    )  # fmt: skip


def check(call, **options):
    """Against float64: the output in units of the dtype's rounding, the LSE to float32's."""
    found, lse = vk.attention(*call, return_lse=True, **options)
    wide = {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in options.items()}
    expected, expected_lse = reference.attention(*(t.double() for t in call), return_lse=True, **wide)
    largest = max(1.0, call[2].double().abs().max().item())
    assert (found.double() - expected).abs().max() <= 2 * ROUNDING[call[0].dtype] * largest
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-4)


SHAPES = [
    {"q": 1, "k": 2, "d": 8}, {"q": 128, "k": 64}, {"q": 129, "k": 65, "d": 64}, {"q": 33, "k": 197, "d": 64},
    {"q": 300, "k": 48, "d": 128}, {"b": 3, "q": 5, "k": 97, "h": 6, "kv_heads": 2, "d": 96},
    {"q": 17, "k": 130, "d": 40, "v": 16}, {"q": 17, "k": 130, "d": 16, "v": 72}, {"q": 2, "k": 1100, "d": 64},
    {"b": 2, "q": 257, "k": 257, "h": 1, "d": 24},
]  # fmt: skip


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, has_bias, cuda_kernels):
    call = operands(**shape, dtype=dtype)
    (_, q, h, _), k = call[0].shape, call[1].size(1)
    bias = tokens(1, h, q, k + k % 2, dtype=torch.float32, seed=3)[..., :k] if has_bias else None
    check(call, bias=bias)
    assert kernels_of(cuda_kernels)[0] == "attention_plain"


@pytest.mark.parametrize(
    "bias_shape", [(2, 3, 40, 50), (1, 3, 40, 50), (2, 1, 40, 50), (1, 1, 1, 50), (40, 50)], ids=str
)
def test_biases_are_broadcast(bias_shape, cuda_kernels):
    check(operands(b=2, h=3), bias=tokens(*bias_shape, dtype=torch.float32, seed=3))
    assert kernels_of(cuda_kernels) == ["attention_plain"]


GENERAL = {
    "float32": lambda: {"dtype": torch.float32}, "wide": lambda: {"d": 136}, "odd rows": lambda: {"d": 30},
    "causal": lambda: {"is_causal": True}, "head map": lambda: {"head_map": torch.tensor([1, 0])},
    "no scale": lambda: {"scale": 0.0}, "negative scale": lambda: {"scale": -0.5},
    "scale of heads": lambda: {"scale": torch.tensor([0.5, 2.0])},
    "odd bias": lambda: {"bias": torch.ones(40, 51)[:, :50]}, "bias of queries": lambda: {"bias": torch.ones(40, 1)},
    "shifted bias": lambda: {"bias": torch.ones(2001)[1:].view(40, 50)},
    "multiplier": lambda: {"multiplier": torch.ones(1, 2, 40, 50)}, "key bias": lambda: {"key_bias": torch.ones(50)},
}  # fmt: skip


@pytest.mark.parametrize("name", GENERAL)
def test_other_calls_take_the_general_kernel(name, cuda_kernels):
    options = GENERAL[name]()
    call = operands(**{n: options.pop(n) for n in ("dtype", "d") if n in options})
    vk.attention(*call, **options)
    assert kernels_of(cuda_kernels) == ["attention"]


def test_biases_take_any_scale(cuda_kernels):
    for scale in (-0.5, 0.0, torch.tensor([0.5, -2.0])):
        check(operands(), bias=tokens(40, 50, dtype=torch.float32, seed=3), scale=scale)
    assert set(kernels_of(cuda_kernels)) == {"attention_plain"}


def test_shared_queries_and_strides_of_one_token(cuda_kernels):
    """A stride of an axis that has one element says nothing about alignment."""
    query, key, value = operands(b=2, q=1)
    odd = torch.zeros(2 * 64 + 3, dtype=query.dtype).as_strided((2, 1, 2, 32), (64, 3, 32, 1)).copy_(query)
    check((odd, key, value))
    check((query[:1].expand(2, -1, -1, -1), key, value))
    assert kernels_of(cuda_kernels) == ["attention_plain"] * 2


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_rows_that_see_no_key(split, cuda_kernels):
    """At first, at last, or at all: -inf is no number to subtract."""
    k = 600 if split else 200
    bias = torch.zeros(4, k)
    bias[0, : k - 70], bias[1, 70:], bias[2] = -torch.inf, -torch.inf, -torch.inf
    call = operands(q=4, k=k)
    check(call, bias=bias)
    out, lse = vk.attention(*call, bias=bias, return_lse=True)
    assert not out[:, 2].any() and (lse[:, 2] == -torch.inf).all()


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e30], ids=str)
def test_masks_of_the_lowest_number(lowest, cuda_kernels):
    """A row of nothing else is a mean, as in torch; in other rows it is no key."""
    bias = torch.zeros(3, 130)
    bias[0], bias[1, 40:], bias[2, :40] = lowest, lowest, lowest
    call = operands(q=3, k=130)
    out = vk.attention(*call, bias=bias)
    torch.testing.assert_close(out[:, 0].float(), call[2].float().mean(1), atol=4e-3, rtol=0)
    torch.testing.assert_close(out[:, 1:], vk.reference.attention(*call, bias=bias)[:, 1:], atol=1e-2, rtol=0)


@pytest.mark.parametrize("size", [1e2, 3e3, 1e5, 1e9, 1e18], ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_large_logits(size, has_bias, cuda_kernels):
    """Where the maximum times log2(e) is rounded by more than the differences between logits."""
    query, key, value = operands(q=20, k=150, d=16, dtype=torch.bfloat16)
    bias = tokens(20, 150, dtype=torch.float32, seed=3) * size if has_bias else None
    check((query * size, key, value), bias=bias)


def test_growing_and_falling_logits(cuda_kernels):
    """The reference of a row lags behind its maximum, in either order of the keys."""
    query = torch.ones(1, 3, 1, 8, dtype=torch.float16)
    value = tokens(1, 640, 1, 8, dtype=torch.float16)
    ramp = torch.linspace(0, 30, 640)[:, None].half() * torch.ones(8).half() / 8
    for key in (ramp, ramp.flip(0), ramp[torch.randperm(640, generator=torch.Generator().manual_seed(0))]):
        check((query, key[None, :, None].contiguous(), value), scale=1.0)


def test_padding_is_never_read(cuda_kernels):
    """Rows and columns behind the last one hold NaN."""
    wide = [torch.full((1, n + 3, 2, 48), torch.nan, dtype=torch.bfloat16) for n in (40, 70, 70)]
    for t, source in zip(wide, operands(k=70, d=40), strict=True):
        t[:, : source.size(1), :, :40] = source
    call = [t[:, :-3, :, :40] for t in wide]
    bias = torch.full((43, 72), torch.nan)
    bias[:40, :70] = 0.5
    check(call, bias=bias[:40, :70])
    assert kernels_of(cuda_kernels) == ["attention_plain"]
