"""Modules copied, pickled, emptied and loaded: they compute what the original does."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.nn_modules import MODULES
from torch import Tensor, nn


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_float64(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double().float()


COPIES = {
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
    "to": through_float64,
}


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODULES[name]()[0]


def loaded(name: str, state: dict[str, Tensor]) -> nn.Module:
    """Emptied, with what no file holds filled with NaN as foreign memory may be, then loaded."""
    module = on_meta(name).to_empty(device="cpu")
    for buffer in module.buffers():
        buffer.fill_(torch.nan)
    module.load_state_dict(state)
    return module


def assigned(name: str, state: dict[str, Tensor]) -> nn.Module:
    module = on_meta(name)
    module.load_state_dict(state, assign=True)
    return module


def emptied(name: str, state: dict[str, Tensor]) -> nn.Module:
    """By one who fills the parameters without ``load_state_dict``."""
    module = on_meta(name).to_empty(device="cpu")
    for parameter_name, parameter in module.named_parameters():
        parameter.data.copy_(state[parameter_name])
    return module


def reinitialised(name: str, state: dict[str, Tensor]) -> nn.Module:
    """As timm does after it has loaded into an empty model."""
    manipulate = pytest.importorskip("timm.models._manipulate")
    module = emptied(name, state)
    for buffer in module.buffers():
        buffer.fill_(torch.nan)
    manipulate.reinit_non_persistent_buffers(module)
    return module


RESTORED = {"to_empty": loaded, "assign": assigned, "parameters": emptied, "timm": reinitialised}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    module, shape = MODULES[name]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval(), torch.randn(shape)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("name", MODULES)
def test_copies(name, copied):
    module, x = made(name)
    twin = copied(module)
    assert torch.equal(twin(x), module(x))
    if twin.state_dict():
        nn.init.zeros_(next(twin.parameters()))
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize("restored", RESTORED.values(), ids=RESTORED)
@pytest.mark.parametrize("name", MODULES)
def test_computed_buffers_are_restored(name, restored):
    module, x = made(name)
    twin = restored(name, module.state_dict()).eval()
    assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize("name", MODULES)
def test_no_batch(name):
    module, x = made(name)
    out = module(x[:0].requires_grad_())
    assert out.shape == (0, *module(x).shape[1:])
    out.sum().backward()
