"""Same build, shapes and strides: the same bits, however many threads work and whatever ran before.

On a GPU, which has no threads to set: the same bits in every one of the runs.
"""

import pytest
import torch
from support.calls import differentiate
from support.samples import each_sample
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.serial


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_sample
def test_same_bits(sample, dtype, threads):
    call = sample.call(dtype)
    threads(1)
    expected = pytree.tree_leaves(differentiate(sample.function, call))
    # Performer's features are a product of PyTorch's, whose bits depend on the number of threads on some CPUs.
    for count in (1,) if "performer" in sample.id else (1, 2, 5):
        threads(count)
        for found, wanted in zip(pytree.tree_leaves(differentiate(sample.function, call)), expected, strict=True):
            assert torch.equal(found, wanted), f"{count} threads"
