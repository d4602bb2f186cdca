"""Faults that were found once, each by the smallest call that shows it."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
import torch
import vitkernels as vk
from support.calls import Recorder, replace
from support.samples import SAMPLES
from torch.autograd import forward_ad
from vitkernels._library import isas_supported


@pytest.mark.parametrize("longest", [2**63 - 1, 2**31 + 1, -1])
@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
def test_longest_length_is_bounded(name, longest):
    q, ends = torch.zeros(40, 2, 8), torch.tensor([0, 10, 40])
    lengths = {"max_seqlen_q": 30, "max_seqlen_k": 30, name: longest}
    with pytest.raises(RuntimeError, match=f"vitkernels::attention_varlen: {name} is {longest}, takes 0 to"):
        vk.attention_varlen(q, q, q, ends, ends, **lengths)


def test_forward_mode_is_refused():
    q = torch.randn(1, 3, 1, 4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(RuntimeError, match="vitkernels::attention: forward-mode derivatives are not implemented"):
            vk.attention(dual, q, q)
    with pytest.raises(RuntimeError, match="forward-mode derivatives are not implemented"):
        torch.func.jvp(lambda t: vk.attention(t, q, q), (q,), (q,))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_merge_attentions_keeps_nan(parts):
    lses = [torch.zeros(1, 1, 1) for _ in range(parts)]
    lses[0][:] = torch.nan
    out, lse = vk.merge_attentions([torch.ones(1, 1, 1, 3)] * parts, lses)
    assert out.isnan().all() and lse.isnan().all()


NAN_PAYLOADS = """
import torch, vitkernels as vk
for dtype, integer in ((torch.float32, torch.int32), (torch.float64, torch.int64)):
    q, k, v = (torch.randn(1, n, 1, 8, dtype=dtype) for n in (4, 5, 5))
    plain = vk.attention(q, k, v)
    for payload in (-1, torch.tensor(torch.nan, dtype=dtype).view(integer).item() + 1):
        bias = torch.zeros(1, 1, 4, 5, dtype=dtype)
        bias.view(integer)[0, 0, 1, 2] = payload
        out = vk.attention(q, k, v, bias=bias)
        assert out[0, 1].isnan().all(), (dtype, payload)
        others = [0, 2, 3]
        assert torch.equal(out[0, others], plain[0, others])
"""


@pytest.mark.parametrize("isa", isas_supported())
def test_any_nan_stays_nan(isa):
    command = [sys.executable, "-c", NAN_PAYLOADS]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VITKERNELS_ISA": isa})
    assert ran.returncode == 0, ran.stderr


HUGE_LOGITS = """
import torch, vitkernels as vk
generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 7, 7, 1, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3))
def rows(t): return t.flatten(1, -3)
def attention(of, q, k, v, scale): return of.attention(rows(q), rows(k), rows(v), scale=scale, return_lse=True)
def windows(of, q, k, v, scale):
    return of.spatial_attention(q, k, v, axes=[vk.Neighborhood(7)] * 2, scale=scale, return_lse=True)
def transposed(of, q, k, v, scale):
    _, lse = of.attention(rows(q), rows(k), rows(v), scale=scale, return_lse=True)
    return of.attention_transposed(rows(q), rows(k), rows(v), lse.detach(), scale=scale), lse
for function in (attention, windows, transposed):
    for scale in (1e6, 1e9, 1e11, -1e11, 1e30):
        out, lse = function(vk, q, k, v, scale)
        wanted, wanted_lse = function(vk.reference, q.double(), k.double(), v.double(), scale)
        torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2e-2)
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=0)
        for grad, of_double in zip(*(torch.autograd.grad(o.sum(), (v,)) for o in (out, wanted))):
            torch.testing.assert_close(grad, of_double, rtol=2e-2, atol=2e-2)
