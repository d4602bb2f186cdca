"""Memory that is not the tensors': odd strides, padding full of NaN, outputs and scratch full of NaN."""

import pytest
import torch
from calls import differentiate, replace
from samples import each_sample
from torch.utils import _pytree as pytree


def poisoned(shape, dtype):
    """Whatever a stray read would make visible."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else 2**30, dtype=dtype)


def padded(tensor):
    """A view into larger memory: two entries before and three after, in every dimension."""
    memory = poisoned([n + 5 for n in tensor.shape], tensor.dtype)
    view = memory[tuple(slice(2, 2 + n) for n in tensor.shape)]
    return view.copy_(tensor)


def reordered(tensor):
    """Padded, with the dimensions but the last one in reverse order: (B, N, heads, d) in (heads, N, B, d)."""
    order = [*reversed(range(tensor.dim() - 1)), tensor.dim() - 1][-tensor.dim() :]
    return padded(tensor.permute(order)).permute([order.index(i) for i in range(tensor.dim())])


def spread(tensor):
    """Every other entry of the last dimension, after a padding that breaks all alignment."""
    if tensor.dim() == 0:
        return tensor.clone()
    memory = poisoned([*tensor.shape[:-1], 2 * tensor.size(-1) + 1], tensor.dtype)
    return memory[..., 1::2].copy_(tensor)


@pytest.mark.parametrize("layout", [padded, reordered, spread])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_sample
def test_strides_and_padding(sample, dtype, layout):
    call = replace(sample.call(dtype), torch.clone)
    expected = differentiate(sample.function, call)
    found = differentiate(sample.function, replace(call, layout), change=layout)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if layout is spread and "mixed" in sample.tags:
            torch.testing.assert_close(a, b)  # PyTorch's own part rounds as the strides have it
        else:
            assert torch.equal(a, b)


@each_sample
def test_expanded_gradients(sample):
    """``out.sum().backward()`` brings a gradient with strides of zero."""
    call = sample.call(torch.float32)
    expected = differentiate(sample.function, call, change=torch.ones_like)
    found = differentiate(sample.function, call, change=lambda t: torch.ones(()).to(t.dtype).expand(t.shape))
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def poisoned_allocations():
    """New tensors, the kernels' scratch memory among them, are filled with NaN (all bits set, for bytes)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all() and (torch.empty(3, dtype=torch.uint8) == 255).all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def expected(sample, dtype):
    """What the call gives in ordinary memory; set up before the poison."""
    return pytree.tree_leaves(differentiate(sample.function, sample.call(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@each_sample
def test_uninitialised_memory(sample, dtype, expected, poisoned_allocations):
    for found, wanted in zip(
        pytree.tree_leaves(differentiate(sample.function, sample.call(dtype))), expected, strict=True
    ):
        assert not found.isnan().any() and torch.equal(found, wanted)
