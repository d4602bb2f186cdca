"""What PyTorch must know of every operator that a sample reaches: schema, fake, autograd."""

import pytest
import torch
from support.calls import NAMESPACE, differentiate, learning, operator_calls, outputs_of
from support.devices import HALF, dtype_of


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
    """Each output alone is differentiable, without a gradient made up for the others."""
    dtype = dtype_of(sample, torch.float64)
    if dtype in HALF:
        pytest.skip("the parts of a sum are rounded too coarsely")
    call = sample.call(dtype, sizes=sample.small())
    count = len(outputs_of(sample.function(**call)))
    _, together = differentiate(sample.function, call)
    alone = [differentiate(lambda i=i, **call: outputs_of(sample.function(**call))[i], call)[1] for i in range(count)]
    for total, *parts in zip(together, *alone, strict=True):
        torch.testing.assert_close(sum(parts), total)
