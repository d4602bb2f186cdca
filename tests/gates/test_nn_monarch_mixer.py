"""Monarch Mixer's modules: precision, traces, published names, what they refuse."""

import copy
import re

import pytest
import torch
import vitkernels as vk
from support.model_zoo import assert_policy, outputs_and_gradients
from torch import nn

DIM, LONGEST = 16, 12
KINDS = {
    "implicit": {},
    "causal": {"is_causal": True},
    "residual": {"residual_long_conv": True},
    "explicit": {"filter": "explicit"},
    "explicit-causal": {"filter": "explicit", "is_causal": True},
    "blocks": {"nblocks": 4},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def mixer(**options):
    torch.manual_seed(0)
    return vk.nn.MonarchMixer(DIM, LONGEST, filter_order=8, **options)


def tokens(length=LONGEST, batch=2):
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("convert", [torch.nn.Module.bfloat16, torch.nn.Module.half, lambda m: m.to(torch.bfloat16)])
@pytest.mark.parametrize("options", [KINDS["implicit"], KINDS["residual"]], ids=["implicit", "residual"])
def test_filters_keep_their_precision(options, convert):
    """Sines of sines of rounded parameters would be other filters."""
    made = vk.nn.MonarchMixer(64, 196, **options).double()
    long_filter = made.filter_fn
    expected = long_filter(196)
    found = convert(copy.deepcopy(long_filter))(196)
    assert found.dtype == torch.float32
    # The skip connection is a parameter like others: in one tap.
    error = (found - expected)[:, torch.arange(found.size(1)) != 195].abs().max() / expected.abs().max()
    assert error < 1e-5
    twice = convert(convert(copy.deepcopy(long_filter)).double())(196)
    assert torch.equal(twice, found)


@every_kind
def test_causality(options):
    """Of a change of the last token, the others see nothing where the mixer is causal, and something where it is not.

    A long convolution has rounding errors of all of its positions.
    """
    module, x = mixer(**options).double(), tokens().double()
    changed = x.clone()
    changed[:, -1] += 1
    difference = (module(changed) - module(x))[:, :-1].abs()
    assert difference.max() < 1e-12 if options.get("is_causal") else difference.amax((0, 2)).min() > 1e-6


@every_kind
def test_causal_prefix(options):
    """Of shorter sequences, the filters are those of the smallest lags, not stretched ones."""
    module, x = mixer(**options).double(), tokens().double()
    short, full = module(x[:, :5]), module(x)[:, :5]
    assert torch.allclose(short, full, rtol=0, atol=1e-12) == bool(options.get("is_causal"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype, monkeypatch):
    """No larger errors than of the same module whose filter is computed in 16 bits, as PyTorch would."""
    module = mixer(residual_long_conv=True).to(dtype)
    x = tokens().to(dtype)
    truth = outputs_and_gradients(copy.deepcopy(module).double(), x.double())
    mine = outputs_and_gradients(module, x)
    monkeypatch.setattr("vitkernels.nn.long_filters.statistics_dtype", lambda dtype: dtype)
    monkeypatch.setattr("vitkernels.nn.monarch_mixer.long_conv", vk.reference.long_conv)
    stock = outputs_and_gradients(copy.deepcopy(module).to(dtype), x)
    assert_policy(mine, stock, truth, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_stay_float32(dtype):
    """Of 1000 positions 16 bits tell few apart."""
    positions = vk.nn.MonarchMixer(4, 1000).to(dtype).filter_fn.pos_emb
    made = vk.nn.MonarchMixer(4, 1000, dtype=dtype)
    for buffer in (positions.t, made.filter_fn.pos_emb.t):
        assert buffer.dtype == torch.float32 and buffer.unique().numel() == 1000
    assert {p.dtype for name, p in made.named_parameters() if "implicit" not in name} == {dtype}
    assert {b.dtype for b in made.double().buffers()} == {torch.float64}


def test_filter_is_float32_under_autocast():
    module = mixer()
    expected = module.filter_fn(LONGEST)
    found = []
    module.filter_fn.register_forward_hook(lambda module, args, taps: found.append(taps))
    with torch.autocast("cpu", torch.bfloat16):
        out = module(tokens())
    assert out.dtype == torch.bfloat16 and torch.equal(found[0], expected)
    error = (out - module(tokens())).abs().max() / out.abs().max()
    assert 0 < error < 0.05
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@every_kind
def test_compiles_in_one_graph(options):
    module = mixer(**options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (LONGEST, 7, 3):
        expected, found = (outputs_and_gradients(m, tokens(length)) for m in (module, compiled))
        found = {name.replace("_orig_mod.", ""): t for name, t in found.items()}
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@every_kind
def test_export_with_any_number_of_tokens(options):
    module = mixer(**options)
    sizes = {0: torch.export.Dim("B", min=1), 1: torch.export.Dim("N", min=2, max=LONGEST)}
    program = torch.export.export(module, (tokens(7),), dynamic_shapes=(sizes,)).module()
    for length, batch in ((2, 1), (LONGEST, 3), (5, 2)):
        torch.testing.assert_close(program(tokens(length, batch)), module(tokens(length, batch)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_training_has_the_bits_of_inference(dtype):
    module, x = mixer().to(dtype), tokens().to(dtype)
    with torch.no_grad():
        expected = module(x)
    assert torch.equal(module(x), expected)


def test_no_tokens():
    for options in KINDS.values():
        module = mixer(**options)
        out = module(tokens(0).requires_grad_())
        assert out.shape == (2, 0, DIM)
        out.sum().backward()


def test_names_and_shapes_are_published_ones():
    module = vk.nn.MonarchMixer(768, 128, residual_long_conv=True)
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    mlp = {
        "0.weight": (128, 5), "0.bias": (128,), "1.freq": (1, 128),
        "2.weight": (128, 128), "2.bias": (128,), "3.freq": (1, 128),
        "4.weight": (128, 128), "4.bias": (128,), "5.freq": (1, 128),
        "6.weight": (768, 128),
    }  # fmt: skip
    long_filter = {"bias": (768,), "pos_emb.z": (1, 128, 5), "pos_emb.t": (1, 128, 1), "modulation.deltas": (1, 1, 768)}
    for direction in ("implicit_filter", "implicit_filter_rev"):
        long_filter |= {f"{direction}.{name}": shape for name, shape in mlp.items()}
    linears = {"in_linear": (2304, 768), "out_linear": (768, 768), "short_filter": (2304, 1, 3)}
    expected = {f"{name}.weight": shape for name, shape in linears.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    for name in ("filter_fn", "filter_fn2"):
        expected |= {f"{name}.{key}": shape for key, shape in long_filter.items()}
    assert shapes == expected
    assert "dim=16, max_length=12, is_causal=False, nblocks=4, filter='implicit'" in repr(mixer(nblocks=4))
    assert set(mixer(filter="explicit").filter_fn.state_dict()) == {"weight"}


def test_explicit_filter_keeps_the_variance():
    torch.manual_seed(0)
    for is_causal in (True, False):
        taps = vk.nn.MonarchMixer(256, 50, is_causal, filter="explicit").filter_fn(50)
        assert taps.shape == (256, 50 if is_causal else 99)
        assert taps.square().sum(1).mean().item() == pytest.approx(1, rel=0.1)
        assert taps[:, 0 if is_causal else 49].std() > 2 * taps[:, -1].std()


@every_kind
def test_made_on_another_device(options):
    with torch.device("meta"):
        assert all(p.is_meta for p in mixer(**options).parameters())


def test_mlp_without_gradients():
    """One pass where nobody looks in between; a layer of another kind, or with hooks, is called as it is."""
    mlp, x, seen = vk.nn.MonarchMLP(16, 24), torch.randn(5, 16), []
    expected = mlp(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected)
        hook = mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out))
        torch.testing.assert_close(mlp(x), expected)
        torch.testing.assert_close(seen[0], mlp.fc1(x))
        hook.remove()
        vk.expand_monarch(model := torch.nn.Sequential(mlp))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["_Positions", "_Decay", "_Sine"])
def test_emptied_filters_are_reinitialised(name):
    """Constants and frequencies of a module that was made without memory, by the method that PyTorch's layers have."""
    made = mixer().filter_fn
    with torch.device("meta"):
        emptied = mixer().filter_fn.to_empty(device="cpu")
    count = 0
    for module, twin in zip(emptied.modules(), made.modules(), strict=True):
        if type(module).__name__ == name:
            module.reset_parameters()
            for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True):
                assert torch.equal(a, b)
                count += 1
    assert count > 0


def test_in_the_blocks_of_timm():
    """Blocks pass a mask, which is ``None``, and gradients reach all parameters."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3)
    for block in model.blocks:
        block.attn, block.mlp = vk.nn.MonarchMixer(192, 17, filter_order=8), vk.nn.MonarchMLP(192)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.blocks.parameters())


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_in_training(p):
    x = tokens()
    for module in (mixer(proj_drop=p), vk.nn.MonarchMLP(DIM, drop=p)):
        assert torch.equal(module(x), module(x)) == (p == 0)
        module.eval()
        assert torch.equal(module(x), module(x))


def test_mlp():
    module = vk.nn.MonarchMLP(DIM, 24, 2, bias=False)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "fc1.blkdiag1": (2, 8, 8), "fc1.blkdiag2": (2, 12, 8), "fc2.blkdiag1": (2, 8, 12), "fc2.blkdiag2": (2, 8, 8),
    }  # fmt: skip
    assert vk.nn.MonarchMLP(DIM).fc1.out_features == 4 * DIM
    assert module(torch.randn(DIM)).shape == (DIM,)
    made = vk.nn.MonarchMLP(DIM, dtype=torch.bfloat16, device="meta")
    assert {(p.dtype, p.device.type) for p in made.parameters()} == {(torch.bfloat16, "meta")}


Mixer = vk.nn.MonarchMixer
BAD = [
    (lambda: Mixer(0, 4), "dim is 0, takes an integer from 1 on"),
    (lambda: Mixer(4, 2.0), "max_length is 2.0, takes an integer from 1 on"),
    (lambda: Mixer(4, 4, "yes"), "is_causal is 'yes', takes True or False"),
    (lambda: Mixer(4, 4, nblocks=0), "nblocks is 0, takes an integer from 1 on"),
    (lambda: Mixer(4, 4, filter="hyena"), "filter is 'hyena', takes 'implicit' or 'explicit'"),
    (lambda: Mixer(4, 4, filter_emb_dim=1), "filter_emb_dim is 1, takes an integer from 3 on"),
    (lambda: Mixer(4, 4, filter_emb_dim=4), "filter_emb_dim is 4, takes an odd number"),
    (lambda: Mixer(4, 4, filter_order=-1), "filter_order is -1, takes an integer from 1 on"),
    (lambda: Mixer(4, 4, filter_freq=float("nan")), "filter_freq is nan, takes a finite number"),
    (lambda: Mixer(4, 4)(None), "x is a NoneType, takes a tensor (B, N, 4)"),
    (lambda: Mixer(4, 4)(torch.zeros(4, 4)), "x has shape (4, 4), takes (B, N, 4)"),
    (lambda: Mixer(4, 4)(torch.zeros(1, 2, 5)), "x has shape (1, 2, 5), takes (B, N, 4) with N up to max_length (4)"),
    (lambda: Mixer(4, 4)(torch.zeros(1, 5, 4)), "x has shape (1, 5, 4), takes (B, N, 4) with N up to max_length (4)"),
    (lambda: Mixer(4, 4)(torch.zeros(1, 2, 4), torch.zeros(2, 2)), "attn_mask is a Tensor, takes None"),
    (
        lambda: Mixer(4, 4)(torch.zeros(1, 2, 4), is_causal=True),
        "is_causal is True, takes False where the mixer was made without it",
    ),
    (lambda: vk.nn.MonarchMLP(0), "dim is 0, takes an integer from 1 on"),
    (lambda: vk.nn.MonarchMLP(4, 0), "hidden_dim is 0, takes an integer from 1 on"),
    (lambda: vk.nn.MonarchMLP(4, nblocks=True), "nblocks is True, takes an integer from 1 on"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_arguments_are_named(call, text):
    with pytest.raises(RuntimeError, match=re.escape(text)) as raised:
        call()
    assert re.match(r"vitkernels\.nn\.Monarch(Mixer|MLP): ", str(raised.value))


def test_causal_mixers_take_the_flag():
    module = mixer(is_causal=True)
    assert torch.equal(module(tokens(), is_causal=True), module(tokens()))
    assert isinstance(module.in_linear, nn.Linear)
