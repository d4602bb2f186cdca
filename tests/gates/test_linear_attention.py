"""Linear attention where its own parts may fail: sums over many keys, small numbers, feature maps as objects."""

import copy
import pickle

import pytest
import torch
import vitkernels as vk
from support.mechanisms import agree, tokens


def test_focused_features():
    """FLatten's: u^3, with the norm that u had."""

    def focused(x):
        u = x.relu() + 1e-6
        return u**3 * (u.norm(dim=-1, keepdim=True) / (u**3).norm(dim=-1, keepdim=True))

    def formula(q, k, v):
        q, k = focused(q), focused(k)
        return torch.einsum("bihd,bjhd,bjhe->bihe", q, k, v) / (
            torch.einsum("bihd,bjhd->bih", q, k).unsqueeze(-1) + 1e-6
        )

    agree(
        lambda q, k, v: vk.linear_attention(q, k, v, feature_map="focused"), formula,
        *[tokens(2, 30, 2, 8) for _ in range(3)],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature_map", ["relu", "elu", "focused"])
def test_sums_of_many_keys_are_finite(feature_map, dtype):
    """Half precision holds neither sums of thousands of keys nor their products: both are float32."""
    q, k, v = ((torch.randn(1, 5000, 2, 32) * 20).to(dtype).requires_grad_() for _ in range(3))
    out = vk.linear_attention(q, k, v, feature_map=feature_map)
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    expected = vk.reference.linear_attention(*(t.double() for t in (q, k, v)), feature_map=feature_map)
    assert all(t.isfinite().all() for t in (out, *grads))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.01 * expected.abs().max().item())


def test_rows_without_features():
    """Their denominator is 0, and so are they, with or without eps."""
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    q[:, 3] = -1.0
    q.requires_grad_()
    for eps in (0.0, 1e-6):
        out = vk.linear_attention(q, k, v, eps=eps)
        assert (out[:, 3] == 0).all() and out.isfinite().all()
        assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("power", [1, 2, 3, 8, 16])
def test_powers_of_small_and_large_numbers(power):
    """u^16 of numbers that float32 holds is none: a row is divided by its largest element first."""
    x = torch.tensor([1e-5, 1.0, 1e3, 3e4]).reshape(1, 4, 1, 1) * (torch.rand(1, 4, 1, 8) + 0.5)
    q, k, v = x.clone().requires_grad_(), x.flip(1).clone().requires_grad_(), torch.randn(1, 4, 1, 8)
    features = vk.FeatureMap("focused", power=power)
    out = vk.linear_attention(q, k, v, feature_map=features)
    wide = [t.detach().double().requires_grad_() for t in (q, k)]
    expected = vk.reference.linear_attention(*wide, v.double(), feature_map=features)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-6)
    found, wanted = torch.autograd.grad(out.sum(), (q, k)), torch.autograd.grad(expected.sum(), wide)
    for one, other in zip(found, wanted, strict=True):
        scale = other.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        torch.testing.assert_close(one.double() / scale, other / scale, rtol=0, atol=2e-3)


def test_the_same_bits_at_any_number_of_threads():
    q, k, v = (torch.randn(2, 1500, 2, 24, requires_grad=True) for _ in range(3))

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = vk.linear_attention(q, k, v)
            return out, *torch.autograd.grad(out.cos().sum(), (q, k, v))
        finally:
            torch.set_num_threads(before)

    first = run(1)
    for threads in (2, 3):
        assert all(torch.equal(*both) for both in zip(run(threads), first, strict=True))


def test_the_state_of_the_operator():
    """What it returns besides the output is differentiable as well."""
    q, k, v = (torch.randn(1, 7, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    state = torch.ops.vitkernels.linear_attention(q, k, v, 1, 3, True, 1e-6, 1.0, 0.0)[1]
    expected = torch.einsum("bjhd,bjhe->bhde", k.relu(), torch.cat([v, torch.ones_like(v[..., :1])], -1))
    torch.testing.assert_close(state, expected)
    weight = torch.randn_like(state)
    found, wanted = (torch.autograd.grad(t, (k, v), weight) for t in (state, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "features",
    [vk.FeatureMap("focused", power=4), vk.FeatureMap("performer", projection=torch.randn(6, 8))],
    ids=lambda features: features.name,
)
def test_feature_maps_are_copied(features):
    q = torch.randn(1, 9, 2, 8)
    expected = vk.linear_attention(q, q, q, feature_map=features)
    for other in (pickle.loads(pickle.dumps(features)), copy.deepcopy(features)):
        assert torch.equal(vk.linear_attention(q, q, q, feature_map=other), expected)
