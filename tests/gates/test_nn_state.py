"""Modules copied, pickled, emptied and loaded: they compute what the original does."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Container

import pytest
import torch
from support.nn_modules import MODULES, PAIRS
from torch import Tensor, nn

ROWS = MODULES | PAIRS


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
        return ROWS[name]()[0]


def poison(module: nn.Module, but: Container[str] = ()) -> None:
    """As foreign memory may be; ``but`` stay."""
    for name, buffer in module.named_buffers():
        if name not in but:
            buffer.fill_(torch.nan if buffer.is_floating_point() else -1)


def loaded(name: str, state: dict[str, Tensor]) -> nn.Module:
    """Emptied, then loaded."""
    module = on_meta(name).to_empty(device="cpu")
    poison(module)
    module.load_state_dict(state)
    return module


def assigned(name: str, state: dict[str, Tensor]) -> nn.Module:
    module = on_meta(name)
    module.load_state_dict(state, assign=True)
    return module


def emptied(name: str, state: dict[str, Tensor]) -> nn.Module:
    """By one who fills what files hold without ``load_state_dict``."""
    module = on_meta(name).to_empty(device="cpu")
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    for tensor_name, tensor in state.items():
        held[tensor_name].data.copy_(tensor)
    return module


def reinitialised(name: str, state: dict[str, Tensor]) -> nn.Module:
    """As timm does after it has loaded into an empty model."""
    manipulate = pytest.importorskip("timm.models._manipulate")
    module = emptied(name, state)
    poison(module, but=state)
    manipulate.reinit_non_persistent_buffers(module)
    return module


RESTORED = {"to_empty": loaded, "assign": assigned, "parameters": emptied, "timm": reinitialised}


def made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    module, *shapes = ROWS[name]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval(), tuple(torch.randn(shape) for shape in shapes)


def called(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    outputs = module(*inputs)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def same(twin: nn.Module, module: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, called(twin, inputs), called(module, inputs)))


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("name", ROWS)
def test_copies(name, copied):
    module, inputs = made(name)
    twin = copied(module)
    assert same(twin, module, inputs)
    if twin.state_dict():
        nn.init.zeros_(next(twin.parameters()))
    twin.load_state_dict(module.state_dict())
    assert same(twin, module, inputs)


@pytest.mark.parametrize("restored", RESTORED.values(), ids=RESTORED)
@pytest.mark.parametrize("name", ROWS)
def test_computed_buffers_are_restored(name, restored):
    module, inputs = made(name)
    twin = restored(name, module.state_dict()).eval()
    assert same(twin, module, inputs)


@pytest.mark.parametrize("name", ROWS)
def test_no_batch(name):
    module, inputs = made(name)
    outputs = called(module, tuple(x[:0].requires_grad_() for x in inputs))
    for out, full in zip(outputs, called(module, inputs), strict=True):
        assert out.shape == (0, *full.shape[1:])
    sum(out.sum() for out in outputs).backward()


@pytest.mark.parametrize("name", ROWS)
def test_images_do_not_see_one_another(name):
    """A batch of one has the result that it has among others, in evaluation."""
    module, inputs = made(name)
    together, alone = (called(module, tuple(x[:n] for x in inputs)) for n in (2, 1))
    torch.testing.assert_close([out[:1] for out in together], alone)
