"""Monarch products on a GPU: agreement with float64 at hostile sizes, groups of blocks, traffic, and refusals."""

import pytest
import torch
import vitkernels as vk
from support.devices import HALF, ON_TENSOR_CORES
from support.emulation import nbytes, needs_emulator
from support.error_policy import largest_error
from support.operands import ROUNDING
from vitkernels import reference

pytestmark = needs_emulator

LARGE_GPU = 227 * 1024  # bytes of shared memory that a thread block of an H100 may have


def operands(rows, first, second, dtype=torch.bfloat16, bias=False):
    """``first`` and ``second`` are (blocks, outputs, inputs)."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    x = normal(rows, first[0] * first[2])  # [rows, k p]
    w1, w2 = (normal(*sizes, scale=sizes[2] ** -0.5) for sizes in (first, second))  # [k, q, p], [l, s, r]
    return [x, w1, w2, *([normal(second[0] * second[1]).float()] if bias else [])]


def differentiate(function, call, grad_out, **options):
    leaves = [t.detach().requires_grad_() for t in call]
    out = function(*leaves, **options)
    return out, *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


def check(call, units=4, **options):
    """The output and the gradients against float64, in units of the dtype's rounding of their largest number."""
    dtype = call[0].dtype
    generator = torch.Generator().manual_seed(5)
    grad_out = torch.randn(len(call[0]), call[2].size(0) * call[2].size(1), generator=generator).to(
        dtype
    )  # [rows, s l]
    found = differentiate(vk.blockdiag_butterfly_multiply, call, grad_out, **options)
    expected = differentiate(reference.blockdiag_butterfly_multiply, [t.double() for t in call], grad_out, **options)
    for name, one, other in zip(("out", "x", "w1", "w2", "bias"), found, expected, strict=False):
        largest = max(other.abs().amax().item(), 1e-30) if other.numel() else 1.0
        error = largest_error(one, other) / largest / ROUNDING.get(dtype, 2.0**-22)
        assert error <= units, f"{name}: {error:.2f}"
    return found


