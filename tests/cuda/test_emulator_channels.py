"""Channel attention on a GPU: agreement with float64, norms, traffic, and what is refused."""

import pytest
import torch
import vitkernels as vk
from support.devices import HALF, ON_TENSOR_CORES
from support.emulation import nbytes, needs_emulator
from support.operands import ROUNDING, tokens
from vitkernels import reference

pytestmark = needs_emulator


def operands(n=200, m=300, h=2, d=32, v=None, b=1, dtype=torch.bfloat16):
    return [
        tokens(b, n, h, d, dtype=dtype), tokens(b, n, h, v or d, dtype=dtype, seed=1),
        tokens(b, m, h, v or d, dtype=dtype, seed=2),
    ]  # fmt: skip


def differentiate(function, call, grad_out, scale, **options):
    leaves = [t.detach().requires_grad_() for t in call]
    if isinstance(scale, torch.Tensor):
        scale = scale.to(torch.float64 if call[0].dtype == torch.float64 else torch.float32).requires_grad_()
        leaves.append(scale)
    out = function(*leaves[:3], scale=scale, **options)
    return out, *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


def check(call, units=4, scale=None, **options):
    """The output and the gradients against float64, in units of the dtype's rounding of their largest number, or
    of 0.1: terms that cancel leave zeros.
    """
    dtype = call[0].dtype
    grad_out = tokens(*call[2].shape[:-1], call[0].size(-1), dtype=dtype, seed=5)
    found = differentiate(vk.channel_attention, call, grad_out, scale, **options)
    expected = differentiate(reference.channel_attention, [t.double() for t in call], grad_out, scale, **options)
    for name, one, other in zip(("out", *"qkvs"), found, expected, strict=False):
        assert one.dtype == (torch.float32 if name == "s" else dtype)
        error = (one.double() - other).abs().max() / other.abs().max().clamp(min=0.1) / ROUNDING.get(dtype, 2.0**-21)
        assert error <= units, f"{name}: {error:.2f}"
    return found


@pytest.mark.parametrize("qk_norm", [None, "l2"])
@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 700])
def test_tokens(n, dtype, qk_norm, cuda_kernels):
    """Tiles with a tail, and tokens that blocks divide among each other."""
    m = {1: 300, 63: 1, 700: 600}.get(n, n)
    if n == 1 and qk_norm:
        n = 9  # of one token all norms' gradients cancel
    check(operands(n, m, dtype=dtype), scale=torch.tensor([1.5, 0.3]) if qk_norm else 0.02, qk_norm=qk_norm)


@pytest.mark.parametrize("qk_norm", [None, "l2"])
@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
@pytest.mark.parametrize(("d", "v"), [(1, 1), (13, 7), (24, 64), (64, 40), (104, 128), (128, 8)])
def test_channels(d, v, dtype, qk_norm, cuda_kernels):
    if max(d, v) > 64 and dtype != torch.bfloat16:
        pytest.skip("what becomes float32 has a head dimension of at most 64")
    check(operands(130, 150, b=2, d=d, v=v, dtype=dtype), units=6, scale=2.0 if qk_norm else 0.05, qk_norm=qk_norm)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_large_scale(dtype, cuda_kernels):
    """One channel takes all of the weight; exponentials of logits do not overflow."""
    call = operands(dtype=dtype)
    out = vk.channel_attention(*call, scale=1e6)
    expected = reference.channel_attention(*[t.double() for t in call], scale=1e6)
    torch.testing.assert_close(out.double(), expected, rtol=4 * ROUNDING[dtype], atol=1e-3)


def test_many_tokens_of_float16(cuda_kernels):
    """Products and squares over them that float16 does not hold."""
    query, key, value = operands(3000, 100, h=1, dtype=torch.float16)
    found = check([query * 20, key * 20, value], qk_norm="l2", scale=4.0)
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
def test_channels_of_zeros(dtype, cuda_kernels):
    call = operands(dtype=dtype)
    call[0][..., 3] = call[1][..., 5] = 0.0
    leaves = [t.requires_grad_() for t in call]
    out = vk.channel_attention(*leaves, qk_norm="l2", scale=3.0)
    expected = reference.channel_attention(*[t.detach().double() for t in call], qk_norm="l2", scale=3.0)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4 * ROUNDING.get(dtype, 2.0**-22))
    assert all(t.isfinite().all() for t in torch.autograd.grad(out.float().pow(2).sum(), leaves))


