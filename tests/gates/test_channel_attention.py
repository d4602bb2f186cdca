"""Attention between channels as the models that have it compute it, at its borders, and its errors."""

import pytest
import torch
import vitkernels as vk
from support.mechanisms import agree, tokens


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
        ({"query": Q[0]}, "query has shape (5, 4, 8), takes 4 dimensions (B, N, heads, d)"),
        ({"key": Q[:, :4]}, "key has size 4 in dimension 1, takes 5 (query's number of tokens)"),
        ({"key": Q[:1]}, "key has size 1 in dimension 0, takes 2 (query's batch size)"),
        ({"value": Q[..., :7]}, "value has size 7 in dimension 3, takes 8 (key's head dimension)"),
        ({"value": Q.half()}, "value is float16, takes float32"),
        ({"value": Q.long()}, "value is int64, takes float32"),
        ({"value": None}, "value is None, takes a tensor"),
        ({"scale": Q[0, 0, :3, 0]}, "scale has shape (3,), takes (4,)"),
        ({"value": Q[:, :, :3]}, "value has size 3 in dimension 2, takes 4 (query's number of heads)"),
        ({"query": Q.long()}, "query is int64, takes float64, float32, bfloat16 or float16"),
        ({"query": Q[..., :0]}, "query has head dimension 0, takes at least 1"),
        ({"key": Q[..., :0], "value": Q[..., :0]}, "key has head dimension 0, takes at least 1"),
        (dict.fromkeys(("query", "key", "value"), Q[:, :, :0]), "query has 0 heads, takes at least 1"),
        ({"scale": 1e39}, "scale is 1e+39, takes a finite number in torch.float32"),
        ({"scale": "1"}, "scale is '1', takes a number"),
        ({"qk_norm": "l1"}, "qk_norm is 'l1', takes None or 'l2'"),
        ({"groups": 5}, "groups is 5, takes a divisor of query's 32 channels"),
        ({"groups": 2, "key": Q[:, :, :0]}, "groups is 2, takes a divisor of key's 0 channels"),
        ({"groups": 0}, "groups is 0, takes a divisor of query's 32 channels"),
        ({"groups": 1.5}, "groups is 1.5, takes an integer"),
    ],
)
def test_errors_are_the_callers(wrong, text):
    with pytest.raises(RuntimeError) as raised:
        vk.channel_attention(**{"query": Q, "key": Q, "value": Q} | wrong)
    assert str(raised.value).startswith("vitkernels::channel_attention: ") and text in str(raised.value)


def test_operators_own_errors():
    op = torch.ops.vitkernels.channel_attention
    with pytest.raises(RuntimeError, match=r"channel_attention: head_scale has shape \(3\), takes \(4\)"):
        op(Q, Q, Q, 1.0, torch.ones(3), False, False)
    with pytest.raises(RuntimeError, match="channel_attention: scale is inf, takes a finite number in float32"):
        op(Q, Q, Q, float("inf"), None, False, False)


@pytest.mark.parametrize("normalizes", [False, True])
def test_gradient_of_the_state(normalizes):
    def read(q, k, v):
        out, state = torch.ops.vitkernels.channel_attention(q, k, v, 0.5, None, normalizes, False)
        return out, state

    data = [tokens(2, n, 2, d).requires_grad_() for n, d in ((5, 3), (5, 4), (6, 4))]
    assert torch.autograd.gradcheck(read, data)
    assert torch.autograd.gradcheck(lambda *given: read(*given)[1], data)


def test_state_of_split_tokens():
    """The sums of squares are those of all splits."""
    q = torch.rand(1, 2000, 2, 5, dtype=torch.float64) + 0.5
    _, state = torch.ops.vitkernels.channel_attention(q, q, q, 1.0, None, True, False)
    unit = torch.nn.functional.normalize(q, dim=1)
    torch.testing.assert_close(state[..., :5, :5], torch.einsum("bnhc,bnhe->bhce", unit, unit))
    torch.testing.assert_close(state[..., :5, 5], q.norm(dim=1))
    torch.testing.assert_close(state[..., 5, :5], q.norm(dim=1))
