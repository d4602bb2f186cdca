"""Without PyTorch's private interfaces, one by one: the same results, by the ordinary path."""

from __future__ import annotations

from pathlib import Path

import vitkernels as vk

PACKAGE = Path(vk.__file__).parent

# What the package looks for is gone while it is imported. PyTorch, which needs it as well, has it back afterwards.
SCRIPT = """
import sys
import torch
from torch._ops import OpOverload
from torch.autograd import forward_ad
owner, name = {owner}, {name!r}
if owner is not None:
    if owner is OpOverload:
        taken, OpOverload.__getattribute__ = OpOverload.__getattribute__, lambda self, n: (
            object.__getattribute__(self, n + ("?" if n == name and "vitkernels" in sys._getframe(1).f_code.co_filename else "")))
    else:
        taken = getattr(owner, name)
        delattr(owner, name)
import vitkernels as vk
if owner is OpOverload:
    OpOverload.__getattribute__ = taken
elif owner is not None:
    setattr(owner, name, taken)
assert "torch._dynamo" not in sys.modules, "the compiler was imported"

torch.manual_seed(0)
q, k, v, w = (torch.randn(3, 2, 9, 3, 8) for _ in range(4))
found = []


def gradients(function, *tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    (out.float() * w[0]).sum().backward()
    found.extend([out.detach().double(), *(leaf.grad.double() for leaf in leaves)])


def merged(q, k, v):
    return vk.attention(q, k, v, additional_keys=k[:, :2], additional_values=v[:, :2])


def cast(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        out = vk.attention(q, k, v)
    assert out.dtype == torch.bfloat16
    return out


found.append(vk.attention(q[0], k[0], v[0]).double())
for function in (vk.attention, merged, cast):
    gradients(function, q[0], k[0], v[0])
with torch.autocast("cpu", torch.bfloat16):
    found.append(vk.attention(q[0], k[0], v[0]).double())
    op = torch.ops.vitkernels.attention.default
    types = [t.type for t in op._schema.arguments]
for function in (vk.attention, merged):
    found.append(torch.vmap(function)(q, k, v).double())
    loss = lambda q, k, v, f=function: (f(q, k, v) * w[0]).sum()
    found.append(torch.vmap(torch.func.grad(loss))(q, k, v).double())
    total = lambda q, k, v, f=function: (torch.vmap(f)(q, k, v) * w).sum()
    found.extend(g.double() for g in torch.func.grad(total, (0, 1, 2))(q, k, v))
try:
    torch.func.jvp(lambda s: vk.attention(q[0], k[0], v[0], scale=s), (torch.ones(3),), (torch.ones(3),))
except RuntimeError as error:
    assert "takes scale without a tangent" in str(error), error
else:
    raise AssertionError("a tangent was dropped")
traced = torch.jit.trace(lambda q: vk.attention(q, q, q), (q[0],), check_trace=False)
assert any("vitkernels::attention" in str(node) for node in traced.graph.nodes()), traced.graph
torch.save(found, {file!r})
"""

INTERFACES = {
    "_AutoDispatchBelowAutograd": "torch._C",
    "_ExcludeDispatchKeyGuard": "torch._C",
    "_are_functorch_transforms_active": "torch._C",
    "_dispatch_has_kernel_for_dispatch_key": "torch._C",
    "_is_tracing": "torch._C",
    "_current_level": "forward_ad",
    "_op": "OpOverload",
    "_schema": "OpOverload",
}
