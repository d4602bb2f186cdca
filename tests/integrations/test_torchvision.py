"""``vk.accelerate`` and ``vk.restore`` on ``nn.MultiheadAttention`` and torchvision's vision transformer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import vitkernels as vk
from support.model_zoo import assert_close, assert_policy, expect_kernel_calls, outputs_and_gradients, randomised
from torch import nn
from vitkernels.integrations.multihead import FusedMultiheadAttention

torchvision = pytest.importorskip("torchvision")
LAYERS = 2
CONDITION = "stock path with need_weights or is_causal"


def vit(**options) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=LAYERS, num_heads=4, hidden_dim=48, mlp_dim=96, num_classes=5, **options
    )
    return randomised(model.double().eval()), torch.randn(2, 3, 32, 32, dtype=torch.float64)


def multihead(**options) -> nn.Module:
    torch.manual_seed(1)
    options = {"batch_first": True, "dtype": torch.float64} | options
    return randomised(nn.MultiheadAttention(24, 3, **options))


class First(nn.Module):
    """The module's output without its weights."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *inputs, need_weights=False, **kwargs):
        return self.attention(*inputs, need_weights=need_weights, **kwargs)[0]


def assert_agrees(module: nn.Module, *inputs: torch.Tensor, calls: int = 1, **kwargs) -> None:
    model = First(module)
    stock = outputs_and_gradients(model, *inputs, **kwargs)
    (entry,) = vk.accelerate(model).replaced
    assert entry.kind == "torch MultiheadAttention"
    with expect_kernel_calls(calls):
        ours = outputs_and_gradients(model, *inputs, **kwargs)
    assert_close(ours, stock)


def test_outputs_and_gradients_agree():
    model, images = vit()
    stock, keys = outputs_and_gradients(model, images), list(model.state_dict())
    report = vk.accelerate(model)
    assert [(entry.kind, entry.reason) for entry in report.replaced] == [
        ("torch MultiheadAttention", CONDITION)
    ] * LAYERS
    assert not report.stock
    assert list(model.state_dict()) == keys
    with expect_kernel_calls(LAYERS):
        ours = outputs_and_gradients(model, images)
    assert_close(ours, stock)


def test_inference_agrees_with_torchs_fast_path():
    model, images = vit()
    with torch.inference_mode():
        stock = model(images)
        vk.accelerate(model)
        with expect_kernel_calls(LAYERS):
            ours = model(images)
    torch.testing.assert_close(ours, stock, rtol=1e-10, atol=1e-10)


def test_float32_error_policy():
    model, images = vit()
    truth = outputs_and_gradients(model, images)
    stock = outputs_and_gradients(model.float(), images.float())
    vk.accelerate(model)
    ours = outputs_and_gradients(model, images.float())
    assert_policy(ours, stock, truth, torch.finfo(torch.float32).eps)


def test_restore_is_exact():
    model, images = vit()
    before, classes = outputs_and_gradients(model, images), [type(m) for m in model.modules()]
    vk.accelerate(model)
    vk.accelerate(model)
    vk.restore(model)
    assert [type(m) for m in model.modules()] == classes
    after = outputs_and_gradients(model, images)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_copies_and_pickles_stay_accelerated():
    model, images = vit()
    vk.accelerate(model)
    expected = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with expect_kernel_calls(LAYERS):
            assert torch.equal(twin(images), expected)


def test_dropout_in_training_takes_the_stock_path():
    model, images = vit(attention_dropout=0.2)
    model.train()
    torch.manual_seed(9)
    stock = outputs_and_gradients(model, images)
    report = vk.accelerate(model)
    assert {e.reason for e in report.replaced} == {f"stock path in training: attention dropout 0.2; {CONDITION}"}
    torch.manual_seed(9)
    with expect_kernel_calls(0):
        ours = outputs_and_gradients(model, images)
    assert all(torch.equal(ours[key], stock[key]) for key in stock)


def test_dynamo_captures_one_graph():
    model, images = vit()
    vk.accelerate(model)
    expected = outputs_and_gradients(model, images)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ours = {key.removeprefix("_orig_mod."): t for key, t in outputs_and_gradients(compiled, images).items()}
    assert_close(ours, expected)


def test_fx_keeps_the_module_as_a_leaf():
    from torchvision.models.feature_extraction import create_feature_extractor

    model, images = vit()
    node = "encoder.layers.encoder_layer_0.self_attention"
    expected, _ = create_feature_extractor(model, [node])(images)[node]
    vk.accelerate(model)
    extractor = create_feature_extractor(model, [node])
    with expect_kernel_calls(1):
        ours, _ = extractor(images)[node]
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": False}])
@pytest.mark.parametrize("kind", ["self", "cross", "three"])
def test_projections_agree(kind, options):
    module = multihead(**options)
    x, y, z = tokens(5, 5, 24), tokens(5, 5, 24), tokens(5, 5, 24)
    assert_agrees(module, *{"self": (x, x, x), "cross": (x, y, y), "three": (x, y, z)}[kind])


