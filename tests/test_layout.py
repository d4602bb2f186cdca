"""Memory that is not the tensors': odd strides, padding full of NaN, outputs and scratch full of NaN."""

import pytest
import torch
from calls import differentiate, replace
from devices import DEVICE, ON_CPU, dtype_of
from layouts import LAYOUTS, spread
from samples import each_sample
from torch.utils import _pytree as pytree


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_sample
def test_strides_and_padding(sample, dtype, layout, sizes=None):
    call = replace(sample.call(dtype, sizes=sizes), torch.clone)
    expected = differentiate(sample.function, call)
    found = differentiate(sample.function, replace(call, layout), change=layout)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if layout is spread and "mixed" in sample.tags:
            torch.testing.assert_close(a, b)  # PyTorch's own part rounds as the strides have it
        else:
            assert torch.equal(a, b)


@each_sample
def test_expanded_gradients(sample, dtype=torch.float32, sizes=None):
    """``out.sum().backward()`` brings a gradient with strides of zero."""
    call = sample.call(dtype_of(sample, dtype), sizes=sizes)
    expected = differentiate(sample.function, call, change=torch.ones_like)
    found = differentiate(sample.function, call, change=lambda t: t.new_ones(()).expand(t.shape))
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def poisoned_allocations():
    """New tensors, the kernels' scratch memory among them, are filled with NaN (all bits set, for bytes)."""
    before = torch.are_deterministic_algorithms_enabled()
    # PyTorch has no deterministic form of some operations of the references on a GPU; ours take no part in that.
    torch.use_deterministic_algorithms(True, warn_only=not ON_CPU)
    assert torch.utils.deterministic.fill_uninitialized_memory
    memory = torch.empty(3, device=DEVICE), torch.empty(3, dtype=torch.uint8, device=DEVICE)
    assert memory[0].isnan().all() and (memory[1] == 255).all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def expected(sample, dtype):
    """What the call gives in ordinary memory; set up before the poison."""
    return pytree.tree_leaves(differentiate(sample.function, sample.call(dtype)))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@each_sample
def test_uninitialised_memory(sample, dtype, expected, poisoned_allocations):
    for found, wanted in zip(
        pytree.tree_leaves(differentiate(sample.function, sample.call(dtype))), expected, strict=True
    ):
        assert not found.isnan().any() and torch.equal(found, wanted)
