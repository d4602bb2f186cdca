"""Linear attention where its own parts may fail: sums over many keys, small numbers, feature maps as objects."""

import copy
import pickle

import pytest
import torch
import vitkernels as vk
from support.mechanisms import agree, tokens
from torch.utils._python_dispatch import TorchDispatchMode


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
    state = torch.ops.vitkernels.linear_attention(q, k, v, 1, 3, True, 1e-6, 1.0, 0.0, None, False)[1]
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_exponentials_beyond_range_are_infinite(dtype):
    k = torch.tensor([-2000.0, 0.0, 80.0, 1000.0], dtype=dtype).reshape(1, 1, 1, 4)
    q = torch.eye(4, dtype=dtype).reshape(1, 4, 1, 4)
    options = 3, 3, False, 0.0, 1.0, 0.0, None, False
    state = torch.ops.vitkernels.linear_attention(q, k, torch.ones_like(k), *options)[1]
    expected = k.flatten().to(state.dtype).exp()
    torch.testing.assert_close(state[0, 0, :, -1], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("feature_map", ["identity", "relu", "elu", "exp", "focused"])
@pytest.mark.parametrize("where", ["query", "key"])
def test_nan_is_not_swallowed(where, feature_map):
    data = {name: torch.rand(1, 5, 1, 3) for name in ("query", "key", "value")}
    data[where][0, 2, 0, 1] = torch.nan
    found = vk.linear_attention(**data, feature_map=feature_map).isnan()
    assert found[0, 2].all() and found.all() == (where == "key")


def test_small_denominators_are_divided_by():
    """The reciprocal of a number below the smallest normal one is infinite."""
    x = torch.full((1, 1, 1, 1), 1e-20)
    assert vk.linear_attention(x, x, torch.ones_like(x), eps=0.0).item() == pytest.approx(1.0, rel=1e-3)


def test_gradient_of_the_state_without_a_denominator():
    k = torch.randn(1, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    args = (k.detach(), k, k.detach(), 0, 1, False, 0.0, 1.0, 0.0, None, False)
    state = torch.ops.vitkernels.linear_attention(*args)[1]
    assert torch.equal(torch.autograd.grad(state[..., -1].sum(), k)[0], torch.ones_like(k))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_random_features_under_autocast(dtype):
    """They are as exact as those of data in that dtype: float32."""
    q, k, v = (torch.randn(1, 64, 1, 64) for _ in range(3))
    features = vk.FeatureMap("performer", projection=torch.randn(64, 64))
    with torch.autocast("cpu", dtype):
        found = vk.linear_attention(q, k, v, feature_map=features, eps=0.0)
    expected = vk.reference.linear_attention(q.double(), k.double(), v.double(), feature_map=features, eps=0.0)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=8e-3 * expected.abs().max().item())


def test_random_features_of_strided_heads_are_one_product():
    """PyTorch multiplies views of a packed projection token by token, unless they are rows."""

    class Products(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    q, k, v = torch.randn(2, 9, 3, 1, 8).unbind(2)
    with Products() as seen:
        vk.linear_attention(q, k, v, feature_map=vk.FeatureMap("performer", projection=torch.randn(6, 8)))
    assert seen.names.count("aten::mm") == 2 and "aten::bmm" not in seen.names


def packed(lengths, heads=2, kv_heads=1, d=8, dtype=torch.float64):
    """Queries, keys and values of sequences that have as many of each, and where these begin."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, d), (kv_heads, d), (kv_heads, 5))
    tensors = [torch.randn(int(offsets[-1]), *shape, generator=generator, dtype=dtype) for shape in shapes]
    return [t.requires_grad_() for t in tensors], (offsets, offsets, max(lengths), max(lengths) + 3)


@pytest.mark.parametrize("residual_v", [0.0, 0.7])
def test_packed_sequences_are_calls_of_their_own(residual_v):
    tensors, packing = packed([3, 0, 300, 1, 64])
    out = vk.linear_attention_varlen(*tensors, *packing, residual_v=residual_v, eps=0.1)
    each = zip(*(t.split(packing[0].diff().tolist()) for t in tensors), strict=True)
    expected = torch.cat([
        vk.linear_attention(*(t[None] for t in sequence), residual_v=residual_v, eps=0.1)[0] for sequence in each
    ])  # fmt: skip
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(t, tensors, weight) for t in (out, expected))
    torch.testing.assert_close(found, wanted)


def test_own_values_of_packed_sequences_need_as_many_keys():
    tensors, packing = packed([3, 4])
    with pytest.raises(RuntimeError, match=r"linear_attention_varlen: residual_v is 0\.5, takes 0 where query has 6"):
        offsets = torch.tensor([0, 3, 6])
        vk.linear_attention_varlen(tensors[0][:6], *tensors[1:], offsets, *packing[1:], residual_v=0.5)


def test_a_kv_head_that_no_head_reads_has_gradients_of_zero():
    query, key, value = (torch.randn(2, 5, heads, 4, requires_grad=True) for heads in (2, 3, 3))
    out = vk.linear_attention(query, key, value, head_map=torch.tensor([2, 0]))
    grads = torch.autograd.grad(out.sum(), (key, value))
    assert all(not g[:, :, 1].any() and g[:, :, 0].any() for g in grads)