@pytest.mark.parametrize("normalizes", [False, True])
def test_gradient_of_the_state(normalizes, cuda_kernels):
    """Who reads the products and the norms has a part in the gradients."""

    def formula(query, key, value):
        norms = [t.norm(dim=1) if normalizes else torch.ones_like(t[:, 0]) for t in (query, key)]
        products = torch.einsum("bnhc,bnhe->bhce", query / norms[0][:, None], key / norms[1][:, None])
        out = torch.einsum("bhce,bnhe->bnhc", (products * 0.1).softmax(-1), value)
        last = torch.cat([norms[1], torch.zeros_like(norms[1][..., :1])], -1)
        return out, torch.cat([torch.cat([products, norms[0][..., None]], -1), last[..., None, :]], -2)

    def ours(*call):
        return torch.ops.vitkernels.channel_attention(*call, 0.1, None, normalizes, False)

    data = operands(70, 80, d=20, v=12, dtype=torch.float32)
    grads = [tokens(1, 80, 2, 20, dtype=torch.float32), tokens(1, 2, 21, 13, dtype=torch.float32)]
    for read in (slice(0, 2), slice(1, 2)):
        found, expected = (
            torch.autograd.grad(
                f(*leaves)[read], leaves, [g.to(leaves[0].dtype) for g in grads[read]], allow_unused=f is formula
            )
            for f, leaves in (
                (ours, [t.clone().requires_grad_() for t in data]),
                (formula, [t.double().requires_grad_() for t in data]),
            )
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(
                one.double(), torch.zeros_like(one).double() if other is None else other, rtol=1e-4, atol=5e-6
            )


def test_any_strides(cuda_kernels):
    packed = tokens(2, 100, 3, 2, 32)
    for qk_norm in (None, "l2"):
        options = {"qk_norm": qk_norm, "scale": 0.05 if qk_norm is None else 2.0}
        check(packed.unbind(2), **options)
        check([t.transpose(1, 2).contiguous().transpose(1, 2) for t in operands()], **options)
        check([t[:, ::2] for t in operands()], **options)
        check([t[..., 1:26] for t in operands()], **options)
        check([t[:1].expand(3, -1, -1, -1) for t in operands()], **options)
    check(operands(h=4), groups=4, scale=0.05)


def test_same_bits_in_every_run(cuda_kernels):
    call = operands(1100, 1100, dtype=torch.float16)
    found = check(call, qk_norm="l2", scale=torch.tensor([1.0, 2.0]))
    cuda_kernels.configure(multiprocessors=132, seed=1)
    again = check(call, qk_norm="l2", scale=torch.tensor([1.0, 2.0]))
    assert all(torch.equal(*both) for both in zip(found, again, strict=True))


@pytest.mark.parametrize("d", [32, 64, 128])
def test_traffic(d, cuda_kernels):
    """Every pass reads its tokens once and writes its results once, with norms too; matrices are small beside them."""
    query, key, value = (t.requires_grad_() for t in operands(1024, 1024, d=d))
    out = vk.channel_attention(query, key, value, qk_norm="l2", scale=2.0)
    grads = torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    matrix = 2 * (d + 1) * (d + 8) * 4
    expected = {  # tokens that are read and written
        "channel_sum": (nbytes(query, key), 0), "linear_output": (nbytes(value), nbytes(out)),
        "linear_grad_query": (nbytes(value, out), nbytes(grads[2])),
        "channel_grad": (nbytes(query, key), nbytes(*grads[:2])),
    }  # fmt: skip
    for name, (read, written) in expected.items():
        counters = cuda_kernels.counters()[f"vitkernels::{name}"]
        (blocks,) = (launch.grid[0] for launch in cuda_kernels.launches() if launch.kernel == f"vitkernels::{name}")
        assert read <= counters.read.distinct <= read + 2 * matrix
        assert written <= counters.written.total <= written + blocks // 2 * matrix
    assert cuda_kernels.counters()["vitkernels::channel_sum"].read.total == nbytes(query, key)


def test_refusals(cuda_kernels):
    for change, text in (
        ({"dtype": torch.float64}, "query is float64, takes float32, bfloat16 or float16 on a GPU"),
        ({"d": 130}, "query or key has head dimension 130 on CUDA, takes at most 128"),
        ({"d": 8, "v": 65, "dtype": torch.float16}, "query or key has head dimension 65 on CUDA, takes at most 64 in"),
    ):
        with pytest.raises(RuntimeError, match=f"vitkernels::channel_attention: {text}"):
            vk.channel_attention(*operands(3, 3, **change))
    assert not cuda_kernels.launches()


def test_nothing(cuda_kernels):
    for empty in ({"b": 0}, {"n": 0}, {"m": 0}):
        call = [t.requires_grad_() for t in operands(**empty)]
        out = vk.channel_attention(*call, qk_norm="l2")
        # Without tokens of query and key all weights are the same.
        expected = call[2].mean(-1, keepdim=True).expand_as(out) if empty == {"n": 0} else torch.zeros_like(out)
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
        grads = torch.autograd.grad(out.sum(), call)
        assert all((t == 0).all() for t in grads[:2])
