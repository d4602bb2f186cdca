"""Long convolutions on a GPU: agreement with float64 at hostile sizes, traffic, bank conflicts, and refusals."""

import pytest
import torch
import vitkernels as vk
from support.devices import ON_TENSOR_CORES
from support.emulation import conflicts, nbytes, needs_emulator
from support.error_policy import largest_error
from support.operands import ROUNDING
from vitkernels import reference

pytestmark = needs_emulator

DTYPES = pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
LAYOUTS = pytest.mark.parametrize("is_channels_last", [False, True], ids=["signals", "tokens"])


def operands(b, c, n, taps=None, dtype=torch.float32, is_channels_last=False):
    generator = torch.Generator().manual_seed(n)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    x = normal(b, n, c).transpose(1, 2) if is_channels_last else normal(b, c, n)  # [b, c, n]
    taps = n if taps is None else taps
    return x, normal(c, taps, scale=taps**-0.5)  # [c, taps]


def differentiate(function, x, taps, is_causal):
    x, taps = x.detach().requires_grad_(), taps.detach().requires_grad_()
    out = function(x, taps, is_causal=is_causal)  # [b, c, n]
    generator = torch.Generator().manual_seed(7)
    grad_out = torch.randn(out.shape, generator=generator).to(torch.bfloat16)  # [b, c, n]
    return out, *torch.autograd.grad(out, (x, taps), grad_out.to(out.dtype))


def check(x, taps, is_causal=True, units=4):
    """The output and the gradients against float64, in units of the dtype's rounding of their largest number."""
    found = differentiate(vk.long_conv, x, taps, is_causal)
    expected = differentiate(reference.long_conv, x.double(), taps.double(), is_causal)
    for name, one, other in zip(("out", "x", "filter"), found, expected, strict=True):
        assert one.shape == other.shape
        if other.numel():
            unit = max(other.abs().max().item(), 1e-30) * ROUNDING.get(x.dtype, 2.0**-22)
            assert largest_error(one, other) <= units * unit, f"{name}: {largest_error(one, other) / unit:.2f}"
    return found


@LAYOUTS
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("n", [1, 2, 64, 65, 127, 129, 257, 1000, 2049])
def test_lengths(n, is_causal, is_channels_last, cuda_kernels):
    check(*operands(2, 3, n, n if is_causal else 2 * n - 1, is_channels_last=is_channels_last), is_causal)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("c", [1, 7, 8, 17, 33])
def test_channels(c, is_channels_last, dtype, cuda_kernels):
    check(*operands(3, c, 100, dtype=dtype, is_channels_last=is_channels_last))


@pytest.mark.parametrize(
    ("b", "c", "n", "taps", "is_causal", "kernel"),
    [
        (2, 2, 4096, 4096, True, "long_conv_spectrum"), (1, 1, 4097, 8193, False, "long_conv_spectrum"),
        (2, 2, 8200, 31, True, "long_conv_outer"), (1, 1, 9000, 17999, False, "long_conv_outer_taps"),
        (1, 1, 33000, 33000, True, "long_conv_outer_taps"), (1, 1, 33000, 5, False, "long_conv_outer_taps"),
        (1, 1, 65000, 65000, True, "long_conv_outer_stage"),
    ],
)  # fmt: skip
def test_long_ones(b, c, n, taps, is_causal, kernel, cuda_kernels):
    """Up to 8192 points in shared memory; beyond, outer stages in global memory, of which there may be several."""
    check(*operands(b, c, n, taps, dtype=torch.bfloat16), is_causal)
    assert f"vitkernels::{kernel}" in {launch.kernel for launch in cuda_kernels.launches()}


