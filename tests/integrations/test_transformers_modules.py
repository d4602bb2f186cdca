"""``vk.accelerate`` on transformers' attention modules that compute on their own, without its registry."""

from __future__ import annotations

import copy
import pickle
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import vitkernels as vk
from support.hooks import assert_hooks_are_called
from support.model_zoo import (
    TRANSFORMERS_FAMILIES,
    add_low_rank,
    assert_close,
    assert_policy,
    expect_kernel_calls,
    outputs_and_gradients,
    run_python,
    transformers_family,
    transformers_model,
)
from torch.utils._pytree import tree_leaves

transformers = pytest.importorskip("transformers")
every_family = pytest.mark.parametrize("name", TRANSFORMERS_FAMILIES)


@every_family
def test_outputs_and_gradients_agree(name):
    model, images = transformers_family(name)
    replaced = {f"transformers {kind}": n for kind, n in TRANSFORMERS_FAMILIES[name][1].items()}
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    stock = outputs_and_gradients(model, images)
    report = vk.accelerate(model)
    assert Counter(entry.kind for entry in report.replaced) == replaced
    assert not report.stock
    assert list(model.state_dict()) == keys
    assert vk.accelerate(model) == report
    with expect_kernel_calls(sum(replaced.values())):
        ours = outputs_and_gradients(model, images)
    assert_close(ours, stock)
    assert_hooks_are_called(model, images)
    vk.restore(model)
    assert [type(m) for m in model.modules()] == classes
    again = outputs_and_gradients(model, images)
    assert all(torch.equal(again[key], stock[key]) for key in stock)


@pytest.mark.parametrize("name", ["Cvt", "Pvt", "PvtV2", "Swin padded"])
def test_float32_error_policy(name):
    model, images = transformers_family(name)
    truth = outputs_and_gradients(model, images)
    stock = outputs_and_gradients(model.float(), images.float())
    vk.accelerate(model)
    ours = outputs_and_gradients(model, images.float())
    for named in (truth, stock, ours):  # the gradient of a key's bias is zero, and what is computed is rounding
        for key in [key for key in named if re.search(r"(projection_key\b.*|\bkey|k_proj)\.bias$", key)]:
            del named[key]
    # Cvt normalizes over the batch before its projections: of gradients near zero, AVX2 kernels are 2.5 roundings off.
    assert_policy(ours, stock, truth, torch.finfo(torch.float32).eps * (2 if name == "Cvt" else 1))


@pytest.mark.parametrize("name", ["Pvt", "PvtV2", "Swinv2"])
def test_output_attentions_takes_the_stock_path(name):
    model, images = transformers_family(name)
    stock = model(images, output_attentions=True)
    report = vk.accelerate(model)
    assert all(entry.reason.startswith("stock path with output_attentions") for entry in report.replaced)
    with expect_kernel_calls(0):
        ours = model(images, output_attentions=True)
    assert torch.equal(ours.logits, stock.logits)
    found, expected = tree_leaves(ours.attentions), tree_leaves(stock.attentions)
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_family
def test_dropout_in_training_takes_the_stock_path(name):
    model, images = transformers_family(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
        if isinstance(module, torch.nn.BatchNorm2d):
            module.track_running_stats = False
    model.train()
    torch.manual_seed(1)
    stock = outputs_and_gradients(model, images)
    report = vk.accelerate(model)
    assert all("stock path in training: attention dropout 0.2" in entry.reason for entry in report.replaced)
    torch.manual_seed(1)
    with expect_kernel_calls(0):
        ours = outputs_and_gradients(model, images)
    assert all(torch.equal(ours[key], stock[key]) for key in stock)


@every_family
def test_low_rank_linears_inside_are_called(name):
    model, images = transformers_family(name)
    vk.accelerate(model)
    attentions = sum(TRANSFORMERS_FAMILIES[name][1].values())
    assert add_low_rank(model, lambda name: name.endswith(("query", "value", "q_proj", "v_proj"))) == 2 * attentions
    with expect_kernel_calls(attentions):
        ours = outputs_and_gradients(model, images)
    vk.restore(model)
    assert_close(ours, outputs_and_gradients(model, images))


@pytest.mark.parametrize("name", ["Cvt", "PvtV2", "Swin", "Swinv2 padded"])
def test_dynamo_captures_one_graph(name):
    model, images = transformers_family(name)
    expected = model(images).logits
    vk.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images).logits, expected, rtol=1e-10, atol=1e-10)


def test_copies_and_pickles_stay_accelerated(tmp_path: Path):
    model, images = transformers_family("Cvt")
    vk.accelerate(model)
    with expect_kernel_calls(6):
        expected = copy.deepcopy(model)(images).logits.detach()
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    torch.save((images, expected), tmp_path / "data.pt")
    run_python(
        "import pickle, sys, torch\n"
        "from support import model_zoo\n"
        "folder = sys.argv[1]\n"
        "model = pickle.load(open(folder + '/model.pkl', 'rb'))\n"
        "images, expected = torch.load(folder + '/data.pt')\n"
        "with model_zoo.expect_kernel_calls(6):\n"
        "    assert torch.equal(model(images).logits, expected)\n",
        str(tmp_path),
    )


def test_a_subclass_is_left_alone():
    from transformers.models.pvt.modeling_pvt import PvtEfficientSelfAttention

    class OwnAttention(PvtEfficientSelfAttention):
        pass

    model, _ = transformers_family("Pvt")
    for module in model.modules():
        if type(module) is PvtEfficientSelfAttention:
            module.__class__ = OwnAttention
    report = vk.accelerate(model)
    assert not report.replaced
    assert {entry.reason for entry in report.stock} == {
        "a subclass of transformers' PvtEfficientSelfAttention may compute something else"
    }


def test_pooling_head_of_siglip_asks_for_weights():
    # It takes the default of nn.MultiheadAttention, the weights, and throws them away.
    model, images = transformers_model("SiglipVision", vision_use_head=True)
    stock = model(images)
    report = vk.accelerate(model)
    reasons = {entry.kind: entry.reason for entry in report.replaced}
    assert reasons["torch MultiheadAttention"] == "stock path with need_weights or is_causal"
    with expect_kernel_calls(2):  # the two layers
        ours = model(images)
    torch.testing.assert_close(ours.pooler_output, stock.pooler_output, rtol=1e-10, atol=1e-10)


def test_decoder_with_a_config_of_its_own():
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8,
        decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
    )  # fmt: skip
    model = transformers.ViTMAEForPreTraining(config).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    stock = outputs_and_gradients(model, images)
    assert len(vk.accelerate(model).replaced) == 3
    with expect_kernel_calls(3):
        ours = outputs_and_gradients(model, images)
    assert_close(ours, stock)


def test_weights_are_recorded_on_the_stock_path():
    model, images = transformers_model("Beit")
    stock = model(images, output_attentions=True)
    vk.accelerate(model)
    with expect_kernel_calls(0):
        ours = model(images, output_attentions=True)
    assert torch.equal(ours.last_hidden_state, stock.last_hidden_state)
    assert (ours.attentions is None) == (stock.attentions is None)
