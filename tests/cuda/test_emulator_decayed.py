"""Decayed linear attention on a GPU: agreement with float64, states, any decay, traffic, and what is refused."""

import pytest
import torch
import vitkernels as vk
from support.devices import ON_TENSOR_CORES
from support.emulation import nbytes, needs_emulator
from support.operands import ROUNDING, tokens
from vitkernels import reference

pytestmark = needs_emulator


def operands(n=200, h=2, d=32, v=None, b=1, dtype=torch.bfloat16):
    return [
        tokens(b, n, h, d, dtype=dtype) * d**-0.5, tokens(b, n, h, d, dtype=dtype, seed=1),
        tokens(b, n, h, v or d, dtype=dtype, seed=2),
    ]  # fmt: skip


def differentiate(function, call, decay, grads, **options):
    wide = torch.float64 if call[0].dtype == torch.float64 else torch.float32
    leaves = [t.detach().requires_grad_() for t in call]
    if options.get("return_state"):
        leaves[3] = leaves[3].detach().to(wide).requires_grad_()
        options["initial_state"] = leaves[3]
    found = function(*leaves[:3], torch.as_tensor(decay).to(wide), **options)
    outputs = found if isinstance(found, tuple) else (found,)
    grads = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=False)]
    return *outputs, *torch.autograd.grad(outputs, leaves, grads)


def check(call, decay=0.9, units=4, **options):
    """The outputs and the gradients against float64, in units of the dtype's rounding of their largest number."""
    dtype = call[0].dtype
    grads = [tokens(*call[2].shape, dtype=dtype, seed=5)]
    if options.get("return_state"):
        state = (call[0].size(0), call[0].size(2), call[0].size(3), call[2].size(3))
        call = [*call, tokens(*state, dtype=torch.float32, seed=6)]
        grads.append(tokens(*state, dtype=torch.float32, seed=7))
    found = differentiate(vk.decayed_linear_attention, call, decay, grads, **options)
    expected = differentiate(reference.decayed_linear_attention, [t.double() for t in call], decay, grads, **options)
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        error = (one.double() - other).abs().max() / other.abs().max().clamp(min=1e-3)
        assert error <= units * ROUNDING.get(dtype, 2.0**-22), f"{i}: {error / ROUNDING.get(dtype, 2.0**-22):.2f}"
    return found


@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 300, 700])
def test_tokens(n, dtype, return_state, cuda_kernels):
    """Tiles with a tail, and sequences that blocks divide among each other."""
    check(operands(n, dtype=dtype), torch.tensor([0.99, 0.6]), return_state=return_state)


@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
@pytest.mark.parametrize(("d", "v"), [(1, 1), (13, 7), (24, 64), (64, 40), (104, 128), (128, 8)])
def test_dims(d, v, dtype, cuda_kernels):
    if max(d, v) > 64 and dtype != torch.bfloat16:
        pytest.skip("what becomes float32 has a head dimension of at most 64")
    check(operands(130, b=2, d=d, v=v, dtype=dtype), return_state=True)


@pytest.mark.parametrize("decay", [0.0, 1e-38, 1e-10, 0.5, 1.0])
@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
def test_decays(dtype, decay, cuda_kernels):
    for is_causal in (True, False):
        found = check(operands(150, dtype=dtype), decay, is_causal=is_causal)
        assert all(t.isfinite().all() for t in found)
    check(operands(600, h=1, dtype=dtype), decay, return_state=True)


def test_decay_out_of_range(cuda_kernels):
    """Nothing is read on the host: it makes NaN."""
    for decay in (-0.1, 1.5):
        assert vk.decayed_linear_attention(*operands(5), torch.tensor([decay, decay])).isnan().all()


@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
def test_axes(dtype, cuda_kernels):
    query, key, value = (t.unflatten(1, (10, 20)) for t in operands(dtype=dtype))
    for is_causal in (True, False):
        check([query, key, value], 0.8, axes=(0, 1), is_causal=is_causal, units=6)


def test_parts_of_a_sequence(cuda_kernels):
    """The state of one is where the next begins."""
    query, key, value = operands(700, h=1, dtype=torch.float32)
    whole, last = vk.decayed_linear_attention(query, key, value, 0.97, return_state=True)
    outs, state = [], None
    for part in (slice(0, 100), slice(100, 100), slice(100, 700)):
        call = [t[:, part] for t in (query, key, value)]
        out, state = vk.decayed_linear_attention(*call, 0.97, initial_state=state, return_state=True)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_any_strides(cuda_kernels):
    packed = tokens(2, 100, 3, 2, 32) * 0.3
    check(packed.unbind(2))
    check([t.transpose(1, 2).contiguous().transpose(1, 2) for t in operands()])
    check([t[:, ::2] for t in operands()])
    check([t[..., 1:26] for t in operands()])
    check([t[:1].expand(3, -1, -1, -1) for t in operands()])


def test_same_bits_in_every_run(cuda_kernels):
    call = operands(1100, dtype=torch.float16)
    found = check(call)
    cuda_kernels.configure(multiprocessors=132, seed=1)
    assert all(torch.equal(*both) for both in zip(found, check(call), strict=True))


@pytest.mark.parametrize(("n", "h", "d"), [(192, 2, 32), (192, 2, 64), (1024, 2, 64), (192, 2, 128)])
def test_traffic(n, h, d, cuda_kernels):
    """Of a block once each; where blocks divide a sequence, keys and values are read once more."""
    call = operands(n, h, d)
    out = vk.decayed_linear_attention(*call, 0.9)
    counters = cuda_kernels.counters()["vitkernels::decayed_linear"]
    splits, slices = max(n // 256, 1), {32: 1, 64: 1, 128: 4}[d]
    state = h * d * d * 4
    again = slices * nbytes(call[1]) + nbytes(call[2]) if splits > 1 else 0
    # With 128 columns blocks have 32 of the values each, and read all queries and keys, which memory gives once.
    total = slices * nbytes(*call[:2]) + nbytes(call[2]) + again
    assert total <= counters.read.total <= total + splits * state + 4096
    written = nbytes(out) + (splits if splits > 1 else 1) * state
    assert counters.written.total == written
    assert splits > 1 or counters.read.distinct <= nbytes(*call) + 64


def test_refusals(cuda_kernels):
    for change, text in (
        ({"dtype": torch.float64}, "query is float64, takes float32, bfloat16 or float16 on a GPU"),
        ({"d": 130}, "query or value has head dimension 130 on CUDA, takes at most 128"),
        (
            {"d": 8, "v": 65, "dtype": torch.float32},
            "query or value has head dimension 65 on CUDA, takes at most 64 in",
        ),
    ):
        with pytest.raises(RuntimeError, match=f"vitkernels::decayed_linear_attention: {text}"):
            vk.decayed_linear_attention(*operands(3, **change), 0.5)
    assert not cuda_kernels.launches()


def test_nothing(cuda_kernels):
    for n, b in ((0, 1), (5, 0)):
        leaves = [t.requires_grad_() for t in operands(n, b=b)]
        initial = torch.ones(b, 2, 32, 32, requires_grad=True)
        out, state = vk.decayed_linear_attention(*leaves, 0.5, initial_state=initial, return_state=True)
        assert n > 0 or torch.equal(state, initial)
        grads = torch.autograd.grad(out.sum() + state.sum(), (*leaves, initial))
        assert n > 0 or (grads[3] == 1).all()
