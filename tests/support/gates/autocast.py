"""Under autocast the data become bfloat16; statistics, biases and scales keep their precision."""

import torch
from support.calls import differentiate, learning, replace
from support.devices import DEVICE, need
from support.sample import Input
from torch.utils import _pytree as pytree


def autocast(function):
    def run(**call):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return function(**call)

    return run


def with_data_cast(declared, argument):
    """bfloat16 for what the sample declares as data."""
    if isinstance(declared, list):
        return [with_data_cast(d, a) for d, a in zip(declared, argument, strict=True)]
    if isinstance(declared, Input) and not declared.statistics and argument.is_floating_point():
        return replace(argument, lambda t: t.bfloat16())
    return argument


def casts_the_data_alone(sample):
    """The result is that of a call whose data were bfloat16 to begin with: a bias loses no bit."""
    call = expected_call = sample.call(torch.float32, sizes=sample.small())
    if torch._C._dispatch_has_kernel_for_dispatch_key(
        f"vitkernels::{sample.operator}", f"Autocast{DEVICE.type.upper()}"
    ):
        expected_call = {name: with_data_cast(sample.arguments[name], call[name]) for name in call}
    outputs, grads = differentiate(autocast(sample.function), call)
    expected, expected_grads = differentiate(sample.function, expected_call)
    for found, wanted in zip(outputs, expected, strict=True):
        assert found.dtype == wanted.dtype
        check_equal(sample, found, wanted)
    for found, wanted, into in zip(grads, expected_grads, learning(call), strict=True):
        assert found.dtype == into.dtype
        if wanted.dtype == into.dtype:
            check_equal(sample, found, wanted)
        else:  # summed over a tensor's uses before or after the rounding
            torch.testing.assert_close(found, wanted.float(), rtol=2e-2, atol=2e-2)


def check_equal(sample, found, wanted):
    if "mixed" in sample.tags:  # PyTorch's own part computes before the cast
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=4e-2)
    else:
        assert torch.equal(found, wanted)


def float64_stays(sample):
    need(sample, torch.float64)
    call = sample.call(torch.float64, sizes=sample.small())
    expected = differentiate(sample.function, call)
    found = differentiate(autocast(sample.function), call)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