"""


@pytest.mark.parametrize("isa", isas_supported())
def test_huge_logits(isa):
    """The maximum is that of rounded products: subtracting it from an exact one may leave thousands."""
    command = [sys.executable, "-c", HUGE_LOGITS]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VITKERNELS_ISA": isa})
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("shape", [(3, 49, 49), (49,), (1, 1), (1,)], ids=str)
def test_gradient_shared_by_many_windows(shape):
    """A sum over hundreds of windows rounds no worse than PyTorch's, which adds them pairwise."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(512, 49, 3, 8) for _ in range(4))
    bias = torch.randn(shape)

    def gradient(function, *tensors):
        leaf = tensors[-1].clone().requires_grad_()
        function(*tensors[:3], bias=leaf).backward(grad.to(leaf.dtype))
        return leaf.grad.double()

    truth = gradient(vk.reference.attention, *(t.double() for t in (q, k, v, bias)))
    plain = (gradient(vk.reference.attention, q, k, v, bias) - truth).abs().max()
    ours = (gradient(vk.attention, q, k, v, bias) - truth).abs().max()
    # A row of dS adds up to zero but for the rounding of its lse, on both sides.
    rows = 512 * 49 * 3 / bias.numel()
    floor = max(1e-6 * max(1.0, truth.abs().max().item()), torch.finfo(torch.float32).eps * rows**0.5)
    assert ours <= 3 * plain + floor, f"{ours:.2g}, plain PyTorch {plain:.2g}"


def test_forward_and_backward_see_the_same_logits():
    """One more key than full vectors, and logits so large that another rounding of one would show in its gradient."""
    torch.manual_seed(0)
    errors = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        q, k, v, grad = (torch.randn(1, 257, 1, 64, generator=generator) * s for s in (12.0, 8.0, 1.0, 1.0))

        def value_gradient(function, dtype, q=q, k=k, v=v, grad=grad):
            leaf = v.to(dtype, copy=True).requires_grad_()
            function(q.to(dtype), k.to(dtype), leaf).backward(grad.to(dtype))
            return leaf.grad.double()

        truth = value_gradient(vk.reference.attention, torch.float64)
        plain = (value_gradient(vk.reference.attention, torch.float32) - truth).abs().max()
        errors.append(((value_gradient(vk.attention, torch.float32) - truth).abs().max() / plain).item())
    assert sorted(errors)[len(errors) // 2] <= 3.0, errors


def test_cosine_attention_of_small_and_large_float16():
    k, v = torch.randn(1, 5, 1, 8).half(), torch.randn(1, 5, 1, 8).half()
    assert vk.attention(torch.zeros(1, 2, 1, 8).half(), k, v, qk_norm="l2").isfinite().all()
    q = torch.randn(1, 2, 1, 8)
    a, b = (vk.attention((q / q.norm() * s).half(), k, v, qk_norm="l2", scale=4.0) for s in (1.0, 5e4))
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cosine_attention_of_zeros_has_finite_gradients(dtype):
    q, k, v = (torch.zeros(1, 3, 1, 8, dtype=dtype).requires_grad_() for _ in range(3))
    (vk.attention(q, k + 1, v + 1, qk_norm="l2") * torch.arange(8)).sum().backward()
    vk.attention(q + 1, k, torch.randn(1, 3, 1, 8, dtype=dtype), qk_norm="l2", scale=100.0).square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    assert k.grad.abs().max() < 1e4


def test_huge_empty_batch_is_cheap():
    q = torch.zeros(2**40, 0, 1, 1, requires_grad=True)
    vk.attention(q, q, q).sum().backward()
    assert q.grad.shape == q.shape


def test_out_of_memory_names_the_shape():
    q = torch.zeros(1, 2, 1, 4).expand(2**44, 2, 1, 4)
    with pytest.raises(
        RuntimeError, match=r"vitkernels::attention: cannot allocate a tensor of shape \(17592186044416, 2, 1, 4\)"
    ):
        vk.attention(q, q, q)


TOO_SHORT = [
    (vk.Neighborhood(1425), None, 2849), (vk.Block(900), None, 1799), (vk.Full(2), None, 1961),
    (vk.Halo(600, 200), "zero", 1599),
]  # fmt: skip


@pytest.mark.parametrize(("axis", "outside", "offsets"), TOO_SHORT, ids=[repr(row[0]) for row in TOO_SHORT])
def test_embeddings_without_a_table_are_long_enough(axis, outside, offsets):
    """One that was shorter than its axis was read, and its gradient written, beyond its end."""
    x = torch.randn(1, 1962, 3, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match=rf"rel_pos\[0\] has 3 offsets on axis 0, takes at least {offsets}"):
        vk.spatial_attention(x, x, x, [axis], rel_pos=[torch.randn(3, 16, requires_grad=True)], outside=outside)


def resized(t):
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)
    return t


