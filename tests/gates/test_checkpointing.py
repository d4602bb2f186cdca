"""Calls under checkpointing, and under hooks that keep what the backward needs elsewhere."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.calls import cotangent, learning, outputs_of
from support.devices import ON_CPU, dtype_of
from support.nn_modules import MODULES
from support.samples import COVERING
from support.samples_named import NAMED_SAMPLES
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

CHOSEN = COVERING + (NAMED_SAMPLES if ON_CPU else [])


def of_sample(sample):
    call = sample.call(dtype_of(sample, torch.float32), sizes=sample.small())
    leaves, tree = pytree.tree_flatten(call)
    return (lambda *leaves: sample.function(**pytree.tree_unflatten(leaves, tree))), leaves


def of_module(name):
    torch.manual_seed(0)
    module, shape = MODULES[name]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def call(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    return call, [torch.randn(shape, requires_grad=True), *parameters]


CASES = [pytest.param(of_sample, s, id=str(s)) for s in CHOSEN] + [pytest.param(of_module, m, id=m) for m in MODULES]
each_case = pytest.mark.parametrize(("made", "of"), CASES)


def gradients(call, arguments) -> list[Tensor]:
    outputs, leaves = outputs_of(call(*arguments)), learning(arguments)
    for leaf in leaves:
        leaf.grad = None
    torch.autograd.backward(outputs, [cotangent(o) for o in outputs])
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["hooks", "reentrant"])
@each_case
def test_checkpoint(made, of, use_reentrant):
    call, arguments = made(of)
    found = gradients(lambda *args: checkpoint(call, *args, use_reentrant=use_reentrant), arguments)
    torch.testing.assert_close(found, gradients(call, arguments), rtol=0, atol=0, equal_nan=True)


@each_case
def test_saved_tensors_are_unpacked_once(made, of):
    call, arguments = made(of)
    unpacked: Counter[int] = Counter()
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    def unpack(i: int) -> Tensor:
        unpacked[i] += 1
        return packed[i]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        found = gradients(call, arguments)
    assert packed and max(unpacked.values()) == 1, unpacked
    torch.testing.assert_close(found, gradients(call, arguments), rtol=0, atol=0, equal_nan=True)


@each_case
def test_save_on_cpu(made, of):
    call, arguments = made(of)
    with torch.autograd.graph.save_on_cpu():
        found = gradients(call, arguments)
    torch.testing.assert_close(found, gradients(call, arguments), rtol=0, atol=0, equal_nan=True)
