"""Without PyTorch's private interfaces, one by one: the same results, by the ordinary path."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vitkernels as vk

PACKAGE = Path(vk.__file__).parent
MODULE = PACKAGE / "_torch_private.py"

# An interface is gone while the module looks for it, or for what the package asks of an operator. PyTorch needs it too.
SCRIPT = """
import importlib.util
import sys
import torch
from torch._ops import OpOverload
from torch.autograd import forward_ad

owner, name = {owner}, {name!r}


def hide(self, attribute):
    if attribute == name and "vitkernels" in sys._getframe(1).f_code.co_filename:
        raise AttributeError(attribute)
    return object.__getattribute__(self, attribute)


if owner is OpOverload:  # an attribute of its instances
    OpOverload.__getattribute__ = hide
elif owner is not None:
    taken = getattr(owner, name)
    delattr(owner, name)
    spec = importlib.util.spec_from_file_location("vitkernels._torch_private", {module!r})
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    setattr(owner, name, taken)
import vitkernels as vk

if owner is OpOverload:
    del OpOverload.__getattribute__
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
for function in (vk.attention, merged):
    found.append(torch.vmap(function)(q, k, v).double())
    loss = lambda q, k, v, f=function: (f(q, k, v) * w[0]).sum()
    found.append(torch.vmap(torch.func.grad(loss))(q, k, v).double())
    total = lambda q, k, v, f=function: (torch.vmap(f)(q, k, v) * w).sum()
    found.extend(g.double() for g in torch.func.grad(total, (0, 1, 2))(q, k, v))
leaf = q[0].clone().requires_grad_()
out = vk.attention(leaf, k[0], v[0])
found.extend(g.double() for g in torch.autograd.grad(out, leaf, w, is_grads_batched=True))
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
    "_add_batch_dim": "torch",
    "_dispatch_keys": "torch._C",
    "_dispatch_tls_is_dispatch_key_included": "torch._C",
    "_parse_dispatch_key": "torch._C",
    "_remove_batch_dim": "torch",
    "_ExcludeDispatchKeyGuard": "torch._C",
    "_are_functorch_transforms_active": "torch._C",
    "_dispatch_has_kernel_for_dispatch_key": "torch._C",
    "_functorch": "torch._C",
    "_len_torch_dispatch_stack": "torch._C",
    "get_single_level_autograd_function_allowed": "torch._C._functorch",
    "set_single_level_autograd_function_allowed": "torch._C._functorch",
    "_is_tracing": "torch._C",
    "_current_level": "forward_ad",
    "_op": "OpOverload",
    "_schema": "OpOverload",
}


def results(file, owner="None", name=""):
    script = SCRIPT.format(owner=owner, name=name, file=str(file), module=str(MODULE))
    ran = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return torch.load(file)


@pytest.fixture(scope="module")
def with_all(tmp_path_factory):
    return results(tmp_path_factory.mktemp("private") / "all.pt")


@pytest.mark.parametrize("name", INTERFACES)
def test_without(name, with_all, tmp_path):
    torch.testing.assert_close(results(tmp_path / "found.pt", INTERFACES[name], name), with_all, rtol=0, atol=0)


def test_they_stand_in_one_module():
    """And each of them is among the tests."""
    private = re.compile(r"torch\._[a-zA-Z]\w*|forward_ad\._\w+|\._schema\b|\._op\b|_dynamo\w*")
    for path in PACKAGE.rglob("*.py"):
        found = set(private.findall(path.read_text()))
        assert not found or path == MODULE, (path, found)
    text = MODULE.read_text()
    assert [name for name in INTERFACES if name not in text] == []
    used = set(re.findall(r"torch\._C\.(_\w+)|\"(_\w+)\"", text))
    names = {name for pair in used for name in pair if name}
    assert names <= INTERFACES.keys() | {"_C", "_get_schema"}, names
