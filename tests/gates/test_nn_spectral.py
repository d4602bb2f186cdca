"""The layer of spectral gating: its parameter, both layouts of its input, and errors."""

import pytest
import torch
import vitkernels as vk
from vitkernels.nn import SpectralGating


def test_both_layouts_are_the_same_layer():
    layer, x = SpectralGating(10, 5, 6), torch.randn(2, 5, 6, 10)
    out = layer(x)
    assert torch.equal(out, vk.spectral_gating(x, layer.complex_weight)) and out.shape == x.shape
    assert torch.equal(layer(x.flatten(1, 2)), out.flatten(1, 2))


def test_parameter():
    """Its name, shape and scale are those of GFNet's layer."""
    torch.manual_seed(0)
    layer = SpectralGating(384)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {"complex_weight": (14, 8, 384, 2)}
    assert layer.complex_weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(layer.complex_weight.mean().item()) < 1e-3
    assert repr(layer) == "SpectralGating(dim=384, height=14, width=14)"


def test_autocast_keeps_the_parameter():
    layer, x = SpectralGating(10, 5, 6), torch.randn(2, 5, 6, 10)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert torch.equal(out, vk.spectral_gating(x.bfloat16(), layer.complex_weight))
    out.float().sum().backward()
    assert layer.complex_weight.grad.dtype == torch.float32


TAKES = r"takes \(B, 5, 6, 10\) or \(B, 30, 10\): a map of 5 x 6 and 10 channels"


@pytest.mark.parametrize(
    "shape", [(2, 6, 5, 10), (2, 31, 10), (2, 5, 6, 9), (30, 10), (2, 2, 5, 6, 10), (2, 30, 1, 10)]
)
def test_another_size_names_both(shape):
    text = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(RuntimeError, match=rf"^vitkernels\.nn\.SpectralGating: x has shape {text}, {TAKES}$"):
        SpectralGating(10, 5, 6)(torch.zeros(shape))


@pytest.mark.parametrize("name", ["dim", "height", "width"])
@pytest.mark.parametrize("value", [0, 2.0, True])
def test_sizes_are_checked(name, value):
    with pytest.raises(RuntimeError, match=rf"^vitkernels\.nn\.SpectralGating: {name} is {value}, takes an integer"):
        SpectralGating(**{"dim": 4, "height": 3, "width": 3} | {name: value})
