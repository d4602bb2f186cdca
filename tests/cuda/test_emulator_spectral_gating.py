"""Spectral gating on a GPU: agreement with float64 at hostile sizes, layouts of a block, traffic, and refusals."""

import pytest
import torch
import vitkernels as vk
from support.devices import ON_TENSOR_CORES
from support.emulation import conflicts, nbytes, needs_emulator
from support.error_policy import largest_error
from support.operands import ROUNDING
from vitkernels import reference

pytestmark = needs_emulator

LARGE_GPU = 227 * 1024  # bytes of shared memory that a thread block of an H100 may have


@pytest.fixture(autouse=True)
def defaults(cuda_kernels):
    """Options of the emulator outlive a test."""
    yield
    cuda_kernels.configure()


def operands(batch, height, width, channels, dtype=torch.float32, wide=True):
    generator = torch.Generator().manual_seed(height)
    x = torch.randn(batch, height, width, channels, generator=generator).to(dtype)  # [B, H, W, C]
    weight = torch.randn(height, width // 2 + 1, channels, 2, generator=generator)  # [H, W // 2 + 1, C, 2]
    return x, weight if wide else weight.to(dtype)


def differentiate(function, x, weight, grad_out):
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


def check(x, weight, units=4):
    """The output and the gradients against float64, in units of the dtype's rounding of their largest number."""
    grad_out = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x.dtype)  # [B, H, W, C]
    found = differentiate(vk.spectral_gating, x, weight, grad_out)
    expected = differentiate(reference.spectral_gating, x.double(), weight.double(), grad_out)
    for name, one, other in zip(("out", "x", "weight"), found, expected, strict=True):
        largest = max(other.abs().amax().item(), 1e-30) if other.numel() else 1.0
        error = largest_error(one, other) / largest / ROUNDING.get(one.dtype, 2.0**-22)
        assert error <= units, f"{name}: {error:.2f}"
    return found


SIZES = [
    (7, 7), (8, 16), (14, 14), (28, 15), (13, 11), (11, 26), (1, 18), (20, 1), (1, 1), (22, 9), (3, 121), (17, 2),
    (12, 56),
]  # fmt: skip


@pytest.mark.parametrize("limit", [None, LARGE_GPU], ids=["small-gpu", "large-gpu"])
@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_sizes(height, width, dtype, limit, cuda_kernels):
    if limit:
        cuda_kernels.configure(shared_limit=limit)
    check(*operands(2, height, width, 5, dtype, wide=width % 2 == 0))


@pytest.mark.parametrize("channels", [1, 2, 3, 16, 17, 33])
def test_channels(channels, cuda_kernels):
    check(*operands(2, 6, 10, channels))


@pytest.mark.parametrize("batch", [0, 1, 5, 40])
def test_batches(batch, cuda_kernels):
    found = check(*operands(batch, 4, 7, 3, torch.bfloat16))
    assert bool(cuda_kernels.launches()) == (batch > 0)
    assert batch > 0 or not found[2].any()


