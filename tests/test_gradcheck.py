"""Gradients against finite differences, in float64."""

import torch
from calls import learning, outputs_of, replace, tensors
from samples import each_small_sample


@each_small_sample
def test_gradcheck(sample):
    # gradcheck perturbs entries one by one: no views that share them.
    call = replace(sample.call(torch.float64, sizes=sample.small()), torch.clone)
    leaves = learning(call)

    def function(*perturbed):
        at = iter(perturbed)
        outputs = outputs_of(sample.function(**replace_learning(call, lambda: next(at))))
        # The lse of a row without keys is -inf whatever happens: a finite constant for the differences.
        return tuple(o.masked_fill(o == -torch.inf, 0.0) for o in outputs)

    if leaves:
        assert torch.autograd.gradcheck(function, leaves, fast_mode=False, raise_exception=True)
    else:
        assert all(not o.requires_grad for o in outputs_of(sample.function(**call))), tensors(call)


def replace_learning(call, following):
    return torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: following() if t.requires_grad else t, call
    )
