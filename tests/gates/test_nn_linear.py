"""The modules of linear attention: their formulas and options, the published modules, 16 bits, compilers, errors."""

import re

import pytest
import torch
import torch.nn.functional as F
import vitkernels as vk
from support.mechanisms import agree_module, convolution, linear, tokens
from support.model_zoo import assert_policy, outputs_and_gradients, randomised
from torch.utils._python_dispatch import TorchDispatchMode

PROJECTION = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4


def focused(x, power):
    x = x.relu() + 1e-6
    return x**power * (x.norm(dim=-1, keepdim=True) / (x**power).norm(dim=-1, keepdim=True))


FEATURES = {
    "relu": ("relu", torch.relu),
    "elu": ("elu", lambda x: F.elu(x) + 1),
    "exp": ("exp", torch.exp),
    "focused": (vk.FeatureMap("focused", 2), lambda x: focused(x, 2)),
    "performer": (
        vk.FeatureMap("performer", projection=PROJECTION),
        lambda x: (x @ PROJECTION.t() - x.square().sum(-1, keepdim=True) / 2).exp() / 6**0.5,
    ),
}


def weighed(q, k, v, eps):
    """All pairs of a query and a key, ``(B, N, H, d)``."""
    pairs = torch.einsum("bihd,bjhd->bhij", q, k)
    return torch.einsum("bhij,bjhd->bihd", pairs / (pairs.sum(-1, keepdim=True) + eps), v)


def split(x):
    """Two heads of the channels."""
    return x.unflatten(-1, (2, -1))


@pytest.mark.parametrize(("feature_map", "features"), FEATURES.values(), ids=FEATURES)
def test_linear_attention(feature_map, features):
    def formula(p, x):
        q, k, v = (split(t) for t in linear(p, "qkv", x).chunk(3, -1))
        return linear(p, "proj", weighed(features(q), features(k), v, 1e-3).flatten(2))

    module = vk.nn.LinearAttention(16, 2, feature_map=feature_map, qkv_bias=True, eps=1e-3)
    agree_module(module, formula, tokens(2, 30, 16))


def encoding_of(p, sizes, window):
    on_map = p["positional_encoding"].transpose(1, 2).unflatten(2, window)
    return F.interpolate(on_map, size=sizes, mode="bilinear").flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("sizes", "power"), [((4, 6), 3), ((4, 6), 2.5), ((4, 6), 8), ((5, 3), 3)], ids=str)
def test_focused_linear_attention_is_flattens(sizes, power):
    """Powers of all channels of a token, whose norm stays; on the map that it was made for and on another."""

    def formula(p, x):
        q, k, v = linear(p, "qkv", x.flatten(1, 2)).chunk(3, -1)
        encoding = p["positional_encoding"] if sizes == (4, 6) else encoding_of(p, sizes, (4, 6))
        kernels = []
        for t in (q, k + encoding):
            u = (t.relu() + 1e-6) / F.softplus(p["scale"])
            kernels.append(split(u**power / (u**power).norm(dim=-1, keepdim=True) * u.norm(dim=-1, keepdim=True)))
        out = weighed(*kernels, split(v), 1e-6)  # [B, N, H, d]
        maps = split(v).permute(0, 2, 3, 1).reshape(4, 8, *sizes)
        near = convolution(p, "dwc", maps, padding=2, groups=8).reshape(2, 16, -1).transpose(1, 2)
        return linear(p, "proj", out.flatten(2) + near).unflatten(1, sizes)

    # Denominators of few positive features magnify float32's rounding.
    module = vk.nn.FocusedLinearAttention(16, 2, (4, 6), focusing_factor=power)
    agree_module(module, formula, tokens(2, *sizes, 16), slack=10)


def test_high_powers_do_not_overflow():
    module = randomised(vk.nn.FocusedLinearAttention(16, 2, (4, 6), focusing_factor=8))
    x = (1e5 * torch.randn(2, 4, 6, 16)).requires_grad_()
    found = module(x)
    found.sum().backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(found.double(), module.double()(x.double()), rtol=1e-3, atol=1.0)  # of 1e5


