"""What PyTorch must know of every operator that a sample reaches: schema, fake, autograd."""

import pytest
import torch
from support.calls import NAMESPACE, Recorder, differentiate, is_backward, learning, operator_calls, outputs_of
from support.devices import HALF, dtype_of
from torch.utils import _pytree as pytree


def small_calls(sample, dtype=torch.float32):
    return operator_calls(sample.function, sample.call(dtype_of(sample, dtype), sizes=sample.small()))


def opcheck(sample, dtype=torch.float32):
    for op, args in small_calls(sample, dtype):
        torch.library.opcheck(op, args, test_utils=["test_schema", "test_autograd_registration", "test_faketensor"])


def opcheck_traced(sample):
    for op, args in small_calls(sample):
        torch.library.opcheck(op, args, test_utils="test_aot_dispatch_dynamic")


def second_derivatives_raise(sample):
    call = sample.call(dtype_of(sample, torch.float64), sizes=sample.small())
    outputs = [o for o in outputs_of(sample.function(**call)) if o.numel()]
    if not outputs:
        pytest.skip("a call without entries has no derivatives")
    grads = torch.autograd.grad(sum(o.sin().sum() for o in outputs), learning(call), create_graph=True)
    with pytest.raises(RuntimeError, match=f"{NAMESPACE}::.*second derivatives are not implemented"):
        sum(g.sin().sum() for g in grads).backward()


def unused_outputs_cost_nothing(sample):
    """Each output alone is differentiable; no gradient is made up for the others, nor computed for what learns not."""
    dtype = dtype_of(sample, torch.float64)
    call = sample.call(dtype, sizes=sample.small())
    with Recorder() as recorder:
        outputs, together = differentiate(sample.function, call)
    parts = []
    for i in range(len(outputs)):
        with Recorder() as alone:
            parts.append(differentiate(lambda i=i, **call: outputs_of(sample.function(**call))[i], call)[1])
        if i == 0:
            check_made_up(alone.calls, sum(is_backward(op) for op, _ in recorder.calls))
    if dtype not in HALF:  # which rounds the parts of a sum too coarsely
        for total, *of_outputs in zip(together, *parts, strict=True):
            torch.testing.assert_close(sum(of_outputs), total)
    data = {name: call[name] for name in ("query", "key", "value", "value_q") if name in call}
    with Recorder() as recorder:
        differentiate(sample.function, {**detached(call), **data})
    for op, args in recorder.calls:
        named = dict(zip([a.name for a in op._schema.arguments], args, strict=True))
        assert not [name for name, value in named.items() if name.startswith("need_") and value], op


def check_made_up(calls, count):
    """The first output's gradient comes alone; where several operators follow one another, to the last of them."""
    backward = [(op, args) for op, args in calls if is_backward(op)]
    assert len(backward) == count
    op, args = backward[0]
    given = {a.name: value for a, value in zip(op._schema.arguments, args, strict=True) if a.name.startswith("grad_")}
    assert given.pop("grad_out") is not None
    assert all(value is None for value in given.values()), f"{op}: {sorted(given)}"


def detached(call):
    """The call with nothing that learns."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, call)
