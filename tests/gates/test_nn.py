"""``vitkernels.nn.Attention`` against timm's module of the same name."""

from __future__ import annotations

import pytest
import torch
import vitkernels as vk
from support.model_zoo import (
    LowRankLinear,
    assert_close,
    assert_policy,
    expect_kernel_calls,
    outputs_and_gradients,
    randomised,
)
from torch import nn
from vitkernels.nn.masks import mask_terms

timm_attention = pytest.importorskip("timm.layers.attention")

DIM, HEADS, TOKENS = 48, 3, 13
OPTIONS = {
    "plain": {},
    "qkv_bias": {"qkv_bias": True},
    "no_proj_bias": {"proj_bias": False},
    "qk_norm": {"qk_norm": True, "norm_layer": nn.LayerNorm},
    "scale_norm": {"scale_norm": True, "norm_layer": nn.LayerNorm},
    "gated": {"gated": True, "qkv_bias": True},
    "head_dim": {"attn_head_dim": 20},
    "dim_out": {"dim_out": 30},
}


def pair(**options) -> tuple[vk.nn.Attention, nn.Module]:
    """Ours and timm's in float64 and eval mode, ours with timm's weights."""
    torch.manual_seed(0)
    theirs = randomised(timm_attention.Attention(DIM, HEADS, dtype=torch.float64, **options)).eval()
    ours = vk.nn.Attention(DIM, HEADS, dtype=torch.float64, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def tokens(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_agrees_with_timm(options):
    ours, theirs = pair(**options)
    with expect_kernel_calls(1):
        mine = outputs_and_gradients(ours, tokens())
    assert_close(mine, outputs_and_gradients(theirs, tokens()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_policy(dtype):
    ours, theirs = pair(qkv_bias=True)
    truth = outputs_and_gradients(theirs, tokens())
    mine = outputs_and_gradients(ours.to(dtype), tokens().to(dtype))
    stock = outputs_and_gradients(theirs.to(dtype), tokens().to(dtype))
    assert_policy(mine, stock, truth, torch.finfo(dtype).eps)


def masks() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    floats = torch.randn(2, HEADS, TOKENS, TOKENS, dtype=torch.float64, generator=generator)
    some = floats > -0.5
    some[..., 0] = True  # timm's softmax over no key at all is not defined
    return {
        "bool": some,
        "bool_shared": some[0, 0],
        "float": floats,
        "float_per_head": floats[0],
        "bool_keys": some[:, :1, :1],
        "bool_keys_expanded": some[:, :1, :1].expand(2, 1, TOKENS, TOKENS),
        "float_keys": floats[:1, :, :1],
    }


@pytest.mark.parametrize("name", masks())
def test_masks_agree_with_timm(name):
    ours, theirs = pair(qkv_bias=True)
    mask = masks()[name]
    with expect_kernel_calls(1):
        mine = outputs_and_gradients(ours, tokens(), attn_mask=mask)
    assert_close(mine, outputs_and_gradients(theirs, tokens(), attn_mask=mask))


@pytest.mark.parametrize("shape", [(HEADS, TOKENS, TOKENS), (2, 1, 1, TOKENS)], ids=["full", "keys"])
def test_mask_gradient_agrees_with_timm(shape):
    grads = []
    for module in pair():
        mask = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        mask.requires_grad_()
        module(tokens(), attn_mask=mask).square().sum().backward()
        grads.append(mask.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_causal_agrees_with_timm():
    ours, theirs = pair()
    mine = outputs_and_gradients(ours, tokens(), is_causal=True)
    assert_close(mine, outputs_and_gradients(theirs, tokens(), is_causal=True))


def test_token_that_sees_no_key_gets_the_projection_of_zero():
    ours, _ = pair()
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    mask[4] = False
    out = ours(tokens(), attn_mask=mask)
    assert torch.equal(out[:, 4], ours.proj.bias.expand(2, -1))


@pytest.mark.parametrize("name", ["bool_keys", "bool_keys_expanded", "float_keys"])
def test_mask_of_keys_becomes_key_bias(name):
    mask = masks()[name]
    bias, key_bias = mask_terms(mask)
    assert bias is None
    assert key_bias.shape == (*mask.shape[:2], TOKENS)
    expected = mask[:, :, 0] if mask.is_floating_point() else torch.where(mask[:, :, 0], 0.0, -torch.inf)
    assert torch.equal(key_bias, expected)


def test_full_mask_becomes_bias():
    mask = masks()["bool"]
    bias, key_bias = mask_terms(mask)
    assert key_bias is None
    assert torch.equal(bias, torch.where(mask, 0.0, -torch.inf))


def test_packed_projection_is_not_copied():
    ours, _ = pair()
    outputs = []
    ours.qkv.register_forward_hook(lambda module, args, out: outputs.append(out))
    with expect_kernel_calls(1) as recorder, torch.no_grad():
        ours(tokens())
    query, key, value = recorder.calls[0][:3]
    channels = HEADS * ours.head_dim
    for position, tensor in enumerate((query, key, value)):
        assert tensor.data_ptr() == outputs[0][..., position * channels :].data_ptr()
        assert tensor.stride(1) == 3 * channels


def test_dropout_in_training_is_timms():
    ours, theirs = pair(attn_drop=0.3, proj_drop=0.2)
    results = []
    for module in (ours.train(), theirs.train()):
        torch.manual_seed(5)
        with expect_kernel_calls(0):
            results.append(outputs_and_gradients(module, tokens()))
    assert_close(*results)
    torch.manual_seed(6)
    assert not torch.equal(outputs_and_gradients(ours, tokens())["output"], results[0]["output"])
    with expect_kernel_calls(1):
        ours.eval()(tokens())


def test_projections_are_called_not_read():
    ours, theirs = pair(qkv_bias=True)
    for module in (ours, theirs):
        torch.manual_seed(7)
        module.qkv, module.proj = LowRankLinear(module.qkv), LowRankLinear(module.proj)
    assert_close(outputs_and_gradients(ours, tokens()), outputs_and_gradients(theirs, tokens()))


def test_device_and_dtype_reach_every_parameter():
    module = vk.nn.Attention(
        DIM, HEADS, qk_norm=True, scale_norm=True, gated=True, norm_layer=nn.LayerNorm,
        device="meta", dtype=torch.bfloat16,
    )  # fmt: skip
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


def test_repr_names_heads():
    assert repr(vk.nn.Attention(DIM, HEADS)).splitlines()[1].strip() == "num_heads=3, head_dim=16"


def test_bad_arguments_are_named():
    with pytest.raises(RuntimeError, match=r"dim is 48, takes a multiple of num_heads \(5\)"):
        vk.nn.Attention(DIM, 5)
    with pytest.raises(RuntimeError, match="norm_layer is None"):
        vk.nn.Attention(DIM, HEADS, qk_norm=True)
    module = vk.nn.Attention(DIM, HEADS)
    with pytest.raises(RuntimeError, match=r"x has shape \(13, 48\)"):
        module(torch.zeros(TOKENS, DIM))
    with pytest.raises(RuntimeError, match="is_causal is True"):
        module(torch.zeros(1, TOKENS, DIM), torch.zeros(TOKENS, TOKENS), is_causal=True)
