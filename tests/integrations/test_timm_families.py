"""``vk.accelerate`` on the architectures of timm beyond the plain vision transformer."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import vitkernels as vk
from support.hooks import assert_hooks_are_called
from support.model_zoo import (
    DEPTH,
    TIMM_FAMILIES,
    KernelCalls,
    LowRankLinear,
    add_low_rank,
    assert_close,
    assert_policy,
    expect_kernel_calls,
    outputs_and_gradients,
    run_python,
    timm_family,
    timm_model,
)
from torch import nn
from vitkernels.integrations.swap import path_of

timm = pytest.importorskip("timm")
families = pytest.importorskip("vitkernels.integrations.timm.families")

ATTENTIONS_PER_MODULE = {"timm DiffAttention": 2, "timm DiffParallelScalingBlock": 2}


def shape_for_no_images(model: nn.Module, images: torch.Tensor) -> torch.Size | None:
    """``None`` if the model cannot do it."""
    try:
        with torch.no_grad():
            return model.eval()(images[:0]).shape
    except RuntimeError:
        return None


@pytest.mark.parametrize("name", TIMM_FAMILIES)
def test_family_agrees(name):
    model, images = timm_family(name)
    _, _, replaced, left = TIMM_FAMILIES[name]
    stock, keys = outputs_and_gradients(model, images), list(model.state_dict())
    no_images = shape_for_no_images(model, images)
    report = vk.accelerate(model)
    assert Counter(entry.kind for entry in report.replaced) == {f"timm {kind}": n for kind, n in replaced.items()}
    assert Counter(entry.kind for entry in report.stock) == {f"timm {kind}": n for kind, n in left.items()}
    assert all(entry.reason not in ("", "no fused replacement") for entry in report.stock)
    assert list(model.state_dict()) == keys
    model.eval()  # LeViT's tables are kept from one eval forward to the next, together with their graph
    with expect_kernel_calls(sum(ATTENTIONS_PER_MODULE.get(entry.kind, 1) for entry in report.replaced)):
        ours = outputs_and_gradients(model, images)
    assert_close(ours, stock)
    if no_images:
        assert shape_for_no_images(model, images) == no_images
    assert_hooks_are_called(model.eval(), images)
    vk.restore(model)
    assert torch.equal(model.eval()(images), stock["output"])


def test_tables_are_true():
    for name, (path, forward) in families.FUSED.items():
        fused = getattr(families, name)
        assert path_of(fused.stock_class) == path
        assert (
            inspect.signature(forward.attend).parameters.keys()
            == inspect.signature(fused.stock_class.forward).parameters.keys()
        )
        read = set(re.findall(r"\bself\.(\w+)", inspect.getsource(forward.attend)))
        if "scale_of(self)" in inspect.getsource(forward.attend):
            read.add("scale")
        assert {name for name in read if not hasattr(forward, name)} <= {
            path.partition(".")[0] for path in forward.attributes
        }
    for path in families.LEFT:
        module, _, name = path.rpartition(".")
        assert path_of(getattr(__import__(module, fromlist=[name]), name)) == path


def layers():
    """Modules with options that the models above do not have: name -> (module, inputs, keyword arguments)."""
    from timm.layers import attention, attention2d, attention_pool, attention_pool2d, diff_attention, other_pool
    from timm.models.beit import Attention as BeitAttention
    from timm.models.davit import ChannelAttentionV2
    from timm.models.edgenext import CrossCovarianceAttn
    from timm.models.eva import EvaAttention
    from timm.models.mvitv2 import MultiScaleAttention
    from timm.models.vision_transformer_relpos import RelPosAttention
    from timm.models.vision_transformer_sam import Attention as SamAttention

    torch.manual_seed(0)
    double = {"dtype": torch.float64}

    def normal(*shape):
        return torch.randn(*shape, **double)

    tokens, pixels, rope = normal(2, 10, 24), normal(2, 24, 3, 4), normal(9, 16)
    visible = torch.rand(2, 1, 10, 10) > 0.4
    visible[..., 0] = True
    eva = {"norm_layer": nn.LayerNorm, "num_heads": 3, **double}
    beit = {"num_heads": 3, "qkv_bias": True, **double}

    def relative(**options):
        from functools import partial

        from timm.layers import RelPosBias

        return RelPosAttention(24, 3, rel_pos_cls=partial(RelPosBias, window_size=(2, 5)), **options, **double)

    grouped = attention.AttentionRope(24, 3, qkv_fused=False, num_kv_heads=1, num_prefix_tokens=0, **double)
    einsum = attention2d.MultiQueryAttention2d(24, num_heads=3, key_dim=4, value_dim=6, kv_stride=2, **double)
    einsum.einsum = True
    pool = {"num_heads": 3, "out_features": 5, **double}
    simple = {"num_heads": 3, **double}

    def multiscale(**options):
        pools = {"kernel_q": (3, 3), "kernel_kv": (3, 3), "stride_q": (2, 2), "stride_kv": (4, 4)}
        return MultiScaleAttention(24, 30, (8, 8), num_heads=3, **pools, **options, **double)

    def rotary_embedding():
        from timm.layers import RotaryEmbeddingCat

        return RotaryEmbeddingCat(8, in_pixels=False, feat_shape=(3, 4))

    return {
        "pooled": (multiscale(has_cls_token=True), [normal(2, 65, 24)], {"feat_size": [8, 8]}),
        "pooled, no positions": (
            multiscale(has_cls_token=False, rel_pos_type="", residual_pooling=False, mode="max"),
            [normal(2, 64, 24)], {"feat_size": [8, 8]},
        ),
        "decomposed": (
            SamAttention(24, 3, qk_norm=True, use_rel_pos=True, input_size=(3, 4), **double),
            [pixels.permute(0, 2, 3, 1).contiguous()], {},
        ),
        "decomposed, tables of another size": (
            SamAttention(24, 3, use_rel_pos=True, input_size=(5, 7), **double), [normal(2, 3, 4, 24)], {},
        ),
        "map with rope": (SamAttention(24, 3, rope=rotary_embedding(), **double), [normal(2, 3, 4, 24)], {}),
        "difference": (diff_attention.DiffAttention(24, 3, dual_lambda=True, **double), [tokens], {}),
        "masked difference": (diff_attention.DiffAttention(24, 3, **double), [tokens], {"attn_mask": visible}),
        "grouped keys": (grouped, [tokens], {"rope": normal(10, 16), "attn_mask": visible}),
        "rope": (
            attention.AttentionRope(24, 3, qk_norm=True, gated=True, norm_layer=nn.LayerNorm, **double),
            [tokens], {"rope": rope, "is_causal": True},
        ),
        "eva, no bias": (EvaAttention(24, qkv_bias=False, **eva), [tokens], {"rope": rope}),
        "eva, bias apart": (EvaAttention(24, qkv_bias_separate=True, **eva), [tokens], {"rope": rope}),
        "eva, three projections": (
            EvaAttention(24, qkv_fused=False, rotate_half=True, **eva), [tokens], {"rope": normal(2, 1, 9, 16)},
        ),
        "eva, masked": (EvaAttention(24, qk_norm=True, gated=True, **eva), [tokens], {"attn_mask": visible}),
        "beit, no table": (BeitAttention(24, **beit), [tokens], {}),
        "beit, shared table": (BeitAttention(24, **beit), [tokens], {"shared_rel_pos_bias": normal(1, 3, 10, 10)}),
        "beit, two tables": (
            BeitAttention(24, window_size=(3, 3), qkv_bias_separate=True, **beit),
            [tokens], {"shared_rel_pos_bias": normal(1, 3, 10, 10)},
        ),
        "relative": (relative(qk_norm=True), [tokens], {}),
        "latents": (
            attention_pool.AttentionPoolLatent(24, 5, num_heads=3, latent_len=2, pool_type="avg", pos_embed="abs",
                                               feat_size=10, qk_norm=True, **double),
            [tokens], {"attn_mask": visible[:, :, :1]},
        ),
        "latents as queries": (
            attention_pool.AttentionPoolLatent(24, 0, num_heads=3, latent_len=2, pool_type="", q_proj=False, **double),
            [tokens], {},
        ),
        "no parameters": (
            attention_pool.AttentionPoolPrr(24, 3, pre_norm=True, post_norm=True, **double), [tokens], {},
        ),
        "no parameters, mean": (attention_pool.AttentionPoolPrr(24, 3, pool_type="avg", **double), [tokens], {}),
        "pool": (attention_pool2d.AttentionPool2d(24, (3, 4), **pool), [pixels], {}),
        "pool, map": (
            attention_pool2d.AttentionPool2d(24, (2, 2), pool_type="", qkv_separate=True, class_token=True, **pool),
            [pixels], {},
        ),
        "rotary pool": (attention_pool2d.RotAttentionPool2d(24, **pool), [pixels], {}),
        "rotary pool, dino": (
            attention_pool2d.RotAttentionPool2d(24, pool_type="", class_token=True, rope_type="dinov3", **pool),
            [pixels], {"pre_logits": True},
        ),
        "simple pool": (other_pool.SimPool1d(24, qk_norm=True, **simple), [tokens], {}),
        "simple pool, power": (other_pool.SimPool2d(24, gamma=1.25, **simple), [pixels], {}),
        "channels, scaled by tokens": (ChannelAttentionV2(24, 3, **double), [tokens], {}),
        "channels, scaled by channels": (ChannelAttentionV2(24, 3, dynamic_scale=False, **double), [tokens], {}),
        "channels, temperature": (CrossCovarianceAttn(24, 3, qkv_bias=True, **double), [tokens], {}),
        "map": (attention2d.Attention2d(24, 30, num_heads=3, expand_first=True, **double), [pixels], {}),
        "map, heads first": (
            attention2d.Attention2d(24, num_heads=3, head_first=True, **double),
            [pixels], {"attn_mask": normal(12, 12)},
        ),
        "one key for all heads": (
            attention2d.MultiQueryAttention2d(24, 30, num_heads=3, key_dim=4, value_dim=6, query_strides=2, **double),
            [normal(2, 24, 4, 6)], {},
        ),
        "one key for all heads, einsum": (einsum, [pixels], {}),
    }  # fmt: skip


LAYERS = layers()


def layer_outcome(module, inputs, kwargs):
    """The output and the gradients of the parameters and of every floating tensor that goes in."""
    tensors = {str(i): t for i, t in enumerate(inputs)} | kwargs
    tensors = {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    for tensor in tensors.values():
        tensor.requires_grad_().grad = None
    named = outputs_and_gradients(module, *inputs, **kwargs)
    return named | {f"argument {name}": t.grad for name, t in tensors.items() if t.grad is not None}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_agrees(name):
    module, inputs, kwargs = copy.deepcopy(LAYERS[name])
    module.eval()
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=noise))
    stock = layer_outcome(module, inputs, kwargs)
    (entry,) = vk.accelerate(module).replaced
    with expect_kernel_calls(ATTENTIONS_PER_MODULE.get(entry.kind, 1)):
        ours = layer_outcome(module, inputs, kwargs)
    assert_close(ours, stock)
    assert_hooks_are_called(module, *inputs, **kwargs)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_in_training(name):
    module, inputs, kwargs = copy.deepcopy(LAYERS[name])
    module.train()
    drop = getattr(module, "attn_drop", getattr(module, "drop", None))
    if isinstance(drop, nn.Dropout):
        drop.p = 0.3
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.track_running_stats = False

    def outcome():
        torch.manual_seed(3)
        return layer_outcome(module, inputs, kwargs)

    stock = outcome()
    vk.accelerate(module)
    with KernelCalls() as recorder:
        ours = outcome()
    assert_close(ours, stock)
    assert bool(recorder.calls) != hasattr(module, "attn_drop")


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "convit_tiny", "pvt_v2_b0"])
def test_float32_error_policy(name):
    model, images = timm_family(name)
    truth = outputs_and_gradients(model, images)
    stock = outputs_and_gradients(model.float(), images.float())
    vk.accelerate(model)
    ours = outputs_and_gradients(model, images.float())
    assert_policy(ours, stock, truth, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    "name",
    [
        "eva02_tiny_patch14_224",
        "beit_base_patch16_224",
        "convit_tiny",
        "pvt_v2_b0",
        "cait_xxs24_224",
        "coatnet_pico_rw_224",
    ],
)
def test_dynamo_captures_one_graph(name):
    model, images = timm_family(name)
    vk.accelerate(model)
    expected = outputs_and_gradients(model, images)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ours = {key.removeprefix("_orig_mod."): t for key, t in outputs_and_gradients(compiled, images).items()}
    assert_close(ours, expected)


def test_copies_and_pickles_stay_accelerated(tmp_path: Path):
    model, images = timm_family("eva02_tiny_patch14_224")
    vk.accelerate(model)
    with expect_kernel_calls(1):
        expected = copy.deepcopy(model)(images).detach()
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    torch.save((images, expected), tmp_path / "data.pt")
    run_python(
        "import pickle, sys, torch\n"
        "from support import model_zoo\n"
        "folder = sys.argv[1]\n"
        "model = pickle.load(open(folder + '/model.pkl', 'rb'))\n"
        "images, expected = torch.load(folder + '/data.pt')\n"
        "with model_zoo.expect_kernel_calls(1):\n"
        "    assert torch.equal(model(images), expected)\n",
        str(tmp_path),
    )


def test_scale_set_by_hand_counts():
    from timm.models.crossvit import CrossAttention

    torch.manual_seed(0)
    module, x = CrossAttention(24, 3, dtype=torch.float64), torch.randn(2, 9, 24, dtype=torch.float64)
    usual, module.scale = outputs_and_gradients(module, x), 1.5
    stock = outputs_and_gradients(module, x)
    vk.accelerate(module)
    ours = outputs_and_gradients(module, x)
    assert_close(ours, stock)
    assert not torch.allclose(ours["output"], usual["output"])


def test_two_kinds_of_relative_positions_take_the_stock_path():
    module, _, _ = copy.deepcopy(LAYERS["relative"])
    x, shared = torch.randn(2, 10, 24, dtype=torch.float64), torch.randn(1, 3, 10, 10, dtype=torch.float64)
    for module.fused_attn in (True, False):
        stock = module(x, shared)
        vk.accelerate(module)
        with expect_kernel_calls(0):
            assert torch.equal(module(x, shared), stock)
        vk.restore(module)


def test_low_rank_packed_projection_counts_although_its_bias_lies_apart():
    model, images = timm_family("beit_base_patch16_224")
    merged = copy.deepcopy(model)
    assert add_low_rank(model, lambda name: name.endswith("qkv")) == 2
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            update = module.up.weight @ module.down.weight
            with torch.no_grad():
                merged.get_submodule(name).weight.add_(update)
    vk.accelerate(model)
    torch.testing.assert_close(model(images), merged(images), rtol=1e-10, atol=1e-10)


def test_another_version_of_timm_is_left_alone(monkeypatch):
    from timm.models.cait import ClassAttn

    def forward(self, x, sink):
        return x

    module = ClassAttn(8, 2)
    del module.proj_drop
    (entry,) = vk.accelerate(module).stock
    assert entry.reason == "this version of timm's ClassAttn has no proj_drop"
    monkeypatch.setattr(ClassAttn, "forward", forward)
    (entry,) = vk.accelerate(ClassAttn(8, 2)).stock
    assert entry.reason == "this version of timm's ClassAttn takes x, sink"


def test_fx_and_feature_extraction():
    model, images = timm_model()
    expected = model.get_intermediate_layers(images, n=1)[0]
    vk.accelerate(model)
    torch.testing.assert_close(model.get_intermediate_layers(images, n=1)[0], expected, rtol=1e-10, atol=1e-10)
    node = f"blocks.{DEPTH - 1}.attn.proj"
    seen = []
    model.get_submodule(node).register_forward_hook(lambda module, args, out: seen.append(out))
    model(images)
    extractor = timm.models.create_feature_extractor(model, {node: "projected"})
    torch.testing.assert_close(extractor(images)["projected"], seen[0], rtol=1e-10, atol=1e-10)


def test_features_only():
    options = {"pretrained": False, "features_only": True, "depths": (1, 1, 1, 1)}
    torch.manual_seed(0)
    model, images = timm.create_model("pvt_v2_b0", **options).double().eval(), torch.randn(1, 3, 64, 64).double()
    expected = model(images)
    assert len(vk.accelerate(model).replaced) == 4
    with expect_kernel_calls(4):
        ours = model(images)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_set_input_size(name):
    model, _ = timm_model() if name.startswith("vit") else timm_family(name)
    vk.accelerate(model)
    model.set_input_size((96, 64))
    images = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    with expect_kernel_calls(2):
        ours = outputs_and_gradients(model, images)
    vk.restore(model)
    assert_close(ours, outputs_and_gradients(model, images))


def test_gradient_checkpointing():
    model, images = timm_family("eva02_tiny_patch14_224")
    vk.accelerate(model)
    model.train()
    plain = outputs_and_gradients(model, images)
    model.set_grad_checkpointing()
    with expect_kernel_calls(2):
        checkpointed = outputs_and_gradients(model, images)
    assert all(torch.equal(checkpointed[key], plain[key]) for key in plain)
