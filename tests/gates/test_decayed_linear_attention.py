"""Decayed linear attention where its own parts may fail: states, axes of maps, and what has no gradient."""

import pytest
import torch
import vitkernels as vk
from support.mechanisms import agree, tokens


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "two-sided"])
@pytest.mark.parametrize("axes", [(0,), (1,), (1, 0), [2, 0, 1]], ids=str)
def test_axes_one_after_another(axes, is_causal):
    def along(function):
        return lambda q, k, v: function(q, k, v, 0.7, axes=axes, is_causal=is_causal)

    ours, formula = along(vk.decayed_linear_attention), along(vk.reference.decayed_linear_attention)
    agree(ours, formula, *[tokens(2, 3, 4, 5, 2, 6) for _ in range(3)])


def test_two_sided_weights():
    """Of the distance alone: the diagonal counts once."""
    q = torch.ones(1, 70, 1, 1, dtype=torch.float64)
    found = vk.decayed_linear_attention(q, q, q, 0.5, is_causal=False).flatten()
    at = torch.arange(70)
    torch.testing.assert_close(found, (0.5 ** (at[:, None] - at).abs().double()).sum(-1))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("has_state", [False, True])
def test_threads_change_no_bit(heads, has_state):
    """With more threads than heads, chunks of tokens are summed first and read afterwards."""
    data = [torch.randn(1, 2500, heads, d, requires_grad=True) for d in (20, 20, 33)]
    state = torch.randn(1, heads, 20, 33, requires_grad=True) if has_state else None
    given, grads = (
        [t for t in (*data, state) if t is not None],
        (torch.randn(1, 2500, heads, 33), torch.ones(1, heads, 20, 33)),
    )
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            outs = vk.decayed_linear_attention(*data, 0.97, initial_state=state, return_state=True)
            found.append((*outs, *torch.autograd.grad(outs, given, grads)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*each) for other in found[1:] for each in zip(found[0], other, strict=True))


X = torch.zeros(2, 5, 4, 8)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"decay": 1.5}, "decay[0] is 1.5, takes 0 to 1"),
        ({"decay": -0.1}, "decay[0] is -0.1, takes 0 to 1"),
        ({"decay": torch.full((3,), 0.5)}, "decay has shape (3), takes (4)"),
        ({"decay": "1"}, "decay is '1', takes a number"),
        ({"decay": torch.full((1, 1), 0.5)}, "decay has shape (1, 1), takes (4)"),
        ({"query": X[0]}, "query has shape (5, 4, 8), takes 4 dimensions (B, N, heads, d), or axes"),
        ({"decay": torch.full((4,), 0.5, requires_grad=True)}, "decay requires a gradient, takes one that does not"),
        ({"key": X[:, :4]}, "key has shape (2, 4, 4, 8), takes (2, 5, 4, 8)"),
        ({"value": X[:, :, :2]}, "value has shape (2, 5, 2, 8), takes (2, 5, 4, 8)"),
        ({"value": X.half()}, "value is float16, takes float32"),
        ({"query": None}, "query is None, takes a tensor"),
        ({"is_causal": 1}, "is_causal is 1, takes True or False"),
        ({"axes": (0,), "return_state": True}, "return_state is given, takes the causal form without axes"),
        ({"is_causal": False, "initial_state": X}, "initial_state is given, takes the causal form without axes"),
        ({"initial_state": torch.zeros(2, 4, 8, 7)}, "initial_state has shape (2, 4, 8, 7), takes (2, 4, 8, 8)"),
        ({"axes": (1,)}, "axes is (1,), takes some of 0 to 0"),
        ({"axes": ()}, "axes is (), takes some of 0 to 0"),
        ({"axes": (0,), "key": X[:, :4]}, "key has shape (2, 4, 4, 8), takes query's (2, 5, 4) before its last"),
    ],
)
def test_errors_are_the_callers(wrong, text):
    with pytest.raises(RuntimeError) as raised:
        vk.decayed_linear_attention(**{"query": X, "key": X, "value": X, "decay": 0.5} | wrong)
    assert str(raised.value).startswith("vitkernels::decayed_linear_attention: ") and text in str(raised.value)


def test_a_learnable_decay_serves_without_gradients():
    with torch.no_grad():
        vk.decayed_linear_attention(X, X, X, torch.full((4,), 0.5, requires_grad=True))


def test_the_operator_refuses_a_decay_that_learns():
    """A gradient that does not exist is an error, not nothing."""
    q, decay = torch.randn(1, 5, 2, 4, requires_grad=True), torch.full((2,), 0.5, requires_grad=True)
    out, _ = torch.ops.vitkernels.decayed_linear_attention(q, q, q, decay, None, False, True, False)
    with pytest.raises(RuntimeError, match="decay requires a gradient, which it does not have"):
        out.sum().backward()
