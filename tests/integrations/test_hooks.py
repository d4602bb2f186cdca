"""Hooks on modules whose work a kernel does: they are called, and the report says what that costs."""

from __future__ import annotations

import pytest
import torch
import vitkernels as vk
from support.hooks import assert_hooks_are_called, unfused
from support.model_zoo import assert_close, expect_kernel_calls, outputs_and_gradients, timm_family, timm_model
from torch import nn

timm = pytest.importorskip("timm")

# Model -> the parts of its attention that it calls as modules; other families are in the tests of their outputs.
PARTS = {
    "vit_tiny_patch16_224": {"blocks.*.attn.attn_drop"},
    "beit_base_patch16_224": {"blocks.*.attn.attn_drop"},
    "vit_relpos_small_patch16_224": {"blocks.*.attn.attn_drop", "blocks.*.attn.rel_pos"},
    "swin_tiny_patch4_window7_224": {
        f"layers.*.blocks.*.{part}" for part in ("attn", "attn.softmax", "attn.attn_drop")
    },
    "davit_tiny": {f"stages.*.blocks.*.*.{part}" for part in ("attn", "attn.softmax")},
    "maxvit_tiny_tf_224": {
        f"stages.*.blocks.*.attn_{kind}.{part}"
        for kind in ("block", "grid") for part in ("attn", "attn.rel_pos", "attn.attn_drop")
    },
}  # fmt: skip


def model_of(name: str) -> tuple[nn.Module, torch.Tensor]:
    return timm_model(name) if name == "vit_tiny_patch16_224" else timm_family(name)


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_are_passed_over(name):
    model, images = model_of(name)
    vk.accelerate(model)
    assert assert_hooks_are_called(model, images) == PARTS[name]


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks(register):
    model, images = timm_model()
    with unfused(model):
        stock, seen = outputs_and_gradients(model, images), []
        vk.accelerate(model)
        handle = getattr(model.blocks[0].attn.attn_drop, register)(lambda *_: seen.append(1))
        with expect_kernel_calls(1):
            assert_close(outputs_and_gradients(model, images), stock)
        assert seen
        handle.remove()
        with expect_kernel_calls(2):
            assert_close(outputs_and_gradients(model, images), stock)


def test_report_names_hooks_that_are_there():
    model, _ = timm_model()
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda *_: None)
    first, second = vk.accelerate(model).entries
    assert first.reason == "stock path now: hooks on attn_drop"
    assert second.reason == "stock path with hooks on attn_drop"


@pytest.mark.parametrize("method", ["hook", "fx"])
def test_attention_extract(method):
    from timm.utils import AttentionExtract

    model, images = timm_model()
    with unfused(model):
        names = {"hook": ["*attn.attn_drop"], "fx": ["*softmax"]}[method]
        expected = AttentionExtract(model, names, method=method)(images)
        vk.accelerate(model)
        maps = AttentionExtract(model, names, method=method)(images)
    assert len(maps) == len(expected) == 2
    assert_close(dict(maps), dict(expected))


class Recorder(nn.Module):
    """Stands in the place of a dropout."""

    def forward(self, x):
        self.seen = x
        return x


def test_another_module_in_the_place_of_a_part():
    model, images = timm_model(depth=1)
    with unfused(model):
        vk.accelerate(model)
        model.blocks[0].attn.attn_drop = Recorder()
        with expect_kernel_calls(0):
            model(images)
        assert model.blocks[0].attn.attn_drop.seen.shape == (2, 3, 17, 17)
        (entry,) = vk.accelerate(model).entries
    assert (entry.status, entry.reason) == ("stock", "its attn_drop is a Recorder, which may compute something else")
    assert type(model.blocks[0].attn) is timm.layers.attention.Attention


def test_a_forward_of_its_own_on_a_part():
    model, images = timm_model(depth=1)
    with unfused(model):
        vk.accelerate(model)
        drop, seen = model.blocks[0].attn.attn_drop, []
        drop.forward = lambda x: seen.append(x) or x
        with expect_kernel_calls(0):
            model(images)
    assert len(seen) == 1
