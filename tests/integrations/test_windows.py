"""``vk.accelerate`` on windows and grids of a map: those of Swin and Swin V2 in every library, and others of timm."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import vitkernels as vk
from support.model_zoo import (
    LowRankLinear,
    Named,
    add_low_rank,
    assert_close,
    assert_policy,
    expect_kernel_calls,
    outputs_and_gradients,
    randomised,
    run_python,
    timm_family,
    transformers_family,
)
from torch import nn

timm_swin = pytest.importorskip("timm.models.swin_transformer")
torchvision_swin = pytest.importorskip("torchvision.models.swin_transformer")
swin = pytest.importorskip("transformers.models.swin.modeling_swin")


def torchvision_model(version: int, size: int, window: int = 5) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    options = {}
    if version == 2:
        options = {
            "block": torchvision_swin.SwinTransformerBlockV2,
            "downsample_layer": torchvision_swin.PatchMergingV2,
        }
    model = torchvision_swin.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 3], [window, window], num_classes=5, stochastic_depth_prob=0.0, **options
    )
    return randomised(model.double().eval()), torch.randn(2, 3, size, size, dtype=torch.float64)


# Name -> model and images, the class that is replaced, and how many there are.
MODELS = {
    "timm": (lambda: timm_family("swin_tiny_patch4_window7_224"), "timm SwinTransformerBlock", 3),
    "timm padded": (lambda: timm_family("swin_s3_tiny_224"), "timm SwinTransformerBlock", 4),
    "timm v2": (lambda: timm_family("swinv2_tiny_window8_256"), "timm SwinTransformerV2Block", 3),
    "timm maxvit": (lambda: timm_family("maxvit_tiny_tf_224"), "timm PartitionAttentionCl", 4),
    "timm tinyvit": (lambda: timm_family("tiny_vit_5m_224"), "timm TinyVitBlock", 3),
    "torchvision": (lambda: torchvision_model(1, 80), "torchvision ShiftedWindowAttention", 4),
    "torchvision padded": (lambda: torchvision_model(1, 72), "torchvision ShiftedWindowAttention", 4),
    "torchvision small": (lambda: torchvision_model(1, 32, 9), "torchvision ShiftedWindowAttention", 4),
    "torchvision v2": (lambda: torchvision_model(2, 72), "torchvision ShiftedWindowAttentionV2", 4),
    "transformers": (lambda: transformers_family("Swin padded"), "transformers SwinLayer", 3),
    "transformers v2": (lambda: transformers_family("Swinv2 padded"), "transformers Swinv2Layer", 3),
}
every_model = pytest.mark.parametrize("name", MODELS)
_SWINS = ["timm", "torchvision", "transformers"]
every_swin = pytest.mark.parametrize("name", [*_SWINS, *(f"{name} v2" for name in _SWINS)])


def model_of(name: str) -> tuple[nn.Module, torch.Tensor, int]:
    build, _, count = MODELS[name]
    return *build(), count


@every_model
def test_outputs_and_gradients_agree(name):
    model, images, count = model_of(name)
    stock, keys, classes = outputs_and_gradients(model, images), list(model.state_dict()), [*map(type, model.modules())]
    report = vk.accelerate(model)
    assert [entry.kind for entry in report.entries] == [MODELS[name][1]] * count
    assert {(entry.status, entry.operator) for entry in report.entries} == {("replaced", "spatial_attention")}
    assert f"{count} x {MODELS[name][1]} -> vitkernels.spatial_attention" in str(report)
    assert list(model.state_dict()) == keys
    with expect_kernel_calls(count):
        ours = outputs_and_gradients(model, images)
    assert_close(ours, stock)
    vk.restore(model)
    assert [*map(type, model.modules())] == classes
    model.eval()  # TinyViT's tables are kept from one eval forward to the next, together with their graph
    again = outputs_and_gradients(model, images)
    assert all(torch.equal(again[key], stock[key]) for key in stock)


def assert_policy_by_kind(ours: Named, stock: Named, truth: Named, eps: float) -> None:
    """``assert_policy`` for all blocks together, since a gradient of few numbers is right by chance in one of them.

    The gradient of a key's bias is left out: it is zero, and what is computed is rounding.
    """

    def by_kind(named: Named) -> Named:
        kinds: dict[str, list[torch.Tensor]] = {}
        for key, exact in truth.items():
            if not key.endswith("k_proj.bias"):
                kinds.setdefault(re.sub(r"\d+", "*", key), []).append((named[key] / exact.abs().max()).flatten())
        return {kind: torch.cat(tensors) for kind, tensors in kinds.items()}

    assert ours.keys() == stock.keys() == truth.keys()
    assert_policy(*map(by_kind, (ours, stock, truth)), eps)


@every_model
def test_float32_error_policy(name):
    model, images, _ = model_of(name)
    truth = outputs_and_gradients(model, images)
    stock = outputs_and_gradients(model.float(), images.float())
    vk.accelerate(model)
    ours = outputs_and_gradients(model, images.float())
    assert_policy_by_kind(ours, stock, truth, torch.finfo(torch.float32).eps)


@every_swin
def test_bfloat16_autocast_error_policy(name):
    model, images, count = model_of(name)
    truth = outputs_and_gradients(model, images)
    model, images = model.float(), images.float()
    with torch.autocast("cpu", torch.bfloat16):
        stock = outputs_and_gradients(model, images)
        vk.accelerate(model)
        with expect_kernel_calls(count) as recorder:
            ours = outputs_and_gradients(model, images)
    assert all(call[0].dtype == torch.bfloat16 for call in recorder.calls)
    assert_policy_by_kind(ours, stock, truth, torch.finfo(torch.bfloat16).eps)


@every_swin
def test_training_draws_the_same_paths(name):
    model, images, count = model_of(name)
    for module in model.modules():
        for rate in {"drop_prob", "p"} & vars(module).keys():
            if type(module).__name__.endswith(("DropPath", "StochasticDepth")):
                setattr(module, rate, 0.3)
    model.train()
    torch.manual_seed(9)
    stock = outputs_and_gradients(model, images)
    vk.accelerate(model)
    torch.manual_seed(9)
    with expect_kernel_calls(count):
        ours = outputs_and_gradients(model, images)
    assert_close(ours, stock)


def set_attention_dropout(model: nn.Module, rate: float) -> None:
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = rate
        for name in ("attn_drop", "dropout"):
            if type(module).__name__ in ("WindowAttention", "Swinv2SelfAttention") and hasattr(module, name):
                getattr(module, name).p = rate


@every_swin
def test_dropout_in_training_takes_the_stock_path(name):
    model, images, count = model_of(name)
    set_attention_dropout(model, 0.2)
    model.train()
    torch.manual_seed(9)
    stock = outputs_and_gradients(model, images)
    report = vk.accelerate(model)
    assert all("stock path in training: attention dropout 0.2" in entry.reason for entry in report.replaced)
    torch.manual_seed(9)
    with expect_kernel_calls(0):
        ours = outputs_and_gradients(model, images)
    assert all(torch.equal(ours[key], stock[key]) for key in stock)
    with expect_kernel_calls(count):
        model.eval()(images)


@pytest.mark.parametrize(
    "name", ["timm padded", "timm v2", "timm maxvit", "timm tinyvit", "torchvision padded", "torchvision v2"]
)
def test_dynamo_captures_one_graph(name):
    model, images, _ = model_of(name)
    vk.accelerate(model)
    expected = outputs_and_gradients(model, images)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ours = {key.removeprefix("_orig_mod."): t for key, t in outputs_and_gradients(compiled, images).items()}
    assert_close(ours, expected)


@pytest.mark.parametrize("name", ["timm", "timm v2", "torchvision", "transformers", "transformers v2"])
def test_low_rank_linears_inside_are_called(name):
    model, images, count = model_of(name)
    vk.accelerate(model)
    assert add_low_rank(model, lambda name: name.endswith(("proj", "qkv", "query", "value", "self.key"))) >= 2 * count
    with expect_kernel_calls(count):
        ours = outputs_and_gradients(model, images)
    assert sum(key.endswith(".up.weight") for key in ours) >= 2 * count
    vk.restore(model)
    for module in [*model.modules()]:  # some of the stock forwards read weights
        for child, linear in module.named_children():
            if isinstance(linear, LowRankLinear):
                linear.base.weight.data += linear.up.weight @ linear.down.weight
                setattr(module, child, linear.base)
    assert_close({"output": ours["output"]}, {"output": outputs_and_gradients(model, images)["output"]})


@every_swin
def test_copies_and_pickles_stay_accelerated(name, tmp_path):
    model, images, count = model_of(name)
    vk.accelerate(model)
    out = outputs_and_gradients(copy.deepcopy(model), images)["output"]
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    torch.save((images, out), tmp_path / "data.pt")
    run_python(
        "import pickle, sys, torch\n"
        "from support import model_zoo\n"
        "folder = sys.argv[1]\n"
        "model = pickle.load(open(folder + '/model.pkl', 'rb'))\n"
        "images, expected = torch.load(folder + '/data.pt')\n"
        f"with model_zoo.expect_kernel_calls({count}):\n"
        "    assert torch.equal(model_zoo.output_of(model, images), expected)\n",
        str(tmp_path),
    )


@pytest.mark.parametrize("name", ["timm", "timm v2", "transformers", "transformers v2"])
def test_hooks_on_a_module_that_is_passed_over_take_the_stock_path(name):
    model, images, count = model_of(name)
    stock, seen = outputs_and_gradients(model, images), []
    path = {"timm": "attn", "transformers": "attention"}[name.split()[0]]
    first = next(module for name, module in model.named_modules() if name.endswith(f".{path}"))
    report = vk.accelerate(model)
    assert all(f"stock path with hooks on {path}" in entry.reason for entry in report.replaced)
    handle = first.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    # The first layer of transformers' Swin then calls its attention, which has a kernel of its own.
    with expect_kernel_calls(count if name == "transformers" else count - 1):
        assert_close(outputs_and_gradients(model, images), stock)
    assert len(seen) == 1
    handle.remove()
    with expect_kernel_calls(count):
        model(images)


def test_images_of_another_size():
    model, _ = timm_family("swin_tiny_patch4_window7_224")
    for module in model.modules():
        if type(module) is timm_swin.SwinTransformerBlock:
            module.dynamic_mask = True
    model.patch_embed.strict_img_size = False
    vk.accelerate(model)
    for shape in ((2, 3, 56, 84), (1, 3, 72, 44)):
        images = torch.randn(shape, dtype=torch.float64)
        with expect_kernel_calls(3):
            ours = outputs_and_gradients(model, images)
        assert_close(ours, outputs_and_gradients(restored(model), images))


def restored(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    vk.restore(twin)
    return twin


def test_windows_that_timm_sets_later():
    model, _ = timm_family("swin_tiny_patch4_window7_224")
    vk.accelerate(model)
    model.set_input_size(img_size=(48, 64), window_size=(4, 5))
    images = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    with expect_kernel_calls(3):
        ours = outputs_and_gradients(model, images)
    assert_close(ours, outputs_and_gradients(restored(model), images))


def test_gradient_checkpointing():
    model, images = transformers_family("Swin")
    vk.accelerate(model)
    plain = outputs_and_gradients(model.train(), images)
    model.gradient_checkpointing_enable()
    checkpointed = outputs_and_gradients(model, images)
    assert_close(checkpointed, plain)


@pytest.mark.parametrize("partition", ["block", "grid"])
@pytest.mark.parametrize("kind", ["", "bias", "bias_tf", "mlp cr", "mlp swin"])
def test_relative_positions_of_partitions(kind, partition):
    from timm.layers import RelPosMlp
    from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl

    torch.manual_seed(0)
    rel_pos_type, _, mode = kind.partition(" ")
    config = MaxxVitTransformerCfg(
        dim_head=8, window_size=(3, 4), grid_size=(3, 4), rel_pos_type=rel_pos_type, head_first=kind == "bias"
    )
    block = PartitionAttentionCl(24, partition, config, dtype=torch.float64)
    if mode:
        block.attn.rel_pos = RelPosMlp((3, 4), 3, 16, mode=mode, dtype=torch.float64)
    randomised(block.eval())
    x = torch.randn(2, 6, 12, 24, dtype=torch.float64)
    stock = outputs_and_gradients(block, x)
    vk.accelerate(block)
    with expect_kernel_calls(1):
        assert_close(outputs_and_gradients(block, x), stock)
    with pytest.raises((AssertionError, RuntimeError), match="must be divisible"):
        block(x[:, :5])


def test_what_may_compute_something_else_is_left_alone():
    class OwnBlock(timm_swin.SwinTransformerBlock):
        pass

    class OwnAttention(timm_swin.WindowAttention):
        pass

    def block(cls: type[nn.Module] = timm_swin.SwinTransformerBlock) -> nn.Module:
        return cls(24, (8, 8), 3, window_size=4)

    model = nn.ModuleDict({"subclass": block(OwnBlock), "inside": block(), "overridden": block()})
    model["inside"].attn = OwnAttention(24, 3, window_size=4)
    model["overridden"].attn.forward = lambda x, mask=None: x
    model["alone"] = timm_swin.WindowAttention(24, 3, window_size=4)
    report = vk.accelerate(model)
    part = "only fused with the block of timm around it"
    assert not report.replaced
    assert {entry.name: entry.reason for entry in report.stock} == {
        "subclass": "a subclass of timm's SwinTransformerBlock may compute something else",
        "subclass.attn": part,
        "inside": "its attn is a OwnAttention, which may compute something else",
        "inside.attn": "no fused replacement",
        "overridden": "the forward of its attn is overridden on the instance",
        "overridden.attn": part,
        "alone": part,
    }


def test_eager_attention_is_left_alone():
    model, _ = transformers_family("Swin")
    model.set_attn_implementation("eager")
    report = vk.accelerate(model)
    assert not report.replaced
    assert {entry.reason for entry in report.stock} == {
        "its attention implementation is 'eager', only 'sdpa' is replaced"
    }


def test_device_without_kernels_takes_the_stock_path():
    block = timm_swin.SwinTransformerBlock(24, (8, 8), 3, window_size=4, shift_size=2, device="meta")
    (entry,) = vk.accelerate(block).entries
    assert entry.reason == (
        "stock path on meta: no kernels for it; stock path with hooks on attn, attn.softmax or attn.attn_drop"
    )
    with expect_kernel_calls(0):
        assert block(torch.empty(2, 8, 8, 24, device="meta")).shape == (2, 8, 8, 24)
