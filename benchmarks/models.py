"""Entries of whole models: stock against the same model after ``vitkernels.accelerate``."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable

import torch
import vitkernels as vk
from torch import Tensor, nn

from benchmarks.registry import OURS, Call, Entry, Inputs, Peer, Target, Unavailable, register

_DIM, _DEPTH = 384, 12  # of ViT-S
_PARAMETERS = 12 * _DEPTH * _DIM**2  # in the matmuls of the blocks: 4 in attention, 8 in the MLP
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


def _vit_small() -> nn.Module:
    return _import("timm").create_model("vit_small_patch16_224")


def _inputs(model: Callable[[], nn.Module], batch: int, pixels: int) -> Callable[[torch.dtype, torch.device], Inputs]:
    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        torch.manual_seed(0)
        image = torch.randn(batch, 3, pixels, pixels)
        return {"model": model().eval().to(device, dtype), "image": image.to(device, dtype)}

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


def _entry(mode: str, name: str, model: Callable[[], nn.Module], batch: int, pixels: int, patch: int) -> Entry:
    backward = mode == "backward"
    wrap = _backward if backward else _forward
    tokens = (pixels // patch) ** 2 + 1
    embedding = 3 * patch**2 * _DIM
    linear = 2.0 * batch * tokens * (_PARAMETERS + embedding)
    attention = 4.0 * batch * _DEPTH * tokens**2 * _DIM
    return Entry(
        name=f"models/{mode}/{name}-b{batch}-{pixels}",
        inputs=_inputs(model, batch, pixels),
        peers=(Peer(OURS, wrap(_accelerated)), Peer("stock", wrap(_stock))),
        # Backward: each linear layer again for its input and its weight, attention as five products for two.
        flops=3 * linear + 3.5 * attention if backward else linear + attention,
        elements=(3 if backward else 1) * (_PARAMETERS + embedding) + batch * 3 * pixels**2,
    )


_DINOV2_224 = _entry("forward", "dinov2-s14", _dinov2, 1, 224, 14)
_DINOV2_518 = _entry("forward", "dinov2-s14", _dinov2, 1, 518, 14)

register(
    _DINOV2_224,
    _DINOV2_518,
    _entry("forward", "timm-vit-s16", _vit_small, 8, 224, 16),
    _entry("backward", "timm-vit-s16", _vit_small, 8, 224, 16),
    Target("DINOv2 ViT-S/14 forward, 224 pixels", (_DINOV2_224.name,), each_at_least=1.03),
    Target("DINOv2 ViT-S/14 forward, 518 pixels", (_DINOV2_518.name,), each_at_least=1.06),
)