SLABS = {
    "qkv.weight": (48, 16), "qkv.bias": (48,), "proj.weight": (16, 16), "proj.bias": (16,), "dwc.weight": (8, 1, 5, 5),
    "dwc.bias": (8,), "positional_encoding": (1, 49, 16),
}  # fmt: skip
T2TS = {
    f"{layer}.{name}" for layer in ("proj", "norm1", "norm2", "kqv", "mlp.0", "mlp.2") for name in ("weight", "bias")
}


def test_names_and_shapes_are_the_published_ones():
    def held(module):
        return {name: tuple(t.shape) for name, t in module.state_dict().items()}

    assert held(vk.nn.SimplifiedLinearAttention(16, 2)) == SLABS
    assert held(vk.nn.FocusedLinearAttention(16, 2)) == SLABS | {"scale": (1, 1, 16)}
    assert held(vk.nn.LinearAngularAttention(16, 2))["dconv.weight"] == (2, 1, 9, 1)
    assert set(held(vk.nn.TokenPerformer(27, 16))) == T2TS | {"w"}
    assert held(vk.nn.TokenPerformer(27, 16, kernel_ratio=0.5))["w"] == (8, 16)
    assert held(vk.nn.TokenPerformer(27, 16))["kqv.weight"] == (48, 27)
    assert held(vk.nn.TokenTransformer(27, 16, mlp_ratio=2))["mlp.fc1.weight"] == (32, 16)


def test_rows_of_random_features_are_orthogonal():
    w = vk.nn.TokenPerformer(27, 16, dtype=torch.float64).w
    assert not w.requires_grad
    torch.testing.assert_close(w @ w.t(), 8 * torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-5)  # made in float32


def test_windows_are_a_batch():
    """Tokens of windows, in FLatten's layout, and the maps that they are."""
    module = randomised(vk.nn.FocusedLinearAttention(16, 2, (4, 6)))
    x = torch.randn(3, 4, 6, 16)
    torch.testing.assert_close(module(x.flatten(1, 2)), module(x).flatten(1, 2))
    y = torch.randn(3, 3, 5, 16)
    torch.testing.assert_close(module(y.flatten(1, 2), (3, 5)), module(y).flatten(1, 2))


def test_random_features_are_the_modules_own():
    given = torch.randn(6, 8)
    module = vk.nn.LinearAttention(16, 2, feature_map=vk.FeatureMap("performer", projection=given))
    x = torch.randn(2, 7, 16)
    before = module(x)
    given.zero_()
    assert torch.equal(module(x), before)
    twin = vk.nn.LinearAttention(16, 2, feature_map=vk.FeatureMap("performer", projection=given))
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), before)


LITE = {
    "default": {},
    "scales": {"heads": 3, "scales": (3, 5), "use_bias": True, "norm_layer": (None, None)},
    "heads_ratio": {"dim": 16, "heads_ratio": 0.5, "eps": 1e-3},
}


