"""Small models of timm and transformers with random weights, and what the tests ask of any model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
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
TRANSFORMERS_MODELS = ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters")


def timm_model(name: str = "vit_tiny_patch16_224", **overrides: Any) -> tuple[nn.Module, Tensor]:
    """A float64 model in eval mode and a batch of images for it."""
    import timm

    torch.manual_seed(0)
    size = TIMM_MODELS[name]
    options = {"img_size": size, "depth": DEPTH, "num_classes": 10, **overrides}
    model = timm.create_model(name, **options).double().eval()
    return randomised(model), torch.randn(2, 3, size, size, dtype=torch.float64)


def transformers_model(name: str = "ViT", **overrides: Any) -> tuple[nn.Module, Tensor]:
    """A float64 model in eval mode and a batch of images for it."""
    import transformers

    torch.manual_seed(0)
    options = {
        "hidden_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 3, "intermediate_size": 96,
        "image_size": 32, "patch_size": 8, **overrides,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}Model")(config).double().eval()
    return randomised(model), torch.randn(2, 3, 32, 32, dtype=torch.float64)


def randomised(model: nn.Module) -> nn.Module:
    """Noise on every parameter: fresh biases and layer scales are so small that errors would hide in them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def output_of(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> Tensor:
    """The features or logits of a model of either library."""
    out = model(*inputs, **kwargs)
    return out if isinstance(out, Tensor) else out.last_hidden_state


def outputs_and_gradients(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """The output and the gradient of every parameter that has one, by name, in float64."""
    model.zero_grad()
    out = output_of(model, *inputs, **kwargs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.double() * weight).sum().backward()
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


class KernelCalls(TorchDispatchMode):
    """Records the arguments of the calls of the forward kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.vitkernels.attention.default:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


@contextmanager
def expect_kernel_calls(number: int) -> Iterator[KernelCalls]:
    """Fail unless the attention kernel runs ``number`` times inside."""
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
