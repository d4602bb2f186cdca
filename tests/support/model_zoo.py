"""Small models of timm and transformers with random weights, and what the tests ask of any model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from support.paths import TESTS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# torchvision's wheel may be built for another torch; timm and transformers need only these two schemas of it.
_torchvision = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _torchvision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

DEPTH = 2
TIMM_MODELS = {
    "vit_tiny_patch16_224": 64,
    "deit_tiny_distilled_patch16_224": 64,
    "vit_small_patch14_dinov2": 56,
}
# Model -> image size, options that make it small, its attention modules that are replaced, and those that are not.
TIMM_FAMILIES: dict[str, tuple[int, dict[str, Any], dict[str, int], dict[str, int]]] = {
    "vit_base_patch16_siglip_224": (
        64, {"depth": 1, "embed_dim": 96, "num_heads": 3, "img_size": 64},
        {"Attention": 1, "AttentionPoolLatent": 1}, {},
    ),
    "vit_base_patch16_xp_224": (
        64, {"depth": 1, "embed_dim": 96, "num_heads": 3, "img_size": 64}, {"ParallelScalingBlock": 1}, {},
    ),
    "vit_dpwee_patch16_reg1_gap_256": (64, {"depth": 1, "img_size": 64}, {"DiffParallelScalingBlock": 1}, {}),
    "vit_dwee_patch16_reg1_gap_256": (64, {"depth": 1, "img_size": 64}, {"DiffAttention": 1}, {}),
    "vit_small_patch16_rope_224": (64, {"depth": 1, "img_size": 64}, {"AttentionRope": 1}, {}),
    "vit_small_patch16_rope_mixed_224": (64, {"depth": 1, "img_size": 64}, {"AttentionRope": 1}, {}),
    "vit_pe_core_tiny_patch16_384": (
        64, {"depth": 1, "img_size": 64}, {"AttentionRope": 1, "AttentionPoolLatent": 1}, {},
    ),
    "vit_small_patch16_dinov3": (64, {"depth": 1, "img_size": 64}, {"EvaAttention": 1}, {}),
    "eva_giant_patch14_224": (
        56, {"depth": 1, "embed_dim": 64, "num_heads": 2, "img_size": 56}, {"EvaAttention": 1}, {},
    ),
    "eva02_tiny_patch14_224": (56, {"depth": 1, "img_size": 56}, {"EvaAttention": 1}, {}),
    "gemma4_vit_167m_enc": (96, {"depth": 1, "embed_dim": 96, "num_heads": 3}, {"Gemma4Attention": 1}, {}),
    "naflexvit_base_patch16_gap": (64, {"depth": 1, "embed_dim": 96, "num_heads": 3}, {"Attention": 1}, {}),
    "beit_base_patch16_224": (
        64, {"depth": 2, "embed_dim": 96, "num_heads": 3, "img_size": 64}, {"Attention": 2}, {},
    ),
    "vit_relpos_small_patch16_224": (
        64, {"depth": 1, "embed_dim": 96, "num_heads": 3, "img_size": 64}, {"RelPosAttention": 1}, {},
    ),
    "vit_srelpos_small_patch16_224": (
        64, {"depth": 2, "embed_dim": 96, "num_heads": 3, "img_size": 64}, {"RelPosAttention": 2}, {},
    ),
    "cait_xxs24_224": (64, {"depth": 1, "img_size": 64}, {"ClassAttn": 2}, {"TalkingHeadAttn": 1}),
    "xcit_nano_12_p16_224": (64, {"depth": 1}, {"ClassAttn": 2, "XCA": 1}, {}),
    "crossvit_tiny_240": (
        240, {"depth": ((1, 1, 0),), "embed_dim": (24, 48)}, {"Attention": 2, "CrossAttention": 2}, {},
    ),
    "convit_tiny": (64, {"depth": 2, "local_up_to_layer": 1, "img_size": 64}, {"GPSA": 1, "MHSA": 1}, {}),
    "tnt_s_patch16_224": (64, {"depth": 1, "img_size": 64}, {"Attention": 2}, {}),
    "pit_ti_224": (64, {"depth": (1, 1, 1), "img_size": 64}, {"Attention": 3}, {}),
    "hiera_tiny_224": (
        64, {"embed_dim": 32, "stages": (1, 1, 2, 1), "img_size": 64},
        {"MaskUnitAttention": 2}, {"MaskUnitAttention": 3},
    ),
    "mvitv2_tiny": (64, {"img_size": 64}, {"MultiScaleAttention": 10}, {}),
    "samvit_base_patch16_224": (
        80, {"depth": 2, "embed_dim": 48, "num_heads": 2, "img_size": 80, "window_size": 3,
             "global_attn_indexes": (1,)},
        {"Attention": 2}, {},
    ),
    "sam2_hiera_tiny": (64, {"embed_dim": 32, "stages": (1, 1, 2, 1)}, {"MultiScaleAttention": 5}, {}),
    "volo_d1_224": (32, {"img_size": 32}, {"Attention": 14, "ClassAttention": 2}, {"OutlookAttention": 4}),
    "levit_128s": (128, {"img_size": 128}, {"Attention": 9, "AttentionDownsample": 2}, {}),
    "levit_conv_128s": (128, {"img_size": 128}, {"Attention": 9, "AttentionDownsample": 2}, {}),
    "pvt_v2_b0": (64, {"depths": (1, 1, 1, 1)}, {"Attention": 4}, {}),
    "pvt_v2_b2_li": (64, {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 160, 256)}, {"Attention": 4}, {}),
    "twins_svt_small": (
        64, {"depths": (2, 2, 2, 2), "embed_dims": (16, 32, 64, 128), "img_size": 64},
        {"GlobalSubSampleAttn": 4, "LocallyGroupedAttn": 4}, {},
    ),
    "nextvit_small": (
        64, {"depths": (1, 1, 5, 1)}, {"EfficientAttention": 3}, {"ConvAttention": 8},
    ),
    "efficientformer_l1": (224, {"depths": (1, 1, 1, 2)}, {"Attention": 1}, {}),
    "efficientformerv2_s0": (
        64, {"depths": (1, 1, 2, 2), "img_size": 64}, {"Attention2dDownsample": 1}, {"Attention2d": 4},
    ),
    "visformer_tiny": (64, {"depth": (1, 1, 1), "img_size": 64}, {"Attention": 2}, {}),
    "mobilevit_xxs": (64, {}, {"Attention": 9}, {}),
    "fastvit_sa12": (64, {"layers": (1, 1, 1, 1)}, {"Attention": 1}, {}),
    "iformer_t": (64, {}, {"SHMA": 5}, {}),
    "cpubone_nano": (64, {}, {"ConvAttention": 3}, {}),
    "lowformer_b0": (64, {}, {"ConvAttention": 7}, {}),
    "mobilenetv4_hybrid_medium": (64, {}, {"MultiQueryAttention2d": 8}, {}),
    "coatnet_pico_rw_224": (64, {"img_size": 64}, {"Attention2d": 7}, {}),
    "caformer_s18": (64, {}, {"Attention": 12}, {}),
    "resnet50_clip": (64, {}, {"AttentionPool2d": 1}, {}),
    "davit_tiny": (
        72, {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (2, 3)},
        {"SpatialBlock": 2, "ChannelAttention": 2}, {},
    ),
    "edgenext_xx_small": (64, {}, {"CrossCovarianceAttn": 3}, {}),
    "efficientvit_b0": (64, {}, {}, {"LiteMLA": 4}),
    "tiny_vit_5m_224": (
        96, {"depths": (1, 2, 1), "embed_dims": (16, 32, 64), "num_heads": (1, 2, 4), "window_sizes": (7, 7, 7)},
        {"TinyVitBlock": 3}, {},
    ),
    "maxvit_pico_rw_256": (64, {"img_size": 64}, {"PartitionAttentionCl": 22}, {}),
    "maxvit_tiny_tf_224": (
        96, {"img_size": 96, "depths": (1, 1), "embed_dim": (32, 64), "stem_width": 16},
        {"PartitionAttentionCl": 4}, {},
    ),
    "swin_tiny_patch4_window7_224": (
        56, {"depths": (2, 1), "num_heads": (3, 3), "embed_dim": 24, "img_size": 56}, {"SwinTransformerBlock": 3}, {},
    ),
    "swin_s3_tiny_224": (  # maps of 18 x 18 and 9 x 9, which windows of 7 do not fit
        72, {"depths": (2, 2), "num_heads": (3, 3), "embed_dim": 24, "img_size": 72, "window_size": (7, 7)},
        {"SwinTransformerBlock": 4}, {},
    ),
    "swinv2_tiny_window8_256": (
        64, {"depths": (2, 1), "num_heads": (3, 3), "embed_dim": 24, "img_size": 64}, {"SwinTransformerV2Block": 3}, {},
    ),
    "swinv2_cr_tiny_224": (
        32, {"depths": (1, 1), "num_heads": (3, 3), "embed_dim": 24, "img_size": 32, "window_size": (4, 4)},
        {}, {"WindowMultiHeadAttention": 2},
    ),
}  # fmt: skip
# Models whose attention goes through the registry, with the options that the tests set.
TRANSFORMERS_MODELS: dict[str, dict[str, Any]] = {
    "ViT": {}, "DeiT": {}, "Dinov2": {}, "Dinov2WithRegisters": {}, "IJepa": {},
    "Beit": {"use_relative_position_bias": True},
    "DINOv3ViT": {"num_register_tokens": 2},
    "CLIPVision": {},
    "SiglipVision": {"vision_use_head": False},
    "ViTMAE": {"mask_ratio": 0.5},
}  # fmt: skip
# Models whose attention does not, and which of its classes are replaced.
TRANSFORMERS_FAMILIES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "Cvt": (
        {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}, {"CvtSelfAttention": 6},
    ),
    "Pvt": (
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4]},
        {"PvtEfficientSelfAttention": 4},
    ),
    "PvtV2": (
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4]},
        {"PvtV2SelfAttention": 4},
    ),
    "PvtV2 linear": (
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4],
         "linear_attention": True},
        {"PvtV2SelfAttention": 4},
    ),
    "Swin": ({"embed_dim": 12, "depths": [2, 1], "num_heads": [2, 3], "window_size": 4}, {"SwinLayer": 3}),
    "Swin padded": ({"embed_dim": 12, "depths": [2, 1], "num_heads": [2, 3], "window_size": 5}, {"SwinLayer": 3}),
    "Swinv2": ({"embed_dim": 12, "depths": [2, 1], "num_heads": [2, 3], "window_size": 4}, {"Swinv2Layer": 3}),
    "Swinv2 padded": (
        {"embed_dim": 12, "depths": [2, 1], "num_heads": [2, 3], "window_size": 5, "pretrained_window_sizes": [3, 3]},
        {"Swinv2Layer": 3},
    ),
}  # fmt: skip


def timm_model(name: str = "vit_tiny_patch16_224", **overrides: Any) -> tuple[nn.Module, Tensor]:
    """A float64 model in eval mode and a batch of images for it."""
    import timm

    torch.manual_seed(0)
    size = TIMM_MODELS[name]
    options = {"img_size": size, "depth": DEPTH, "num_classes": 10, **overrides}
    model = timm.create_model(name, **options).double().eval()
    return randomised(model), torch.randn(2, 3, size, size, dtype=torch.float64)


def timm_family(name: str) -> tuple[nn.Module, Tensor]:
    """A small float64 model of ``TIMM_FAMILIES`` in eval mode and a batch of images for it."""
    import timm

    torch.manual_seed(0)
    size, options, _, _ = TIMM_FAMILIES[name]
    model = timm.create_model(name, num_classes=5, **options).double()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        # Constants and tiny initial values would hide errors. With more noise than this, or with running statistics
        # that are not those of the images, a deep network amplifies the rounding to the size of its output.
        for parameter in model.parameters():
            if parameter.dim() < 2 or parameter.std() < 1e-3:
                parameter.add_(0.1 * torch.randn_like(parameter))
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = None
            norm.reset_running_stats()
        if norms:
            model.train()(images)
    return model.eval(), images


def transformers_model(name: str = "ViT", **overrides: Any) -> tuple[nn.Module, Tensor]:
    """A float64 model in eval mode and a batch of images for it."""
    import transformers

    torch.manual_seed(0)
    options = {
        "hidden_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 3, "intermediate_size": 96,
        "image_size": 32, "patch_size": 8, **TRANSFORMERS_MODELS[name], **overrides,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}Model")(config).double().eval()
    return randomised(model), torch.randn(2, 3, 32, 32, dtype=torch.float64)


def transformers_family(name: str) -> tuple[nn.Module, Tensor]:
    """A small float64 classifier of ``TRANSFORMERS_FAMILIES`` in eval mode and a batch of images for it."""
    import transformers

    torch.manual_seed(0)
    options, library_name = TRANSFORMERS_FAMILIES[name][0], name.partition(" ")[0]
    config = getattr(transformers, f"{library_name}Config")(image_size=64, num_labels=5, **options)
    model = getattr(transformers, f"{library_name}ForImageClassification")(config).double().eval()
    return randomised(model), torch.randn(2, 3, 64, 64, dtype=torch.float64)


def randomised(model: nn.Module) -> nn.Module:
    """Noise on every parameter: fresh biases and layer scales are so small that errors would hide in them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def output_of(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> Tensor:
    """The features or logits of a model of either library."""
    if getattr(getattr(model, "config", None), "mask_ratio", None):  # patches masked at random
        torch.manual_seed(1)
    out = model(*inputs, **kwargs)
    if isinstance(out, tuple):  # of a module
        out = out[0]
    if isinstance(out, Tensor):
        return out
    return out.logits if "logits" in out else out.last_hidden_state


def outputs_and_gradients(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """The output and the gradient of every parameter that has one, by name, in float64."""
    model.zero_grad()
    out = output_of(model, *inputs, **kwargs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.double() * weight.to(out.device)).sum().backward()
    named = {"output": out.detach()}
    named |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: t.double().clone() for name, t in named.items()}


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """The same tensors by name, to ``tolerance`` relative to the largest element of each."""
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (ours[name] - tensor).abs().max().item()
        assert error <= tolerance * (1.0 + tensor.abs().max().item()), f"{name}: {error}"


Named = dict[str, Tensor]


def assert_policy(ours: Named, stock: Named, truth: Named, eps: float) -> None:
    """Our error against float64 is at most twice stock's (thrice for gradients) plus 2 eps of the largest."""
    assert ours.keys() == stock.keys() == truth.keys()
    for name, exact in truth.items():
        factor = 2 if name == "output" else 3
        error, reference = ((t[name] - exact).abs().max().item() for t in (ours, stock))
        bound = factor * reference + 2 * eps * exact.abs().max().item()
        assert error <= bound, f"{name}: error {error}, stock {reference}, bound {bound}"


_FORWARD_KERNELS = {f"vitkernels::{name}attention" for name in ("", "channel_", "spatial_")}


class KernelCalls(TorchDispatchMode):
    """Records the arguments of the calls of the forward kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _FORWARD_KERNELS:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


@contextmanager
def expect_kernel_calls(number: int) -> Iterator[KernelCalls]:
    """Fail unless the attention kernels run ``number`` times inside."""
    with KernelCalls() as recorder:
        yield recorder
    assert len(recorder.calls) == number


class LowRankLinear(nn.Module):
    """A LoRA-like stand-in for a Linear: calling it differs from multiplying with a weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(4, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def add_low_rank(model: nn.Module, is_target: Callable[[str], bool]) -> int:
    """Replace the Linears whose names satisfy ``is_target``; returns how many there were."""
    targets = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and is_target(name)]
    for name in targets:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LowRankLinear(model.get_submodule(name)))
    return len(targets)


def run_python(program: str, *arguments: str) -> None:
    """Run ``program`` in a fresh process, in the folder of the tests."""
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=TESTS, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
