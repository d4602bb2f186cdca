"""Modules that compute on few tokens for many: LookupViT's block, PT-DiT's proxies, FIT's latents."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
import vitkernels as vk
from support.nn_modules import MODULES, PAIRS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "FITBlock": lambda **factory: (vk.nn.FITBlock(16, 2, 24, **factory), *PAIRS["FITBlock"]()[1:]),
    "LookupViTBlock": lambda **factory: (vk.nn.LookupViTBlock(16, 2, **factory), *PAIRS["LookupViTBlock"]()[1:]),
    "ProxyTokenAttention": lambda **factory: (
        vk.nn.ProxyTokenAttention(16, 2, (2, 4), **factory), MODULES["ProxyTokenAttention"]()[1],
    ),
}  # fmt: skip


def results(module, *inputs):
    """Outputs and the gradients of all inputs and parameters, in float64."""
    module.zero_grad()
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = module(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((out * torch.linspace(-3, 3, out.numel()).cos().view(out.shape).to(out)).sum() for out in outputs).backward()
    named = {f"grad {name}": p.grad for name, p in module.named_parameters()}
    named |= {f"grad {i}": x.grad for i, x in enumerate(leaves)}
    return {"output": torch.cat([out.detach().flatten() for out in outputs])} | named


def made(kind):
    """With weights that tell tokens apart: fresh ones give proxies that are nearly the same, and gradients of noise."""
    module, *shapes = KINDS[kind]()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module, [torch.randn(shape) for shape in shapes]


def doubled(named):
    return {name: t.double().clone() for name, t in named.items()}


def stock_attention(q, k, v, *, scale=None, bias=None, key_bias=None, is_causal=False, return_lse=False):
    """PyTorch's fused one where it is enough."""
    if return_lse:
        return vk.reference.attention(q, k, v, return_lse=True)
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bits(kind, dtype, monkeypatch):
    """As near to float64 as the same modules on PyTorch's attention, whose error is the largest of several inputs.

    In one of them, a gradient of few numbers is right by chance.
    """
    module, inputs = made(kind)
    cases = [inputs, *([torch.randn_like(x) for x in inputs] for _ in range(4))]
    wide = copy.deepcopy(module.to(dtype)).double()
    truths = [doubled(results(wide, *(x.to(dtype).double() for x in case))) for case in cases]
    mine = doubled(results(module, *(x.to(dtype) for x in inputs)))
    for name in ("attention", "layers", "lookup"):
        monkeypatch.setattr(f"vitkernels.nn.{name}.attention", stock_attention)
    monkeypatch.setattr("vitkernels.nn.lookup.attention_transposed", vk.reference.attention_transposed)
    stock = [doubled(results(module, *(x.to(dtype) for x in case))) for case in cases]
    for name, truth in truths[0].items():
        factor = 2 if name == "output" else 3
        error = float((mine[name] - truth).abs().max())
        plain = max(float((a[name] - b[name]).abs().max()) for a, b in zip(stock, truths, strict=True))
        bound = factor * plain + 2 * torch.finfo(dtype).eps * float(truth.abs().max())
        assert error <= bound, f"{name}: error {error}, PyTorch's {plain}"


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_and_device(kind):
    for dtype in (torch.float64, torch.bfloat16):
        module, *shapes = KINDS[kind](dtype=dtype)
        assert {p.dtype for p in module.parameters()} == {dtype}
        outputs = module(*(torch.randn(shape).to(dtype) for shape in shapes))
        assert all(out.dtype == dtype for out in outputs)
    module, *shapes = KINDS[kind](device="meta")
    assert {p.device.type for p in module.parameters()} == {"meta"}
    outputs = module(*(torch.empty(shape, device="meta") for shape in shapes))
    assert [out.shape for out in (outputs if isinstance(outputs, tuple) else (outputs,))] == [*map(torch.Size, shapes)]


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_graph(kind):
    module, inputs = made(kind)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = results(module, *inputs)
    found = {name.replace("_orig_mod.", ""): t for name, t in results(compiled, *inputs).items()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    module, inputs = made(kind)
    expected = results(module, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(module, *inputs)
    assert all(t is not None and t.isfinite().all() for t in found.values())
    error = (found["output"] - expected["output"]).abs().max() / expected["output"].abs().max()
    assert error < 0.05


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in tensors)])
        return out


