"""What an error says: the operator, the argument, what it got and what it takes. (test_fuzz has the breadth.)"""

import re

import pytest
import torch
import vitkernels as vk
from support.calls import outputs_of
from support.devices import FUNCTIONS, ON_CPU
from support.gates.errors import CALLS, CONVERTED_ERRORS, ERRORS, PARTS, VALUE_ERRORS, check_text, each_error


@each_error(ERRORS)
def test_text(function, call, text):
    check_text(function, call, text)


@pytest.mark.skipif(not ON_CPU, reason="values inside tensors are read by kernels alone")
@each_error(VALUE_ERRORS + CONVERTED_ERRORS)
def test_values(function, call, text):
    check_text(function, call, text)


def test_the_calls_are_right_otherwise():
    """Else the errors above could have another reason."""
    for function, call in (*CALLS, (vk.merge_attentions, PARTS)):
        if ON_CPU or torch.float32 in FUNCTIONS.get(function.__name__, ()):
            of_values = call["outs"][0] if "outs" in call else call.get("value", call.get("value_q"))
            of_values = call["query"] if function is vk.channel_attention else of_values
            assert outputs_of(function(**call))[0].shape[-1] == of_values.shape[-1]


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (lambda: vk.Block(0), "Block: size is 0, takes an integer from 1 on"),
        (lambda: vk.Block(7, -1), "Block: shift is -1, takes an integer from 0 on"),
        (lambda: vk.Halo(7, 1.5), "Halo: halo is 1.5, takes an integer from 0 on"),
        (lambda: vk.Neighborhood("7"), "Neighborhood: kernel_size is '7', takes an integer from 1 on"),
        (lambda: vk.Sliding(3, True), "Sliding: dilation is True, takes an integer from 1 on"),
        (lambda: vk.Full([2]), "Full: step is [2], takes an integer from 1 on"),
        (lambda: vk.Full(torch.tensor(2)), "Full: step is tensor(2), takes an integer from 1 on"),
        (lambda: vk.Full(is_causal="no"), "Full: is_causal is 'no', takes True or False"),
        (lambda: vk.Full(is_causal=1), "Full: is_causal is 1, takes True or False"),
        (lambda: vk.Block(2, is_causal=5), "Block: is_causal is 5, takes True or False"),
        (lambda: vk.Block(2, is_causal=None), "Block: is_causal is None, takes True or False"),
        (lambda: vk.FeatureMap("gelu"), "FeatureMap: name is 'gelu', takes one of 'identity', 'relu', 'elu', 'exp',"),
        (lambda: vk.FeatureMap("focused", power=17), "FeatureMap: power is 17, takes an integer from 1 to 16"),
        (lambda: vk.FeatureMap("performer"), "FeatureMap: projection is None, takes a floating tensor (features, d)"),
        (lambda: vk.FeatureMap("relu", projection=torch.ones(2, 2)), "FeatureMap: projection is given, takes None for"),
    ],
)
def test_rules(rule, text):
    with pytest.raises(RuntimeError, match=re.escape(f"vitkernels::{text}")):
        rule()


@pytest.mark.skipif(not ON_CPU, reason="values inside tensors are read by kernels alone")
def test_a_value_of_an_argument_that_is_rearranged():
    x = torch.zeros(1, 5, 6, 2, 8)
    with pytest.raises(RuntimeError, match=r"vitkernels::na2d: rpb has 1e\+39, takes numbers that torch.float32 holds"):
        vk.na2d(x, x, x, 3, rpb=torch.full((2, 5, 5), 1e39, dtype=torch.float64))


@pytest.mark.parametrize(("function", "call"), CALLS, ids=[f.__name__ for f, _ in CALLS])
def test_options_that_nobody_has(function, call):
    name = function.__name__
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'colour'"):
        function(**call, colour=1)
