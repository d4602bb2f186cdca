"""Entries of whole models: stock against the same model after ``vitkernels.accelerate``."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.ours import vk
from benchmarks.registry import OURS, Call, Entry, Inputs, Peer, Target, Unavailable, register

_DIM, _DEPTH = 384, 12  # of ViT-S
_ALL_DTYPES = ("float32", "bfloat16", "float16")
_LAYER_SCALE = 1e-2  # vectors of a constant up to this are the initial values of layer scales
_OPERATORS = ("attention", "attention_varlen", "attention_transposed", "spatial_attention", "merge_attentions")
_schemas: list[torch.library.Library] = []


def _import(name: str) -> object:
    """Import a model library.

    Both import torchvision, whose wheels refuse to load beside another build of torch for want of two
    operators that the models here never call: then their schemas are enough.
    """
    try:
        if not _schemas:
            importlib.import_module("torchvision")
    except ImportError as error:
        raise Unavailable(f"{name}: {error}") from error
    except RuntimeError:
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.append(library)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name}: {error}") from error


def _dinov2() -> nn.Module:
    transformers = _import("transformers")
    config = transformers.Dinov2Config(
        hidden_size=_DIM, num_hidden_layers=_DEPTH, num_attention_heads=6, image_size=518, patch_size=14
    )
    return transformers.Dinov2Model(config)


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: _import("timm").create_model(name)


def show_attention(model: nn.Module) -> nn.Module:
    """Change initial values that would hide the attention and its errors: layer scales, factors of zero."""
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.numel()):
            low, high = parameter.aminmax()
            if parameter.dim() == 1 and 0.0 < low == high <= _LAYER_SCALE:
                parameter.fill_(1.0)
            elif parameter.dim() > 1 and low == high == 0.0:
                nn.init.normal_(parameter, std=0.02)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and not module.weight.any():
                module.weight.fill_(1.0)
    return model


def without_attention(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``forward`` with operators of ours that return at once what they returned in a pass before."""
    module = vars(vk.ops.attention)  # where functions look their operators up
    operators = {name: module[name] for name in _OPERATORS}
    results: list[object] = []

    def recorded(operator: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            results.append(operator(*args))
            return results[-1]

        return call

    def run_with(replacements: dict[str, Callable[..., object]]) -> Tensor:
        module.update(replacements)
        try:
            return forward()
        finally:
            module.update(operators)

    def replay() -> Tensor:
        rest = iter(results)
        return run_with(dict.fromkeys(operators, lambda *args: next(rest)))

    out = run_with({name: recorded(operator) for name, operator in operators.items()})
    if not torch.equal(replay(), out):
        raise RuntimeError("a pass with recorded attention gave another result")
    return replay


def _inputs(model: Callable[[], nn.Module], batch: int, pixels: int) -> Callable[[torch.dtype, torch.device], Inputs]:
    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        torch.manual_seed(0)
        image = torch.randn(batch, 3, pixels, pixels)
        return {"model": show_attention(model()).eval().to(device, dtype), "image": image.to(device, dtype)}

    return make


def _stock(model: nn.Module) -> nn.Module:
    return model


def _accelerated(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    report = vk.accelerate(model)
    if not report.replaced:
        raise Unavailable(f"accelerate replaced nothing: {report}")
    return model


def _result(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.last_hidden_state


def _forward(change: Callable[[nn.Module], nn.Module]) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        model = change(inputs["model"])

        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (_result(model(inputs["image"])),)

        return call

    return prepare


def _backward(change: Callable[[nn.Module], nn.Module]) -> Callable[[Inputs], Call]:
    """Forward, then the gradients of all parameters."""

    def prepare(inputs: Inputs) -> Call:
        model = change(inputs["model"])
        parameters = list(model.parameters())

        def call() -> tuple[Tensor, ...]:
            out = _result(model(inputs["image"]))
            return (out.detach(), *torch.autograd.grad(out.square().mean(), parameters))

        return call

    return prepare


@dataclass(frozen=True)
class _Work:
    """Operations of the forward pass for one image, and the numbers in the weights."""

    linear: float
    attention: float
    parameters: float

    @classmethod
    def of_vit_small(cls, pixels: int, patch: int) -> _Work:
        tokens = (pixels // patch) ** 2 + 1
        parameters = 12 * _DEPTH * _DIM**2 + 3 * patch**2 * _DIM  # in a block 4 of attention, 8 of the MLP
        return cls(2.0 * tokens * parameters, 4.0 * _DEPTH * tokens**2 * _DIM, parameters)


def _entry(
    mode: str,
    name: str,
    model: Callable[[], nn.Module],
    batch: int,
    pixels: int,
    work: _Work,
    dtypes: tuple[str, ...] = ("float32",),
    *,
    on_gpu: bool = False,
) -> Entry:
    """``on_gpu``: for a GPU alone, with the host's part of the time, as users have it."""
    backward = mode == "backward"
    wrap = _backward if backward else _forward
    linear, attention = batch * work.linear, batch * work.attention
    return Entry(
        name=f"{'gpu/' if on_gpu else ''}models/{mode}/{name}-b{batch}-{pixels}",
        inputs=_inputs(model, batch, pixels),
        peers=(Peer(OURS, wrap(_accelerated)), Peer("stock", wrap(_stock))),
        # Backward: each linear layer again for its input and its weight, attention as five products for two.
        flops=3 * linear + 3.5 * attention if backward else linear + attention,
        elements=(3 if backward else 1) * work.parameters + batch * 3 * pixels**2,
        dtypes=dtypes,
        devices=("cuda",) if on_gpu else ("cpu", "cuda"),
        replayed=False,
    )


_DINOV2_224 = _entry("forward", "dinov2-s14", _dinov2, 1, 224, _Work.of_vit_small(224, 14))
_DINOV2_518 = _entry("forward", "dinov2-s14", _dinov2, 1, 518, _Work.of_vit_small(518, 14), _ALL_DTYPES)
_VIT, _VIT_WORK = _timm("vit_small_patch16_224"), _Work.of_vit_small(224, 16)
_VIT_224 = _entry("forward", "timm-vit-s16", _VIT, 8, 224, _VIT_WORK, _ALL_DTYPES)

register(
    _DINOV2_224,
    _DINOV2_518,
    _VIT_224,
    _entry("backward", "timm-vit-s16", _VIT, 8, 224, _VIT_WORK),
    Target("DINOv2 ViT-S/14 forward, 224 pixels", (_DINOV2_224.name,), each_at_least=1.03),
    Target("DINOv2 ViT-S/14 forward, 518 pixels", (_DINOV2_518.name,), each_at_least=1.06),
    *(
        Target(f"ViT-S/16 and DINOv2 ViT-S/14 at 518 pixels, {d}", (_VIT_224.name, _DINOV2_518.name), dtype=d,
               each_at_least=1.0)
        for d in _ALL_DTYPES
    ),
)  # fmt: skip

register(
    _entry("forward", "timm-vit-s16", _VIT, 128, 224, _VIT_WORK, ("bfloat16", "float32"), on_gpu=True),
    _entry("backward", "timm-vit-s16", _VIT, 128, 224, _VIT_WORK, ("bfloat16",), on_gpu=True),
    _entry("forward", "dinov2-s14", _dinov2, 32, 518, _Work.of_vit_small(518, 14), ("bfloat16",), on_gpu=True),
    _entry("backward", "dinov2-s14", _dinov2, 16, 518, _Work.of_vit_small(518, 14), ("bfloat16",), on_gpu=True),
)

# The smallest of families whose attention has few tokens, or is not fused in timm. Operations as
# torch.utils.flop_counter counts them.
for _label, _name, _pixels, _work in (
    ("LeViT-128S", "levit_128s", 224, _Work(0.61e9, 0.0, 7.7e6)),
    ("EfficientFormer-L1", "efficientformer_l1", 224, _Work(2.58e9, 0.0, 12.2e6)),
    ("CrossViT-Ti", "crossvit_tiny_240", 240, _Work(2.58e9, 0.0, 7.0e6)),
):
    _small = _entry(
        "forward", f"timm-{_name.replace('_', '-')}", _timm(_name), 8, _pixels, _work, ("float32", "bfloat16")
    )
    register(_small, Target(f"{_label} forward", (_small.name,), each_at_least=1.1))