def test_lookup_does_not_store_its_map():
    """Neither direction, nor the gradients: no tensor has as many numbers as heads times queries times keys."""
    module = vk.nn.LookupViTBlock(16, 2)
    x, compressed = torch.randn(1, 400, 16), torch.randn(1, 100, 16)
    with LargestTensor() as seen:
        sum(out.sum() for out in module(x, compressed)).backward()
    assert seen.numel < 2 * 400 * 100 / 3


@pytest.mark.parametrize(
    ("size", "window"), [((5, 7), (2, 3)), ((7,), (3,)), ((3, 4, 5), (2, 4, 2)), ((4, 4), 4)], ids=str
)
def test_proxies_of_unequal_windows(size, window):
    """The last windows of a map may be smaller: their proxies are the means of what is there."""
    module = vk.nn.ProxyTokenAttention(16, 2, window, dtype=torch.float64)
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    places = torch.cartesian_prod(*map(torch.arange, size)).view(-1, len(size)) // torch.tensor(module.window_size)
    of_window, index = places.unique(dim=0, return_inverse=True)
    tokens = x.flatten(1, -2)
    means = torch.stack([tokens[:, index == i].mean(1) for i in range(len(of_window))], 1)
    expected = module.cross_attn(tokens, module.proxy_attn(means)).view(x.shape)
    torch.testing.assert_close(module(x), expected)


def test_groups_meet_in_the_latents_only():
    """Without global layers no group sees another; with them all do."""
    x, latents = torch.randn(1, 3, 5, 16), torch.randn(1, 3, 2, 16)
    changed = x.clone()
    changed[:, 2] += 1
    for num_layers, is_seen in ((0, False), (1, True)):
        module = vk.nn.FITBlock(16, 2, num_local_layers=2, num_global_layers=num_layers)
        before, after = (module(t, latents)[0][:, :2] for t in (x, changed))
        assert torch.equal(before, after) != is_seen


N = vk.nn
BAD = [
    (lambda: N.LookupViTBlock(16, 3), "LookupViTBlock: dim is 16, takes a multiple of num_heads (3)"),
    (lambda: N.LookupViTBlock(16, 2, 0), "LookupViTBlock: mlp_ratio is 0, takes a number from 1 / 16 on"),
    (lambda: N.LookupViTBlock(16, 2)(torch.zeros(1, 4, 16), []), "LookupViTBlock: compressed is a list, takes a"),
    (lambda: N.LookupViTBlock(16, 2)([], []), "LookupViTBlock: x is a list, takes a tensor (B, N, dim)"),
    (lambda: N.FITBlock(16, 2)(torch.zeros(1, 4, 16), None), "FITBlock: x has shape (1, 4, 16), takes (B, groups, n,"),
    (
        lambda: N.FITBlock(16, 2)(torch.zeros(1, 4, 5, 16), torch.zeros(1, 3, 2, 16)),
        "FITBlock: latents has shape (1, 3, 2, 16), takes x's batch and groups (1, 4)",
    ),
    (lambda: N.FITBlock(16, 2, 15), "FITBlock: latent_dim is 15, takes a multiple of num_heads (2)"),
    (lambda: N.FITBlock(16, 2, num_global_layers=-1), "FITBlock: num_global_layers is -1, takes an integer from 0 on"),
    (lambda: N.ProxyTokenAttention(16, 2, 0), "ProxyTokenAttention: window_size is 0, takes an integer from 1 on"),
    (lambda: N.ProxyTokenAttention(16, 2, (1, 2, 3, 4)), "window_size is (1, 2, 3, 4), takes one to three sizes"),
    (
        lambda: N.ProxyTokenAttention(16, 2, (2,))(torch.zeros(1, 4, 4, 16)),
        "ProxyTokenAttention: x has shape (1, 4, 4, 16), takes (B, width, dim)",
    ),
    (
        lambda: N.ProxyTokenAttention(16, 2)(torch.zeros(1, 0, 4, 16)),
        "ProxyTokenAttention: x has shape (1, 0, 4, 16), takes a map of one token or more",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_arguments_are_named(call, text):
    with pytest.raises(RuntimeError, match=re.escape(text)) as raised:
        call()
    assert str(raised.value).startswith("vitkernels.nn.")
