"""Memory that is not the tensors': odd strides, padding full of NaN, outputs and scratch full of NaN."""

import pytest
import torch
from support.calls import differentiate
from support.devices import DEVICE, ON_CPU
from support.gates import layout as gates
from support.samples import each_sample
from torch.utils import _pytree as pytree


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_sample
def test_strides_and_padding(sample, dtype):
    gates.strides_and_padding(sample, dtype)


@each_sample
def test_expanded_gradients(sample):
    gates.expanded_gradients(sample)


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
