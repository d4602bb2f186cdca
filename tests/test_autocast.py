"""Under autocast the data become bfloat16; statistics, biases and scales keep their precision."""

import pytest
import torch
from calls import differentiate, outputs_of, replace, statistics_dtype, tensors
from samples import Input, each_small_sample
from torch.utils import _pytree as pytree


def autocast(function, dtype=torch.bfloat16):
    def run(**call):
        with torch.autocast("cpu", dtype):
            return function(**call)

    return run


@each_small_sample
def test_casts_the_data_alone(sample):
    """The result is that of a call whose data were bfloat16 to begin with: biases lose no bit."""
    call = sample.call(torch.float32, sizes=sample.small())
    if sample.arguments.get("qk_norm"):
        pytest.skip("the norm is taken in the call's own dtype, before the operator")
    rounded = {name: round_data(sample.arguments[name], argument) for name, argument in call.items()}
    outputs, grads = differentiate(autocast(sample.function), call)
    expected, expected_grads = differentiate(sample.function, rounded)
    for found, wanted in zip(outputs, expected, strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    for found, wanted in zip(grads, expected_grads, strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, wanted.float())


def round_data(declared, argument):
    """bfloat16 for what is declared as data, in the structure of the call."""
    if isinstance(declared, list):
        return [round_data(d, a) for d, a in zip(declared, argument, strict=True)]
    if isinstance(declared, Input) and not declared.statistics and argument.is_floating_point():
        return replace(argument, lambda t: t.bfloat16())
    return argument


@each_small_sample
def test_float64_stays(sample):
    call = sample.call(torch.float64, sizes=sample.small())
    found = differentiate(autocast(sample.function), call)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(differentiate(sample.function, call)), strict=True):
        assert a.dtype == torch.float64 and torch.equal(a, b)


@each_small_sample
def test_statistics_have_their_dtype(sample):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        outputs = outputs_of(sample.function(**sample.call(dtype, sizes=sample.small())))
        assert [o.dtype for o in outputs] == [dtype, statistics_dtype(dtype)][: len(outputs)]
        assert all(o.device == tensors(sample.call(dtype))[0].device for o in outputs)
