"""What PyTorch must know of every operator that a sample reaches: schema, fake, autograd."""

import re

import torch
import vitkernels as vk
from support.calls import NAMESPACE, WITHOUT_SAMPLES, defined_operators, outputs_of
from support.devices import DEVICE, dtype_of, why_not
from support.gates import registration as gates
from support.gates.registration import small_calls
from support.samples import SMALL_SAMPLES, each_covering, each_small_sample, each_tagged
from torch.utils import _pytree as pytree
from vitkernels._library import why_no_kernel


@each_small_sample
def test_opcheck(sample):
    gates.opcheck(sample)


@each_covering
def test_opcheck_traced(sample):
    gates.opcheck_traced(sample)


def test_every_operator_has_a_sample():
    called = {op._schema.name for sample in SMALL_SAMPLES if not why_not(sample) for op, _ in small_calls(sample)}
    names = {schema.name for schema in defined_operators()} - WITHOUT_SAMPLES
    assert called == {n for n in names if not why_no_kernel(n.removeprefix(f"{NAMESPACE}::"), DEVICE.type)}


def fixed_sizes(schema):
    """The integers among the arguments that a compiler takes for constants; the others are ``SymInt``."""
    return re.findall(r"\bint(?:\[\d*\])?\??(?= \w+)", str(schema).partition("->")[0])


def test_schemas():
    """No keyword-only arguments, which the stable ABI cannot call; every size symbolic."""
    assert fixed_sizes(torch._C.parse_schema("f(int[2] a, SymInt b, int? c, SymInt[] d) -> int")) == ["int[2]", "int?"]
    schemas = defined_operators()
    assert any("SymInt" in str(schema) for schema in schemas)
    for schema in schemas:
        assert not any(argument.kwarg_only for argument in schema.arguments), schema
        assert not fixed_sizes(schema), schema


@each_tagged("core")
def test_second_derivatives_raise(sample):
    gates.second_derivatives_raise(sample)


@each_tagged("core")
def test_functional_gradients(sample):
    """torch.func finds the gradients that autograd finds, in the same bits."""
    call = sample.call(dtype_of(sample, torch.float32), sizes=sample.small())
    leaves, tree = pytree.tree_flatten(call)
    chosen = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]

    def loss(tensors):
        changed = list(leaves)
        for i, tensor in zip(chosen, tensors, strict=True):
            changed[i] = tensor
        return sum(o.sin().sum() for o in outputs_of(sample.function(**pytree.tree_unflatten(changed, tree))))

    functional = torch.func.grad(loss)([leaves[i].detach() for i in chosen])
    recorded = torch.autograd.grad(loss([leaves[i] for i in chosen]), [leaves[i] for i in chosen])
    torch.testing.assert_close(list(functional), list(recorded), rtol=0, atol=0, equal_nan=True)


@each_tagged("core")
def test_unused_outputs_cost_nothing(sample):
    gates.unused_outputs_cost_nothing(sample)


def test_traced_calls_can_be_saved(tmp_path):
    """A function of Python's in the trace could not be."""
    x = torch.randn(1, 9, 2, 8, device=DEVICE, requires_grad=True)
    traced = torch.jit.trace(lambda x: vk.attention(x, x, x), (x,), check_trace=False)
    file = str(tmp_path / "traced.pt")
    torch.jit.save(traced, file)
    torch.testing.assert_close(torch.jit.load(file)(x), vk.attention(x, x, x), rtol=0, atol=0)
