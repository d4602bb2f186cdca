"""Gradients against finite differences, in float64."""

import torch
from support.calls import learning, outputs_of, replace
from support.devices import need
from torch.utils import _pytree as pytree


def gradients_match_differences(sample, fast_mode=False):
    """Entry by entry, or in ``fast_mode`` along one direction drawn at random for each tensor."""
    need(sample, torch.float64)
    # Finite differences perturb entry by entry: no views that share entries, and no coarser dtype.
    call = replace(sample.call(torch.float64, sizes=sample.small()), torch.clone)
    for tensor in learning(call):
        tensor.requires_grad_(tensor.dtype == torch.float64)

    def function(*perturbed):
        following = iter(perturbed)
        perturbed_call = pytree.tree_map_only(torch.Tensor, lambda t: next(following) if t.requires_grad else t, call)
        # The lse of a row without keys is -inf whatever happens: a finite constant for the differences.
        outputs = outputs_of(sample.function(**perturbed_call))
        return tuple(o.masked_fill(o == -torch.inf, 0.0) for o in outputs)

    leaves = learning(call)
    assert not leaves or torch.autograd.gradcheck(function, leaves, fast_mode=fast_mode)
