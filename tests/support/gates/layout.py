"""Memory that is not the tensors': odd strides, padding full of NaN, gradients with strides of zero."""

import torch
from support.calls import differentiate, replace
from support.devices import dtype_of
from support.layouts import LAYOUTS, spread
from torch.utils import _pytree as pytree


def strides_and_padding(sample, dtype, sizes=None):
    call = replace(sample.call(dtype, sizes=sizes), torch.clone)
    expected = pytree.tree_leaves(differentiate(sample.function, call))
    for layout in LAYOUTS:
        found = pytree.tree_leaves(differentiate(sample.function, replace(call, layout), change=layout))
        for a, b in zip(found, expected, strict=True):
            if layout is spread and "mixed" in sample.tags:
                torch.testing.assert_close(a, b)  # PyTorch's own part rounds as the strides have it
            else:
                assert torch.equal(a, b), layout.__name__


def expanded_gradients(sample, dtype=torch.float32, sizes=None):
    """``out.sum().backward()`` brings a gradient with strides of zero."""
    call = sample.call(dtype_of(sample, dtype), sizes=sizes)
    expected = differentiate(sample.function, call, change=torch.ones_like)
    found = differentiate(sample.function, call, change=lambda t: t.new_ones(()).expand(t.shape))
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b)