FIRST = {s.operator: s for s in reversed(SAMPLES)}.values()


@pytest.mark.parametrize("sample", FIRST, ids=str)
def test_storages_that_were_freed(sample):
    """Those of sharded parameters are resized to nothing between uses."""
    call = replace(sample.call(torch.float32, sizes=sample.small()), lambda t: t.detach())
    found = 0
    for name, argument in call.items():
        if isinstance(argument, torch.Tensor) and argument.numel() > 1:
            with pytest.raises(
                RuntimeError, match=rf"vitkernels::{sample.operator}: .* has a storage of \d+ bytes, takes"
            ):
                sample.function(**call | {name: resized(argument)})
            found += 1
    assert found or sample.operator == "merge_attentions"


ON_MAP = torch.randn(1, 4, 6, 2, 8)
REARRANGED = [
    (vk.attention, {"qk_norm": "l2"}, "query", ON_MAP[0]),
    (vk.attention, {}, "scale", torch.ones(1)),
    (vk.attention, {}, "bias", torch.zeros(2, 6, 6, dtype=torch.bfloat16)),
    (vk.window_attention, {"window_size": 2}, "bias_table", torch.zeros(9, 2)),
    (vk.na2d, {"kernel_size": 3}, "rpb", torch.zeros(2, 5, 5)),
    *((vk.cross_shaped_window_attention, {"stripe_width": 2}, name, ON_MAP) for name in ("query", "key", "value")),
    (vk.cross_shaped_window_attention, {"stripe_width": 2}, "scale", torch.ones(1)),
]


@pytest.mark.parametrize(("function", "options", "name", "tensor"), REARRANGED)
def test_freed_storages_that_pytorch_reads_first(function, options, name, tensor):
    data = ON_MAP[0] if function is vk.attention else ON_MAP
    call = {"query": data, "key": data, "value": data} | options
    function(**call | {name: tensor})
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    text = rf"vitkernels::{function.__name__}: {name} of shape \(.*\) has a storage of 0 bytes, takes"
    with pytest.raises(RuntimeError, match=text):
        function(**call | {name: tensor})


def test_merging_storages_that_were_freed():
    out, lse = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2)
    for outs, lses in (([out, resized(out)], [lse, lse]), ([out, out], [resized(lse), lse])):
        with pytest.raises(RuntimeError, match=r"vitkernels::merge_attentions: .* has a storage of"):
            vk.merge_attentions(outs, lses)


def test_copies_that_are_too_large():
    q = torch.randn(1, 2, 1, 2)
    key = torch.randn(1, 1, 1, 1).expand(1, 2**40, 1, 2)  # without a unit stride
    text = r"vitkernels::attention: cannot copy to contiguous memory a tensor of shape \(1, 1099511627776, 1, 2\)"
    with pytest.raises(RuntimeError, match=text):
        vk.attention(q, key, key)


@pytest.mark.parametrize("sample", [s for s in FIRST if "scale" in inspect.signature(s.function).parameters], ids=str)
def test_scale_beyond_the_kernels_numbers(sample):
    with Recorder() as recorder:
        sample.function(**sample.call(torch.float32, sizes=sample.small()))
    op, args = recorder.calls[-1]
    args = [1e39 if a.name == "scale" else arg for a, arg in zip(op._schema.arguments, args, strict=True)]
    with pytest.raises(RuntimeError, match=r"scale is 1e\+39, takes a finite number in float32"):
        op(*args)


def test_float64_terms_are_not_looked_at_by_tracers():
    q, bias = torch.randn(2, 4, 1, 8), torch.zeros(4, 4, dtype=torch.float64)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda q, b: vk.attention(q, q, q, bias=b))(q, bias)
    assert not any("isinf" in str(node.target) for node in graph.graph.nodes)
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        fake, wide = mode.from_tensor(q), mode.from_tensor(bias)
        assert vk.attention(fake, fake, fake, bias=wide).shape == q.shape


def test_float64_masks_of_the_lowest_number_remove_keys():
    q = torch.randn(1, 3, 2, 8)
    mask = torch.zeros(3, 3, dtype=torch.float64)
    mask[:, 2] = torch.finfo(torch.float64).min
    torch.testing.assert_close(vk.attention(q, q, q, bias=mask), vk.attention(q, q[:, :2], q[:, :2]))
