"""Attention between channels, in every dtype, and as the models that have it compute it."""

import pytest
import torch
import vitkernels as vk
from support.calls import differentiate
from support.devices import DTYPES
from support.error_policy import check_sample
from support.mechanisms import agree, tokens
from support.samples_named import NAMED_SAMPLES

SAMPLES = [s for s in NAMED_SAMPLES if s.operator == "channel_attention"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_error_policy(sample, dtype):
    check_sample(sample, dtype)


def test_same_bits():
    call = SAMPLES[1].call(torch.float32)
    first, second = ([t for each in differentiate(vk.channel_attention, call) for t in each] for _ in range(2))
    assert all(torch.equal(*both) for both in zip(first, second, strict=True))


def test_xcits():
    def formula(q, k, v, temperature):
        q, k, v = (t.permute(0, 2, 3, 1) for t in (q, k, v))  # [B, heads, d, N]
        q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
        weights = (q @ k.transpose(-1, -2) * temperature.reshape(-1, 1, 1)).softmax(-1)
        return (weights @ v).permute(0, 3, 1, 2)

    def ours(q, k, v, temperature):
        return vk.channel_attention(q, k, v, scale=temperature, qk_norm="l2")

    agree(ours, formula, *[tokens(2, 30, 3, 8) for _ in range(3)], tokens(3))


@pytest.mark.parametrize(("b", "n", "m"), [(0, 9, 9), (2, 0, 9), (2, 9, 0), (2, 1, 1)])
def test_empty_and_single(b, n, m):
    q, k, v = (torch.randn(b, t, 2, 4, requires_grad=True) for t in (n, n, m))
    for norm in (None, "l2"):
        out = vk.channel_attention(q, k, v, qk_norm=norm)
        assert out.shape == (b, m, 2, 4)
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_channels_of_zeros_have_finite_gradients():
    q, k, v = (torch.randn(1, 9, 2, 4).half() for _ in range(3))
    q[..., 1] = 0.0
    out = vk.channel_attention(q.requires_grad_(), k, v, qk_norm="l2")
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


Q = torch.zeros(2, 5, 4, 8)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"query": Q[0]}, "query has shape (5, 4, 8), takes (B, tokens, heads, d)"),
        ({"key": Q[:, :4]}, "key has shape (2, 4, 4, 8), takes query's number of tokens (5)"),
        ({"key": Q[:1]}, "key has shape (1, 5, 4, 8), takes query's batch size (2) and number of heads (4)"),
        ({"value": Q[..., :7]}, "value has shape (2, 5, 4, 7), takes key's head dimension (8)"),
        ({"value": Q.half()}, "value is torch.float16, takes query's torch.float32"),
        ({"value": Q.long()}, "value is torch.int64, takes a floating dtype"),
        ({"value": None}, "value is None, takes a tensor"),
        ({"scale": Q[0, 0, :3, 0]}, "scale has shape (3,), takes (4,)"),
        ({"scale": "1"}, "scale is '1', takes a number"),
        ({"qk_norm": "l1"}, "qk_norm is 'l1', takes None or 'l2'"),
        ({"groups": 5}, "groups is 5, takes a divisor of query's 32 channels"),
        ({"groups": 0}, "groups is 0, takes a divisor of query's 32 channels"),
        ({"groups": 1.5}, "groups is 1.5, takes an integer"),
    ],
)
def test_errors_are_the_callers(wrong, text):
    with pytest.raises(RuntimeError) as raised:
        vk.channel_attention(**{"query": Q, "key": Q, "value": Q} | wrong)
    assert str(raised.value).startswith("vitkernels::channel_attention: ") and text in str(raised.value)