SHAPES = {
    "vectors": ((4, 48, 40), (4, 72, 48)), "ragged": ((2, 10, 33), (5, 3, 4)), "more-first": ((6, 8, 12), (3, 20, 16)),
    "deep": ((2, 64, 300), (2, 70, 64)), "wide": ((1, 270, 16), (2, 280, 135)), "5-blocks": ((5, 24, 16), (5, 40, 24)),
    "16-blocks": ((16, 16, 8), (16, 33, 16)), "40-blocks": ((8, 25, 9), (40, 3, 5)), "one": ((1, 1, 1), (1, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("limit", [None, LARGE_GPU], ids=["small-gpu", "large-gpu"])
@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, dtype, limit, cuda_kernels):
    if limit:
        cuda_kernels.configure(shared_limit=limit)
    check(operands(67, *SHAPES[name], dtype=dtype, bias=True), activation="gelu" if name != "ragged" else "none")


@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
def test_groups_of_any_size(dtype, cuda_kernels):
    """The same bits, however many blocks of the second weight a thread block has, or none in shared memory."""
    call = operands(65, (4, 150, 24), (6, 40, 100), dtype=dtype, bias=True)
    found = check(call, activation="gelu")
    grids = set()
    for limit in (62 * 1024, 80 * 1024, 163 * 1024, LARGE_GPU):
        cuda_kernels.reset()
        cuda_kernels.configure(shared_limit=limit)
        assert all(torch.equal(*both) for both in zip(found, check(call, activation="gelu"), strict=True))
        grids |= {(x.grid[0], x.shared_bytes) for x in cuda_kernels.launches() if "multiply" in x.kernel}
    assert len({blocks for blocks, _ in grids}) > 2 and min(size for _, size in grids) == 62 * 1024


@pytest.mark.parametrize("rows", [0, 1, 16, 63, 64, 130])
def test_rows(rows, cuda_kernels):
    found = check(operands(rows, (4, 16, 24), (4, 24, 16), bias=True), activation="gelu")
    assert bool(cuda_kernels.launches()) == (rows > 0)
    assert rows > 0 or all(not t.any() for t in found)


@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
def test_any_strides(dtype, cuda_kernels):
    x, *weights = operands(70, (4, 16, 24), (4, 24, 16), dtype=dtype)
    for strided in (
        torch.cat([x, x], 1)[:, : x.size(1)], torch.cat([x, x[:, :3]], 1)[:, : x.size(1)],
        torch.cat([x[:, :1], x], 1)[:, 1:], x.t().contiguous().t(), x[::2], x[:1].expand(70, -1),
    ):  # fmt: skip
        check([strided, *weights])
    check([x, *(w.transpose(1, 2).contiguous().transpose(1, 2) for w in weights)])
    check([x, *(torch.cat([w.flatten(), w.flatten()])[1:][: w.numel()].view(w.shape) for w in weights)])


def test_precision_of_float32(cuda_kernels, precision):
    """TF32 only where PyTorch allows it."""
    call = operands(40, (2, 32, 64), (2, 32, 32), dtype=torch.float32)
    expected = reference.blockdiag_butterfly_multiply(*[t.double() for t in call])
    exact = (vk.blockdiag_butterfly_multiply(*call) - expected).abs().max()
    precision("high")
    rounded = (vk.blockdiag_butterfly_multiply(*call) - expected).abs().max()
    assert exact < 4e-6 < rounded < 8e-3


@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
def test_infinities_stay_in_their_rows(dtype, cuda_kernels):
    call = operands(66, (4, 16, 24), (4, 24, 16), dtype=dtype)
    expected = vk.blockdiag_butterfly_multiply(*call)
    call[0][3, 5], call[0][64, 90] = torch.inf, torch.nan
    found = vk.blockdiag_butterfly_multiply(*call)
    bad = torch.zeros(66, dtype=torch.bool).index_fill(0, torch.tensor([3, 64]), True)
    assert not found[bad].isfinite().all(1).any()
    assert torch.equal(found[~bad], expected[~bad])


def test_tails_of_gelu(cuda_kernels):
    """... have small relative errors, and so has its derivative."""
    values = torch.linspace(-12, 12, 481)[:, None]  # [rows, 1]
    one = torch.ones(1, 1, 1)
    x = values.clone().requires_grad_()
    out = vk.blockdiag_butterfly_multiply(x, one, one, activation="gelu")
    (grad,) = torch.autograd.grad(out.sum(), x)
    wide = values.double().requires_grad_()
    truth = torch.special.erfc(-wide / 2**0.5) * wide / 2
    (slope,) = torch.autograd.grad(truth.sum(), wide)
    assert ((out - truth).abs() <= 2e-5 * truth.abs() + 1e-30).all()
    assert ((grad - slope).abs() <= 2e-5 * slope.abs().clamp(min=1e-3)).all()


def test_same_bits_in_every_run(cuda_kernels):
    call = operands(1100, (4, 16, 24), (4, 24, 16), bias=True)
    found = check(call, activation="gelu")
    cuda_kernels.configure(multiprocessors=132, seed=1)
    assert all(torch.equal(*both) for both in zip(found, check(call, activation="gelu"), strict=True))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_traffic(dtype, cuda_kernels):
    """Rows are read and written once, weights once for each 64 rows; what is summed over rows is left there once."""
    cuda_kernels.configure(shared_limit=LARGE_GPU)
    call = operands(128, (4, 192, 48), (4, 96, 192), dtype=dtype)
    inner = len(call[0]) * 768 * call[0].element_size()
    x, w1, w2 = call
    for keeps in (False, True):
        cuda_kernels.reset()
        cuda_kernels.configure(shared_limit=LARGE_GPU)
        given = (x, w1, w2, None, 0, False, keeps)
        out, kept = torch.ops.vitkernels.blockdiag_butterfly_multiply(*given, None)
        counters = cuda_kernels.counters()["vitkernels::monarch_multiply"]
        assert counters.read.total == nbytes(x) + 2 * nbytes(w1, w2)
        assert counters.written.total == counters.written.distinct == nbytes(out) + keeps * inner
    cuda_kernels.reset()
    cuda_kernels.configure(shared_limit=LARGE_GPU)
    backward = torch.ops.vitkernels.blockdiag_butterfly_multiply_backward
    backward(torch.ones_like(out), *given, kept, True, True, False)
    counters = cuda_kernels.counters()
    columns, products = (counters[f"vitkernels::monarch_{name}"] for name in ("columns", "multiply"))
    assert columns.read.total == columns.written.distinct == nbytes(out)
    assert products.read.total == nbytes(out) + 2 * nbytes(w1, w2)
    assert products.written.total == nbytes(x) + inner


@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
@pytest.mark.parametrize("activation", [0, 1])
def test_backward_reads_what_the_forward_kept_or_computes_it(activation, dtype, cuda_kernels):
    x, w1, w2, bias = operands(67, (4, 10, 16), (5, 24, 8), dtype=dtype, bias=True)
    forward = torch.ops.vitkernels.blockdiag_butterfly_multiply
    backward = torch.ops.vitkernels.blockdiag_butterfly_multiply_backward
    found = []
    for keeps in (False, True):
        given = (x, w1, w2, bias, activation, False, keeps)
        out, inner = forward(*given, None)
        found.append((out, *backward(torch.ones_like(out), *given, inner, True, True, True)))
    assert all(torch.equal(*each) for each in zip(*found, strict=True))


def test_refusals(cuda_kernels):
    with pytest.raises(RuntimeError, match="multiply: x is float64, takes float32, bfloat16 or float16 on a GPU"):
        vk.blockdiag_butterfly_multiply(*operands(3, (4, 6, 5), (4, 9, 6), dtype=torch.float64))
    many = torch.zeros(1).expand(1, 2**16, 2**15)
    with pytest.raises(RuntimeError, match="multiply: w1 has 2147483648 elements, takes at most 2147483647 on a GPU"):
        torch.ops.vitkernels.blockdiag_butterfly_multiply(
            torch.zeros(1).expand(0, 2**15), many, torch.zeros(1).expand(1, 1, 2**16), None, 0, False, False, None
        )
    x, w1, w2 = operands(3, (4, 6, 5), (4, 9, 6))
    with pytest.raises(RuntimeError, match="multiply: packed is a tensor, takes None on a GPU"):
        torch.ops.vitkernels.blockdiag_butterfly_multiply(x, w1, w2, None, 0, False, False, x.view(torch.uint8))
    assert not cuda_kernels.launches()
