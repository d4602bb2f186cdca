"""What PyTorch must know of every operator that a sample reaches: schema, fake, autograd."""

import pytest
import torch
from calls import differentiate, learning, outputs_of, tensors
from samples import SMALL_SAMPLES, each_small_sample, each_tagged
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACE = "vitkernels"


class Recorder(TorchDispatchMode):
    """Notes the calls of our operators, with the arguments that reached them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == NAMESPACE:
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


def operator_calls(sample):
    """The operators' calls in the sample's forward and backward, differentiable where the operator is."""
    with Recorder() as recorder:
        differentiate(sample.function, sample.call(torch.float32, sizes=sample.small()))
    return [(op, as_leaves(args, not is_backward(op))) for op, args in recorder.calls]


def is_backward(op):
    return op._schema.name.endswith("_backward")


def as_leaves(args, learn):
    return pytree.tree_map_only(
        torch.Tensor, lambda t: t.detach().requires_grad_(learn and t.is_floating_point()), args
    )


@each_small_sample
def test_opcheck(sample):
    for op, args in operator_calls(sample):
        torch.library.opcheck(op, args, test_utils=["test_schema", "test_autograd_registration", "test_faketensor"])


@each_tagged("core")
def test_opcheck_traced(sample):
    for op, args in operator_calls(sample):
        torch.library.opcheck(op, args, test_utils="test_aot_dispatch_dynamic")


def test_every_operator_has_a_sample():
    called = {op._schema.name for sample in SMALL_SAMPLES for op, _ in operator_calls(sample)}
    defined = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{NAMESPACE}::")}
    assert called == defined


def test_schemas():
    """Sizes would have to be symbolic, and keyword-only arguments break the stable ABI's calls."""
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith(f"{NAMESPACE}::"):
            assert not any(a.kwarg_only for a in schema.arguments), schema
            assert not any(a.type.kind() == "IntType" and "SymInt" not in str(a) for a in schema.arguments), schema


@each_tagged("core")
def test_second_derivatives_raise(sample):
    call = sample.call(torch.float64, sizes=sample.small())
    leaves = learning(call)
    outputs = [o for o in outputs_of(sample.function(**call)) if o.numel()]
    if not outputs:
        return
    grads = torch.autograd.grad(sum(o.sin().sum() for o in outputs), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{NAMESPACE}::.*second derivatives are not implemented"):
        sum(g.sin().sum() for g in grads).backward()


@each_small_sample
def test_outputs_share_no_memory(sample):
    """As the schemas say: results are new tensors."""
    call = sample.call(torch.float32, sizes=sample.small())
    outputs, grads = differentiate(sample.function, call)
    addresses = [t.data_ptr() for t in [*outputs, *grads, *tensors(call)] if t.numel()]
    assert len(addresses) == len(set(addresses))