@pytest.mark.parametrize("limit", [None, 400], ids=["resident", "not-resident"])
def test_several_maps_of_a_block(limit, cuda_kernels):
    """The weight's gradient is added up, in shared memory or in the block's part."""
    if limit:
        cuda_kernels.configure(shared_limit=limit)
    x, weight = operands(1100, 2, 3, 2)
    backward = torch.ops.vitkernels.spectral_gating_backward
    found = backward(x, x, weight, True)[1]  # [H, W // 2 + 1, C, 2]
    assert cuda_kernels.launches()[0].grid[0] == 512
    wide = weight.double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.spectral_gating(x.double(), wide), wide, x.double())
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
def test_any_strides(dtype, cuda_kernels):
    x, weight = operands(2, 6, 10, 18, dtype)
    for strided in (
        torch.cat([x, x], 3)[..., 1:19], x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), x[:, ::2], x[..., ::3],
        x[:1].expand(3, -1, -1, -1), x.transpose(1, 2)[:, :6],
    ):  # fmt: skip
        _, height, width, channels = strided.shape
        check(strided, weight[:height, : width // 2 + 1, :channels])
    check(x, weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))


def test_same_bits_however_a_block_is_laid_out(cuda_kernels):
    """... with its weight in shared memory or not, for any number of channels and order of warps."""
    x, weight = operands(3, 14, 28, 19, torch.float16)
    found = check(x, weight)
    shapes = set()
    for limit in (14 * 1024, 40 * 1024, 99 * 1024, LARGE_GPU):
        cuda_kernels.reset()
        cuda_kernels.configure(shared_limit=limit, multiprocessors=132, seed=limit)
        assert all(torch.equal(*both) for both in zip(found, check(x, weight), strict=True))
        shapes |= {(x.grid[0], x.shared_bytes) for x in cuda_kernels.launches() if "spectral" in x.kernel}
    assert len({blocks for blocks, _ in shapes}) > 2


@pytest.mark.parametrize("position", [(0, 0, 0, 0), (1, 5, 9, 17), (0, 4, 4, 3)])
def test_a_bad_number_stays_in_its_map(position, cuda_kernels):
    x, weight = operands(2, 6, 10, 18)
    expected = vk.spectral_gating(x, weight)
    x[position] = torch.nan
    found = vk.spectral_gating(x, weight)
    bad = torch.zeros(2, 18, dtype=torch.bool)  # [B, C]
    bad[position[0], position[3]] = True
    assert found.permute(0, 3, 1, 2)[bad].isnan().all()
    assert torch.equal(found.permute(0, 3, 1, 2)[~bad], expected.permute(0, 3, 1, 2)[~bad])


@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
@pytest.mark.parametrize("size", [14, 28])
def test_traffic(size, dtype, cuda_kernels):
    """Maps are read and written once, the weight once for each share of the batch."""
    cuda_kernels.configure(shared_limit=LARGE_GPU)
    x, weight = operands(3, size, size, 16, dtype)
    out = vk.spectral_gating(x, weight)
    (launch,) = cuda_kernels.launches()
    counters = cuda_kernels.counters()["vitkernels::spectral_gating"]
    assert counters.read.total == nbytes(x) + launch.grid[0] * nbytes(weight)
    assert counters.written.total == counters.written.distinct == nbytes(out)
    cuda_kernels.reset()
    cuda_kernels.configure(shared_limit=LARGE_GPU)
    backward = torch.ops.vitkernels.spectral_gating_backward
    backward(out, x, weight, False)
    counters = cuda_kernels.counters()
    assert counters["vitkernels::spectral_gating"].read.total == nbytes(x) + launch.grid[0] * nbytes(weight)
    backward(out, x, weight, True)


@pytest.mark.parametrize("size", [7, 14, 28])
def test_sixteen_channels_have_no_bank_conflicts(size, cuda_kernels):
    cuda_kernels.configure(shared_limit=LARGE_GPU)
    check(*operands(1, size, size, 16))
    assert not conflicts(cuda_kernels.counters()["vitkernels::spectral_gating"])


@pytest.mark.parametrize(("size", "most"), [(7, 8), (14, 8.4), (28, 27)])
def test_accesses_to_shared_memory(size, most, cuda_kernels):
    """By warps, for a warp's width of points: two rows' elements are one.

    Short columns need four, and the weight two. In others each stage of rows but the first has two and its twiddles,
    and so has each of columns, and each pass between rows and columns.
    """
    cuda_kernels.configure(shared_limit=LARGE_GPU)
    vk.spectral_gating(*operands(1, size, size, 16))
    sites = cuda_kernels.counters()["vitkernels::spectral_gating"].conflicts.values()
    points = 16 * size * -(-size // 2)
    assert sum(site.accesses for site in sites) * 32 / points <= most


def test_backward_without_the_weight(cuda_kernels):
    x, weight = operands(2, 9, 14, 18)
    backward = torch.ops.vitkernels.spectral_gating_backward
    whole, part = (backward(x + 1, x, weight, needs) for needs in (True, False))
    assert torch.equal(whole[0], part[0]) and part[1].numel() == 0


def test_refusals(cuda_kernels):
    with pytest.raises(RuntimeError, match="gating: x is float64, takes float32, bfloat16 or float16 on a GPU"):
        vk.spectral_gating(*operands(1, 3, 4, 2, torch.float64, wide=False))
    with pytest.raises(
        RuntimeError, match=r"gating: x has 1031 rows, a multiple of 1031, takes prime factors up to 1023"
    ):
        vk.spectral_gating(*operands(1, 1031, 1, 1))
    with pytest.raises(RuntimeError, match=r"gating: x has maps of 300 x 300, whose spectra need \d+ bytes of shared"):
        vk.spectral_gating(*operands(1, 300, 300, 1))
    with pytest.raises(
        RuntimeError, match=r"x has shape \(0, 2048, 1024, 1\), takes at most 1048576 positions of a map"
    ):
        vk.spectral_gating(torch.zeros(0, 2048, 1024, 1), torch.zeros(1).expand(2048, 513, 1, 2))
    assert not cuda_kernels.launches()
