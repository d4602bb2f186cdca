"""The norm that becomes a batch norm, and its way into the linear layer behind it."""

import copy
import re

import pytest
import torch
import vitkernels as vk
from support.mechanisms import agree_module, tokens
from support.model_zoo import randomised
from torch import nn


def trained(dtype=torch.float64):
    """With statistics that are neither 0 nor 1, some of a channel that hardly varies."""
    module = randomised(vk.nn.RepBN(16, dtype=dtype))
    for _ in range(20):
        module(torch.randn(4, 9, 16, dtype=dtype) * torch.linspace(0.01, 5, 16).to(dtype) + torch.arange(16))
    return module.eval()


def test_running_statistics():
    """In evaluation, those of training: of all tokens of a batch."""

    def formula(p, x):
        normal = (x - p["bn.running_mean"]) / (p["bn.running_var"] + 1e-5).sqrt()
        return normal * p["bn.weight"] + p["bn.bias"] + p["alpha"] * x

    module = trained(torch.float32)
    agree_module(module, formula, tokens(2, 3, 5, 16))
    twin = nn.BatchNorm1d(16)
    x = torch.randn(4, 9, 16)
    module.train().bn.load_state_dict(twin.state_dict())
    module(x)
    twin(x.transpose(1, 2))
    torch.testing.assert_close(module.bn.state_dict(), twin.state_dict())


def test_share_of_the_layer_norm():
    """None of it goes in the warm steps, then as much in each step, and nothing is left."""
    module = vk.nn.ProgressiveRepBN(16, 4, warm=2, r0=0.8, dtype=torch.float64)
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    for share in (1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0):
        expected = share * module.norm1(x) + (1 - share) * copy.deepcopy(module.norm2)(x)
        torch.testing.assert_close(module(x), expected)


def test_evaluation_before_the_end():
    """Only what will remain, and no step."""
    module = vk.nn.ProgressiveRepBN(16, 5)
    x = torch.randn(3, 9, 16)
    module(x)
    module.eval()
    assert torch.equal(module(x), module.norm2(x)) and int(module.iter) == 4


def test_a_checkpoint_goes_on_where_it_was():
    module, twin = (vk.nn.ProgressiveRepBN(16, 5) for _ in range(2))
    x = torch.randn(3, 9, 16)
    for _ in range(3):
        module(x)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x)) and int(twin.iter) == 1


def test_names_are_slabs():
    of_batch_norm = [f"bn.{name}" for name in nn.BatchNorm1d(16).state_dict()]
    assert [*vk.nn.RepBN(16).state_dict()] == ["alpha", *of_batch_norm]
    counters, layer_norm = ["warm", "iter", "total_step"], ["norm1.weight", "norm1.bias"]
    names = [*counters, *layer_norm, "norm2.alpha", *(f"norm2.{name}" for name in of_batch_norm)]
    assert [*vk.nn.ProgressiveRepBN(16, 5).state_dict()] == names


@pytest.mark.parametrize("bias", [True, False])
def test_folds_into_the_next_layer(bias):
    norm, linear = trained(), nn.Linear(16, 24, bias=bias, dtype=torch.float64)
    folded = norm.folded_into(linear)
    x = 3 * torch.randn(4, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(folded(x), linear(norm(x)), rtol=1e-12, atol=1e-12)
    assert folded.weight.requires_grad and folded.weight is not linear.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_rounds_once(dtype):
    """The weights are those of float64, rounded: no more than that is lost."""
    norm, linear = trained(), nn.Linear(16, 24, dtype=torch.float64)
    exact = norm.folded_into(linear.to(dtype).double())
    folded = norm.folded_into(linear.to(dtype))
    assert folded.weight.dtype == folded.bias.dtype == dtype
    assert torch.equal(folded.weight, exact.weight.to(dtype)) and torch.equal(folded.bias, exact.bias.to(dtype))


def test_folds_when_it_is_finished():
    module, linear = vk.nn.ProgressiveRepBN(16, 2, warm=1), nn.Linear(16, 24).eval()
    x = torch.randn(3, 9, 16)
    for left in (3, 2, 1):
        with pytest.raises(RuntimeError, match=f"iter and warm have {left} steps left, takes 0 to fold"):
            module.folded_into(linear)
        module(x)
    folded = module.folded_into(linear)
    torch.testing.assert_close(folded(x), linear(module.eval()(x)), rtol=1e-5, atol=1e-5)
    assert not folded.training


def test_compiled_steps_are_counted():
    """In one graph, whatever the count."""
    module = vk.nn.ProgressiveRepBN(16, 4, warm=1)
    twin, x = copy.deepcopy(module), torch.randn(3, 9, 16)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for _ in range(7):
            torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(module.state_dict(), twin.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_device(dtype):
    for module in (vk.nn.RepBN(16, dtype=dtype), vk.nn.ProgressiveRepBN(16, 3, dtype=dtype)):
        assert {t.dtype for t in module.state_dict().values() if t.is_floating_point()} == {dtype}
        x = torch.randn(2, 7, 16, dtype=dtype, requires_grad=True)
        out = module(x)
        out.sum().backward()
        assert out.dtype == x.grad.dtype == dtype
    assert {t.device.type for t in vk.nn.ProgressiveRepBN(16, 3, device="meta").state_dict().values()} == {"meta"}


def test_no_tokens_leave_no_trace():
    """Statistics of nothing would be NaN."""
    module = vk.nn.RepBN(16)
    before = copy.deepcopy(module.state_dict())
    assert module(torch.zeros(0, 9, 16)).shape == (0, 9, 16)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


N = vk.nn
BAD = [
    (lambda: N.RepBN(0), "RepBN: channels is 0, takes an integer from 1 on"),
    (lambda: N.RepBN(16)(torch.zeros(2, 3, 15)), "RepBN: x has shape (2, 3, 15), takes (*, 16)"),
    (lambda: N.RepBN(16)(torch.zeros(16)), "RepBN: x has shape (16,), takes (*, 16)"),
    (lambda: N.RepBN(16)(torch.zeros(1, 1, 16)), "RepBN: x has shape (1, 1, 16), takes two tokens or more in training"),
    (lambda: N.RepBN(16).folded_into(nn.Linear(8, 8)), "RepBN: linear is of 8 inputs, takes an nn.Linear of 16 inputs"),
    (lambda: N.RepBN(16).folded_into(nn.Identity()), "RepBN: linear is Identity, takes an nn.Linear of 16 inputs"),
    (lambda: N.ProgressiveRepBN(16, 0), "ProgressiveRepBN: step is 0, takes an integer from 1 on"),
    (lambda: N.ProgressiveRepBN(16, 5, -1), "ProgressiveRepBN: warm is -1, takes an integer from 0 on"),
    (lambda: N.ProgressiveRepBN(16, 5, r0=2), "ProgressiveRepBN: r0 is 2, takes a number from 0 to 1"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_arguments_are_named(call, text):
    with pytest.raises(RuntimeError, match=re.escape("vitkernels.nn." + text)):
        call()