@LAYOUTS
@pytest.mark.parametrize("is_causal", [True, False])
def test_every_tap_reaches_its_lag(is_causal, is_channels_last, cuda_kernels):
    for n in (3, 100, 300):
        x, taps = operands(1, 3, n, n if is_causal else 2 * n - 1, is_channels_last=is_channels_last)
        for at in (0, n // 3, n - 1):
            impulse = torch.zeros_like(x)  # [1, c, n]
            impulse[..., at] = 1
            first = 0 if is_causal else n - 1
            expected = torch.nn.functional.pad(taps, (n, n))[:, n + first - at :][:, :n]  # [c, n]
            found = vk.long_conv(impulse, taps, is_causal=is_causal)[0]  # [c, n]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("taps", "is_causal"), [(1, True), (1, False), (3, True), (5, False), (199, True)])
def test_few_taps(taps, is_causal, cuda_kernels):
    check(*operands(2, 5, 200, taps), is_causal)


@pytest.mark.parametrize("b", [0, 1, 31])
def test_batches(b, cuda_kernels):
    """Of many, blocks share the sums of the filter's gradient."""
    found = check(*operands(b, 3, 50))
    assert bool(cuda_kernels.launches()) == (b > 0)
    assert b > 0 or not found[2].any()


@DTYPES
def test_any_strides(dtype, cuda_kernels):
    x, taps = operands(4, 6, 70, dtype=dtype)
    for strided in (
        torch.cat([x, x], 2)[..., ::2], torch.cat([x, x], 1)[:, ::2], torch.cat([x, x[..., :3]], 2)[..., 1:71], x[::2],
        x[:, :, :1].expand(4, 6, 70), x[:1].expand(4, 6, 70), x.transpose(0, 1).contiguous().transpose(0, 1),
    ):  # fmt: skip
        check(strided, taps)
    check(x, taps.t().contiguous().t())
    check(x, taps[:1].expand(6, 70))


def test_gradient_of_the_input_alone(cuda_kernels):
    x, taps = operands(3, 5, 90)
    x.requires_grad_()
    out = vk.long_conv(x, taps)
    cuda_kernels.reset()
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert not any("filter" in launch.kernel for launch in cuda_kernels.launches())
    (expected,) = torch.autograd.grad(reference.long_conv(x, taps), x, torch.ones_like(out))
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


def test_infinities_stay_in_their_channel(cuda_kernels):
    x, taps = operands(3, 5, 100)
    expected = vk.long_conv(x, taps)
    x[1, 2, 30], x[2, 4, 99] = torch.inf, torch.nan
    found = vk.long_conv(x, taps)
    bad = torch.zeros(3, 5, dtype=torch.bool)
    bad[1, 2] = bad[2, 4] = True
    assert not found[bad].isfinite().any()
    assert torch.equal(found[~bad], expected[~bad])


@LAYOUTS
def test_same_bits_in_every_run(is_channels_last, cuda_kernels):
    call = operands(9, 19, 300, is_channels_last=is_channels_last)
    found = check(*call)
    for seed in (0, 1):
        cuda_kernels.configure(multiprocessors=132, seed=seed)
        assert all(torch.equal(*both) for both in zip(found, check(*call), strict=True))


@pytest.mark.parametrize(
    ("n", "c", "is_channels_last"),
    [(128, 20, False), (512, 3, False), (2048, 1, False), (256, 8, True), (512, 8, True)],
)
def test_traffic(n, c, is_channels_last, cuda_kernels):
    """Signals are read and written once: elements of twice the bytes add them to the traffic, and nothing else."""
    read, written = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        x, taps = operands(4, c, n, dtype=dtype, is_channels_last=is_channels_last)
        cuda_kernels.reset()
        grad_out = vk.long_conv(x, taps)
        is_last = (x.transpose(1, 2), taps, True) if is_channels_last else (x, taps, False)
        grad_out = grad_out.transpose(1, 2) if is_channels_last else grad_out
        torch.ops.vitkernels.long_conv_backward(grad_out, *is_last, True, False)
        for kernel in ("long_conv", "long_conv_grad"):
            counters = cuda_kernels.counters()[f"vitkernels::{kernel}"]
            read[kernel, dtype], written[kernel, dtype] = counters.read.total, counters.written.total
            assert written[kernel, dtype] == counters.written.distinct == nbytes(x)
    for kernel in ("long_conv", "long_conv_grad"):
        assert read[kernel, torch.float32] - read[kernel, torch.bfloat16] == nbytes(x)


@LAYOUTS
@pytest.mark.parametrize("n", [64, 128, 256, 512, 1024, 2048, 4096, 8192])
def test_no_bank_conflicts(n, is_channels_last, cuda_kernels):
    for dtype in (torch.float32, torch.bfloat16):
        x, taps = operands(1, 16 if n <= 512 else 3, n, dtype=dtype, is_channels_last=is_channels_last)
        differentiate(vk.long_conv, x, taps, True)
    counters = cuda_kernels.counters()
    for kernel in ("long_conv", "long_conv_grad", "long_conv_grad_filter", "long_conv_spectrum"):
        assert not conflicts(counters[f"vitkernels::{kernel}"]), kernel


def test_refusals(cuda_kernels):
    with pytest.raises(RuntimeError, match="long_conv: x is float64, takes float32, bfloat16 or float16 on a GPU"):
        vk.long_conv(*operands(1, 2, 3, dtype=torch.float64))
    x = torch.zeros(1).expand(1, 1, 2**28 + 1)
    with pytest.raises(RuntimeError, match="long_conv: x has 268435457 positions, takes at most 268435456 on a GPU"):
        torch.ops.vitkernels.long_conv(x, torch.ones(1, 1), False, True)
    assert not cuda_kernels.launches()