def test_queries_of_another_length():
    y = tokens(2, 7, 24)
    assert_agrees(multihead(), tokens(2, 4, 24), y, y)


@pytest.mark.parametrize("kind", ["bool", "float", "heads", "padding", "float padding", "both"])
def test_masks_agree(kind):
    torch.manual_seed(2)
    hidden, padding = torch.rand(5, 5) > 0.6, torch.rand(2, 5) > 0.6
    hidden[:, 0] = padding[:, 0] = False
    arguments = {
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": tokens(5, 5)},
        "heads": {"attn_mask": hidden.expand(6, 5, 5)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": tokens(2, 5)},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
    }[kind]
    x = tokens(2, 5, 24)
    assert_agrees(multihead(), x, x, x, **arguments)


def refusal(module: nn.Module, *inputs: torch.Tensor, **kwargs) -> tuple[type, str]:
    with pytest.raises((AssertionError, RuntimeError)) as error:
        module(*inputs, need_weights=False, **kwargs)
    return error.type, str(error.value)


@pytest.mark.parametrize(
    "kind", ["one key", "four axes", "one head", "one image", "one image of keys", "values", "two axes", "dtype"]
)
def test_what_torch_refuses_is_refused(kind):
    module, x, seen = multihead(), tokens(2, 5, 24), torch.zeros(5, 5, dtype=torch.bool)
    inputs, masks = {
        "one key": ((x, x, x), {"attn_mask": seen[:, :1]}),
        "four axes": ((x, x, x), {"attn_mask": seen.expand(2, 3, 5, 5)}),
        "one head": ((x, x, x), {"attn_mask": seen.expand(1, 5, 5)}),
        "one image": ((x, x, x), {"key_padding_mask": seen[:1]}),
        "one image of keys": ((x, x[:1], x[:1]), {}),
        "values": ((x, x, x[:1]), {}),
        "two axes": ((x, x[0], x[0]), {}),
        "dtype": ((x, x, x), {"attn_mask": torch.zeros(5, 5, dtype=torch.float16)}),
    }[kind]
    stock = refusal(module, *inputs, **masks)
    vk.accelerate(module)
    assert refusal(module, *inputs, **masks) == stock


@pytest.mark.parametrize("kind", ["need_weights", "is_causal", "unbatched"])
def test_what_the_kernel_cannot_do_takes_the_stock_path(kind):
    x = tokens(5, 24) if kind == "unbatched" else tokens(2, 5, 24)
    causal = {"is_causal": True, "attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)}
    arguments = {"need_weights": {"need_weights": True}, "is_causal": causal, "unbatched": {}}[kind]
    assert_agrees(multihead(), x, x, x, calls=0, **arguments)


def test_weights_are_still_returned():
    module, x = multihead(), tokens(2, 5, 24)
    expected = module(x, x, x)
    vk.accelerate(module)
    for ours, theirs in zip(module(x, x, x), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_what_may_compute_something_else_is_left_alone():
    class Scaled(nn.MultiheadAttention):
        pass

    overridden = multihead()
    overridden.forward = lambda *args, **kwargs: None
    model = nn.ModuleDict(
        {
            "subclass": Scaled(8, 2),
            "overridden": overridden,
            "unequal": multihead(kdim=8),
            "added": multihead(add_bias_kv=True),
            "zero": multihead(add_zero_attn=True),
        }
    )
    added = "it adds keys of its own (add_bias_kv or add_zero_attn)"
    assert {entry.name: entry.reason for entry in vk.accelerate(model).entries} == {
        "subclass": "a subclass of torch's MultiheadAttention may compute something else",
        "overridden": "its forward is overridden on the instance",
        "unequal": "its keys or values have other channels than its queries",
        "added": added,
        "zero": added,
    }


def test_encoder_layer_says_that_inference_goes_past_the_module():
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(24, 2, 32, 0.0, batch_first=True, dtype=torch.float64)
    x = tokens(2, 5, 24)
    stock = outputs_and_gradients(layer, x)
    (entry,) = vk.accelerate(layer).replaced
    assert entry.reason.endswith("not called in inference, where its nn.TransformerEncoderLayer has a path of its own")
    with expect_kernel_calls(1):
        ours = outputs_and_gradients(layer, x)
    assert_close(ours, stock)
    with torch.inference_mode(), expect_kernel_calls(0):
        layer.eval()(x)
    assert type(layer.self_attn) is FusedMultiheadAttention
