"""What an error says: the operator, the argument, what it got and what it takes. (test_fuzz has the breadth.)"""

import re

import pytest
import torch
import vitkernels as vk
from support.calls import outputs_of
from support.devices import FUNCTIONS, ON_CPU
from support.gates.errors import ERRORS, ON_MAP, PARTS, QKV, TRANSPOSED, VALUE_ERRORS, VARLEN, check_text, each_error


@each_error(ERRORS)
def test_text(function, call, text):
    check_text(function, call, text)


@pytest.mark.skipif(not ON_CPU, reason="values inside tensors are read by kernels alone")
@each_error(VALUE_ERRORS)
def test_values(function, call, text):
    check_text(function, call, text)


def test_the_calls_are_right_otherwise():
    """Else the errors above could have another reason."""
    for function, call, shape in (
        (vk.attention, QKV, (2, 5, 4, 3)),
        (vk.attention_varlen, VARLEN, (5, 4, 3)),
        (vk.attention_transposed, TRANSPOSED, (2, 7, 4, 3)),
        (vk.merge_attentions, PARTS, (2, 5, 3)),
        (vk.spatial_attention, ON_MAP, (2, 5, 7, 4, 3)),
    ):
        if ON_CPU or torch.float32 in FUNCTIONS.get(function.__name__, ()):
            assert outputs_of(function(**call))[0].shape == shape


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (lambda: vk.Block(0), "Block: size is 0, takes an integer from 1 on"),
        (lambda: vk.Block(7, -1), "Block: shift is -1, takes an integer from 0 on"),
        (lambda: vk.Halo(7, 1.5), "Halo: halo is 1.5, takes an integer from 0 on"),
        (lambda: vk.Neighborhood("7"), "Neighborhood: kernel_size is '7', takes an integer from 1 on"),
        (lambda: vk.Sliding(3, True), "Sliding: dilation is True, takes an integer from 1 on"),
        (lambda: vk.Full([2]), "Full: step is [2], takes an integer from 1 on"),
    ],
)
def test_rules(rule, text):
    with pytest.raises(RuntimeError, match=re.escape(f"vitkernels::{text}")):
        rule()