def lite_pair(options, dtype):
    """timm's and ours, with its weights and running statistics."""
    theirs_of = pytest.importorskip("timm.models.efficientvit_mit").LiteMLA
    theirs = randomised(theirs_of(32, 24, **options)).to(dtype)
    ours = vk.nn.LiteMLA(32, 24, **options, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("options", LITE.values(), ids=LITE)
def test_lite_mla_is_timms(options, is_training, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # timm's products are float32
    ours, theirs = (module.train(is_training) for module in lite_pair(options, torch.float64))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 32, 7, 5, dtype=torch.float64).contiguous(memory_format=memory_format)
        found, expected = outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x)
        assert ours(x).is_contiguous(memory_format=memory_format)
        assert found.keys() == expected.keys()
        for name, t in expected.items():
            error = 1e-9 * float(t.abs().max())
            torch.testing.assert_close(found[name], t, rtol=0, atol=error, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lite_mla_in_16_bits(dtype):
    """As near as timm's, which computes the attention in float32."""
    ours, theirs = (module.eval() for module in lite_pair({}, torch.float64))
    x = 30 * torch.randn(2, 32, 16, 16, dtype=torch.float64)  # fp16 sums of products would overflow
    truth = outputs_and_gradients(ours, x)
    mine, stock = (outputs_and_gradients(module.to(dtype), x.to(dtype)) for module in (ours, theirs))
    assert_policy(mine, stock, truth, torch.finfo(dtype).eps)


def test_lite_mla_does_not_copy_a_map_in_channels_last():
    class Copies(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    module, x = vk.nn.LiteMLA(32, 24).to(memory_format=torch.channels_last), torch.randn(2, 32, 8, 8)
    for is_copied, of_format in ((False, x.contiguous(memory_format=torch.channels_last)), (True, x)):
        with Copies() as seen:
            module(of_format)
        assert ("aten::clone" in seen.names) == is_copied and "aten::cat" in seen.names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["FocusedLinearAttention", "SimplifiedLinearAttention"])
def test_large_numbers_in_16_bits(kind, dtype):
    """Third powers and sums over tokens leave fp16's range; what the module returns does not."""
    module = randomised(getattr(vk.nn, kind)(32, 2, (16, 16), dtype=torch.float64))
    x = 40 * torch.randn(2, 16, 16, 32, dtype=torch.float64)
    truth = module(x)
    found = module.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    error = (found.double() - truth).abs().max() / truth.abs().max()
    assert error < 8 * torch.finfo(dtype).eps


MADE = {
    "LinearAttention": lambda **factory: vk.nn.LinearAttention(16, 2, (4, 6), "elu", True, 3, **factory),
    "random features": lambda **factory: vk.nn.LinearAttention(16, 2, feature_map=FEATURES["performer"][0], **factory),
    "SimplifiedLinearAttention": lambda **factory: vk.nn.SimplifiedLinearAttention(16, 2, (4, 6), **factory),
    "FocusedLinearAttention": lambda **factory: vk.nn.FocusedLinearAttention(16, 2, (4, 6), **factory),
    "LinearAngularAttention": lambda **factory: vk.nn.LinearAngularAttention(16, 2, **factory),
    "LiteMLA": lambda **factory: vk.nn.LiteMLA(16, 16, **factory),
    "TokenPerformer": lambda **factory: vk.nn.TokenPerformer(16, 16, **factory),
    "TokenTransformer": lambda **factory: vk.nn.TokenTransformer(16, 16, **factory),
}
SHAPES = {"LiteMLA": (2, 16, 4, 6), "LinearAngularAttention": (2, 24, 16)}


def input_of(name, dtype=torch.float32):
    return torch.randn(SHAPES.get(name, (2, 24, 16)), dtype=dtype)


@pytest.mark.parametrize("name", MADE)
def test_dtype_and_device(name):
    for dtype in (torch.float64, torch.bfloat16):
        module = MADE[name](dtype=dtype)
        assert {t.dtype for t in module.state_dict().values() if t.is_floating_point()} == {dtype}
        assert module(input_of(name, dtype)).dtype == dtype
    module = MADE[name](device="meta")
    assert {t.device.type for t in module.state_dict().values()} == {"meta"}
    assert module(input_of(name).to("meta")).shape == input_of(name).shape


@pytest.mark.parametrize("name", MADE)
def test_autocast(name):
    module, x = randomised(MADE[name](dtype=torch.float32)).eval(), input_of(name)
    expected = module(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    out.float().sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["random features", "FocusedLinearAttention", "LiteMLA", "TokenPerformer"])
def test_compiles_in_one_graph(name):
    module = randomised(MADE[name](dtype=torch.float32)).eval()
    compiled, x = torch.compile(module, fullgraph=True, backend="aot_eager"), input_of(name)
    found, expected = outputs_and_gradients(compiled, x), outputs_and_gradients(module, x)
    found = {name.removeprefix("_orig_mod."): t for name, t in found.items()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


N = vk.nn
BAD = [
    (lambda: N.LinearAttention(16, 3), "LinearAttention: dim is 16, takes a multiple of num_heads (3)"),
    (lambda: N.LinearAttention(16, 2, kernel_size=4), "LinearAttention: kernel_size is 4, takes an odd number"),
    (lambda: N.LinearAttention(16, 2, (1, 2, 3)), "LinearAttention: window_size is (1, 2, 3), takes an integer from 1"),
    (lambda: N.LinearAttention(16, 2, feature_map="gelu"), "feature_map is 'gelu', takes 'identity', 'relu',"),
    (lambda: N.LinearAttention(16, 2)(torch.zeros(16)), "LinearAttention: x has shape (16,), takes (B, N, dim)"),
    (
        lambda: N.LinearAttention(16, 2, kernel_size=3)(torch.zeros(1, 4, 16)),
        "LinearAttention: size is None, takes the map's (height, width)",
    ),
    (
        lambda: N.LinearAttention(16, 2)(torch.zeros(1, 4, 16), (2, 3)),
        "LinearAttention: x has shape (1, 4, 16), takes 6 tokens, those of a map (2, 3)",
    ),
    (
        lambda: N.LinearAttention(16, 2)(torch.zeros(1, 2, 2, 16), (2, 2)),
        "LinearAttention: x has shape (1, 2, 2, 16), takes (B, N, dim)",
    ),
    (
        lambda: N.SimplifiedLinearAttention(16, 2)(torch.zeros(1, 48, 16)),
        "SimplifiedLinearAttention: x has shape (1, 48, 16), takes 49 tokens, those of a map (7, 7)",
    ),
    (
        lambda: N.SimplifiedLinearAttention(16, 2)(torch.zeros(1, 0, 7, 16)),
        "SimplifiedLinearAttention: x has shape (1, 0, 7, 16), takes a map of one token or more",
    ),
    (
        lambda: N.FocusedLinearAttention(16, 2, focusing_factor=0),
        "FocusedLinearAttention: focusing_factor is 0, takes a number greater than 0",
    ),
    (lambda: N.LinearAngularAttention(16, 3), "LinearAngularAttention: dim is 16, takes a multiple of num_heads (3)"),
    (
        lambda: N.LinearAngularAttention(16, 2, res_kernel_size=2),
        "LinearAngularAttention: res_kernel_size is 2, takes an odd number",
    ),
    (lambda: N.LiteMLA(4, 4), "LiteMLA: heads is 0, takes an integer from 1 on"),
    (lambda: N.LiteMLA(16, 16, scales=(3, 4)), "LiteMLA: scales is 4, takes an odd number"),
    (
        lambda: N.LiteMLA(16, 16, feature_map=FEATURES["performer"][0]),
        "LiteMLA: feature_map is 'performer', takes one without a projection",
    ),
    (lambda: N.LiteMLA(16, 16)(torch.zeros(1, 4, 16)), "LiteMLA: x has shape (1, 4, 16), takes (B, in_channels,"),
    (lambda: N.TokenPerformer(16, 16, 0.01), "TokenPerformer: kernel_ratio is 0.01, takes a number from 1 / 16 on"),
    (lambda: N.TokenTransformer(16, 16, 3), "TokenTransformer: in_dim is 16, takes a multiple of num_heads (3)"),
    (lambda: N.TokenTransformer(16, 16, mlp_ratio="2"), "TokenTransformer: mlp_ratio is '2', takes a number from"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_arguments_are_named(call, text):
    with pytest.raises(RuntimeError, match=re.escape(text)) as raised:
        call()
    assert str(raised.value).startswith("vitkernels")
