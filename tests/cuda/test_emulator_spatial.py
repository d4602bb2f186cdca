"""Attention over maps with any pattern on a GPU: traffic, sums in parts, and what has no kernels. (The gates have the
rest.)"""

import pytest
import torch
import vitkernels as vk
from support.devices import HALF, ON_TENSOR_CORES
from support.emulation import nbytes, needs_emulator
from support.operands import ROUNDING, tokens
from vitkernels import reference

pytestmark = needs_emulator


def operands(b=1, size=(16, 16), h=2, d=32, dtype=torch.bfloat16):
    return [tokens(b, *size, h, d, dtype=dtype, seed=i) for i in range(3)]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_tiles_read_the_keys_that_they_see(dtype, cuda_kernels):
    """A tile of 8 x 16 queries sees a box of at most 12 x 20 keys; queries are read, and results written, once."""
    call = operands(size=(32, 32), h=1, dtype=dtype)
    out, lse = vk.spatial_attention(*call, [vk.Neighborhood(5)] * 2, return_lse=True)
    (counters,) = cuda_kernels.counters().values()
    assert counters.written.distinct == nbytes(out, lse)
    assert counters.read.distinct == nbytes(*call)
    keys = (10 + 12 + 12 + 10) * (18 + 18)
    assert counters.read.total == nbytes(call[0]) + keys * nbytes(call[1][0, 0, 0], call[2][0, 0, 0])


def test_windows_read_their_keys_alone(cuda_kernels):
    """Of a window of 12 x 12, each of its two tiles reads all."""
    call = operands(size=(24, 24), h=1)
    vk.window_attention(*call, 12)
    (counters,) = cuda_kernels.counters().values()
    assert counters.read.total == nbytes(call[0]) + 2 * nbytes(*call[1:])


@pytest.mark.parametrize("heads", [2, 4], ids="{} heads".format)
@pytest.mark.parametrize("on_map", [False, True], ids=["dense", "map"])
def test_small_factors_of_heads(on_map, heads, cuda_kernels):
    """They are no reason for float16 to round the gradients of logits to few bits."""
    scale = torch.tensor([1e-3, 0.5e-3, 0.8e-3, -1e-3])[:heads]
    query = tokens(1, 8, 8, heads, 32, dtype=torch.float16, seed=4)
    call = [query, *operands(size=(8, 8), dtype=torch.float16)[1:]]
    grad_out = (tokens(*query.shape, seed=3) * 0.04).half()

    def gradients(where, *data):
        query, key, value, scale, grad_out = data
        inputs = [t.requires_grad_() for t in (query, key, value)]
        if on_map:
            out = where.spatial_attention(query, key, value, [vk.Full(), vk.Block(4)], scale=scale)
        else:
            query, key, value, grad_out = (t.flatten(1, 2) for t in (query, key, value, grad_out))
            out = where.attention(query, key, value, scale=scale)
        return torch.autograd.grad(out, inputs, grad_out)

    found = gradients(vk, *(t.clone() for t in (*call, scale, grad_out)))
    expected = gradients(reference, *(t.double() for t in (*call, scale, grad_out)))
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).abs().max() <= 4 * ROUNDING[torch.float16] * other.abs().max()


@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
def test_256_columns(dtype, cuda_kernels):
    call = operands(size=(6, 7), d=250, dtype=dtype)
    expected = reference.spatial_attention(*(t.double() for t in call), [vk.Neighborhood(3)] * 2)
    found = vk.na2d(*call, 3)
    rounding = ROUNDING.get(dtype, 2e-6)
    assert (found.double() - expected).abs().max() <= 2 * rounding * call[2].abs().max()


@pytest.mark.parametrize("rule", [vk.Block(4), vk.Neighborhood(3)], ids=str)
def test_rows_at_any_address(rule, cuda_kernels):
    """A part of another tensor may be contiguous and begin at an odd address: PyTorch makes such gradients."""

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    results = []
    for change in (shifted, lambda t: t):
        call = [change(t).requires_grad_() for t in operands(size=(8, 8))]
        out = vk.spatial_attention(*call, [rule] * 2)
        results.append((out, *torch.autograd.grad(out, call, change(operands(size=(8, 8))[2]))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=0.05)


def test_a_head_without_keys(cuda_kernels):
    call = operands(size=(8, 8), h=2)
    out, lse = vk.spatial_attention(*call, [vk.Neighborhood(3)] * 2, head_map=torch.tensor([7, 1]), return_lse=True)
    assert torch.equal(out[..., 0, :], torch.zeros_like(out[..., 0, :])) and lse[..., 0].isneginf().all()
    assert out[..., 1, :].any()


def test_what_has_no_kernels(cuda_kernels):
    wide = [t.requires_grad_() for t in operands(size=(4, 4), d=130)]
    with pytest.raises(RuntimeError, match=r"_backward: got CUDA tensors, .* of a head dimension above 128"):
        vk.na2d(*wide, 3).sum().backward()
    for reason, dtype, d in (("of a head dimension above 256", torch.bfloat16, 264), ("in float64", torch.float64, 8)):
        with pytest.raises(RuntimeError, match=f"got CUDA tensors, .* for attention over maps {reason}"):
            vk.na2d(*operands(size=(4, 4), d=d, dtype=dtype), 3)


def test_tables_of_many_tiles(cuda_kernels):
    """Blocks take several tiles where a table's gradient is summed, and the bits do not depend on their order."""
    axes = [vk.Neighborhood(3), vk.Full()]
    call = [t.float().requires_grad_() for t in operands(b=40, size=(9, 5), h=33, d=8)]
    bias = (tokens(33, 5, 9, dtype=torch.float32, seed=3) / 4).requires_grad_()
    found = []
    for seed in (0, 1):
        cuda_kernels.configure(multiprocessors=132, seed=seed)
        found.append(torch.autograd.grad(vk.spatial_attention(*call, axes, bias_table=bias).sin().sum(), [*call, bias]))
    assert all(torch.equal(*both) for both in zip(*found, strict=True))
    wide = [t.detach().double().requires_grad_() for t in (*call, bias)]
    loss = reference.spatial_attention(*wide[:3], axes, bias_table=wide[3]).sin().sum()
    for one, other in zip(found[0], torch.autograd.grad(loss, wide), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    assert 33 * 31 in {launch.grid[0] for launch in cuda_kernels.launches()}, "31 blocks for 80 tiles of a head"
