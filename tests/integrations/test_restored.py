"""``vk.restored``: stock inside, and afterwards what was before."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import vitkernels as vk
from support.model_zoo import (
    KernelCalls,
    expect_kernel_calls,
    output_of,
    randomised,
    timm_family,
    timm_model,
    transformers_family,
    transformers_model,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

timm_attention = pytest.importorskip("timm.layers.attention")
modeling_vit = pytest.importorskip("transformers.models.vit.modeling_vit")


def torchvision_model() -> tuple[nn.Module, Tensor]:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=16)
    return randomised(model.double().eval()), torch.randn(2, 3, 32, 32, dtype=torch.float64)


def torchvision_windows() -> tuple[nn.Module, Tensor]:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.SwinTransformer([4, 4], 12, [2], [2], window_size=[3, 3], stochastic_depth_prob=0.0)
    return randomised(model.double().eval()), torch.randn(2, 3, 24, 24, dtype=torch.float64)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "timm": timm_model,
    "timm Swin": lambda: timm_family("swin_tiny_patch4_window7_224"),
    "torchvision": torchvision_model,
    "torchvision Swin": torchvision_windows,
    "transformers": transformers_model,
    "transformers Swin": lambda: transformers_family("Swin"),
}
every_model = pytest.mark.parametrize("name", MODELS)


def state_of(model: nn.Module) -> list[Any]:
    """What decides how ``model`` computes, and what its owner may hold on to."""
    return [
        (name, module, type(module), sorted(vars(module)), module.training, [*module._forward_hooks],
         [id(p) for p in module.parameters(recurse=False)],
         getattr(getattr(module, "config", None), "_attn_implementation", None))
        for name, module in model.named_modules()
    ]  # fmt: skip


def kernel_calls(model: nn.Module, x: Tensor) -> int:
    with KernelCalls() as recorder:
        output_of(model, x)
    return len(recorder.calls)


@every_model
def test_stock_inside_and_as_before_afterwards(name):
    model, x = MODELS[name]()
    model.register_forward_hook(lambda *_: None)
    stock, expected = state_of(model), output_of(model, x)
    assert len(vk.accelerate(model).replaced) > 1
    accelerated, calls = state_of(model), kernel_calls(model, x)
    assert accelerated != stock and calls > 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        with vk.restored(model):
            assert state_of(model) == stock
            with expect_kernel_calls(0):
                assert torch.equal(output_of(model, x), expected)
        assert state_of(model) == accelerated
        assert kernel_calls(model, x) == calls
    output_of(model, x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(output_of(model, x), expected)
    vk.restore(model)
    assert state_of(model) == stock


@every_model
def test_a_model_that_was_never_accelerated(name):
    model, _ = MODELS[name]()
    stock = state_of(model)
    with vk.restored(model):
        assert state_of(model) == stock
    assert state_of(model) == stock


def test_parts_nested_uses_and_errors():
    model, x = timm_model()
    stock = state_of(model)
    vk.accelerate(model.blocks[1])
    partly = state_of(model)
    with pytest.raises(ValueError, match="of its own"), vk.restored(model):
        assert state_of(model) == stock
        with vk.restored(model.blocks):
            assert state_of(model) == stock
        assert state_of(model) == stock
        raise ValueError("of its own")
    assert state_of(model) == partly
    assert kernel_calls(model, x) == 1
    model.blocks[0] = model.blocks[1]  # one module in two places
    twice = state_of(model)
    with vk.restored(model), expect_kernel_calls(0):
        model(x)
    assert state_of(model) == twice
    assert kernel_calls(model, x) == 2


def test_modules_of_ours_stay():
    model, x = timm_model(depth=1)
    model.blocks.append(nn.Sequential(ours := vk.nn.Attention(192, num_heads=3).double()))
    vk.accelerate(model)
    with vk.restored(model), expect_kernel_calls(1):
        model(x)
    assert type(ours) is vk.nn.Attention
    assert kernel_calls(model, x) == 2


def test_threads():
    """Blocks of several threads: the model is accelerated after the last one, by the same classes."""
    model, x = timm_model()
    vk.accelerate(model)
    before = state_of(model)

    def use():
        for _ in range(100):
            with vk.restored(model):
                list(model.modules())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(use) for _ in range(4)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    assert state_of(model) == before
    assert kernel_calls(model, x) == 2


def test_a_property_that_raises():
    class Own(nn.Module):
        @property
        def config(self):
            raise ValueError("not set yet")

    model, _ = timm_model(depth=1)
    model.own = Own()
    vk.accelerate(model)
    with vk.restored(model):
        pass


def test_takes_modules_alone():
    match = r"vitkernels\.restored: model is a str, takes a torch\.nn\.Module"
    with pytest.raises(RuntimeError, match=match), vk.restored("model"):
        pass


@pytest.mark.parametrize("accelerated", [False, True])
def test_an_implementation_chosen_by_name(accelerated):
    vk.integrations.register_transformers()
    model, x = transformers_model()
    stock, expected = state_of(model), output_of(model, x)
    model.set_attn_implementation("vitkernels")
    if accelerated:
        vk.accelerate(model)
    before = state_of(model)
    with vk.restored(model), expect_kernel_calls(0):
        assert state_of(model) == stock
        assert torch.equal(output_of(model, x), expected)
    assert state_of(model) == before
    assert kernel_calls(model, x) == 2
    vk.restore(model)
    assert model.config._attn_implementation == "vitkernels"


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


def with_parametrization(module: nn.Module) -> None:
    module.sink = nn.Parameter(torch.ones(2, dtype=torch.float64))
    parametrize.register_parametrization(module, "sink", Doubled())


PATHS = {"timm": "blocks.0.attn", "torchvision": "encoder.layers.encoder_layer_0.self_attention"}


@pytest.mark.parametrize("name, path", PATHS.items())
@pytest.mark.parametrize("inside", [False, True])
def test_classes_that_torch_has_derived(name, path, inside):
    model, x = MODELS[name]()
    module = model.get_submodule(path)
    stock_class = type(module)
    vk.accelerate(model)
    fused_class = type(module)
    if not inside:
        with_parametrization(module)
    before = type(module)
    with vk.restored(model), expect_kernel_calls(0):
        if inside:
            with_parametrization(module)
        assert parametrize.type_before_parametrizations(module) is stock_class
        output_of(model, x)
    assert parametrize.type_before_parametrizations(module) is fused_class
    assert inside or type(module) is before
    assert kernel_calls(model, x) == 2
    vk.restore(model)
    parametrize.remove_parametrizations(module, "sink")
    assert type(module) is stock_class


def test_what_is_decided_inside_stays():
    class Own(timm_attention.Attention):
        def forward(self, x, attn_mask=None, is_causal=False):
            return x

    model, x = timm_model()
    vk.accelerate(model.blocks[1])
    with vk.restored(model):
        assert len(vk.accelerate(model).replaced) == 2
    assert kernel_calls(model, x) == 2
    with vk.restored(model):
        model.blocks[0].attn.__class__ = Own
        model.train()
    assert type(model.blocks[0].attn) is Own and model.training
    assert kernel_calls(model, x) == 1

    model, x = transformers_model()
    vk.accelerate(model)
    with vk.restored(model):
        model.set_attn_implementation("eager")
        eager = state_of(model)
    assert state_of(model) == eager


@pytest.mark.parametrize("name", ["timm", "transformers"])
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled(name, in_place):
    """What was compiled outside runs again afterwards, and is not compiled anew."""
    model, x = MODELS[name]()
    expected = output_of(model, x)
    vk.accelerate(model)
    compiled, ran = [], []

    def backend(graph, _):
        ours = "vitkernels" in str(graph.graph)
        compiled.append(ours)

        def run(*args):
            ran.append(ours)
            return graph(*args)

        return run

    torch._dynamo.reset()
    function = model
    if in_place:
        model.compile(backend=backend)
    else:
        function = torch.compile(model, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(output_of(function, x), expected)
        with vk.restored(function):
            torch.testing.assert_close(output_of(function, x), expected)
        torch.testing.assert_close(output_of(function, x), expected)
    assert compiled == [True, False]
    assert ran == [True, False, True]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["timm", "torchvision", "transformers", "timm Swin"])
def test_exports_to_onnx(name, tmp_path, monkeypatch):
    """The exporter with dynamo: the file computes what stock does."""
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")  # read at its import
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = MODELS[name]()
    model, x = model.float(), x.float()
    stock = output_of(model, x)
    vk.accelerate(model)
    calls = kernel_calls(model, x)
    with vk.restored(model):
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    assert kernel_calls(model, x) == calls
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    out = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(out), stock, rtol=1e-4, atol=1e-4 * stock.abs().max().item())


@pytest.mark.filterwarnings("ignore")
def test_torchscript():
    model, x = MODELS["torchvision"]()
    vk.accelerate(model)
    with vk.restored(model):
        expected = model(x)
        scripted = torch.jit.script(model.encoder.layers[0].self_attention)
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)
    assert kernel_calls(model, x) == 2
    torch.testing.assert_close(model(x), expected)
    with expect_kernel_calls(0):
        scripted(*[torch.randn(2, 5, 16, dtype=torch.float64)] * 3)


@pytest.mark.parametrize("name", ["timm", "torchvision", "transformers"])
def test_the_exporter_with_dynamo_names_it(name):
    pytest.importorskip("onnxscript")
    model, x = MODELS[name]()
    vk.accelerate(model)
    remedy = r"torch\.onnx\.export: \w+ is an accelerated module, .*`with vitkernels\.restored\(model\):`"
    with pytest.warns(UserWarning, match=remedy), pytest.raises(RuntimeError, match=r"vitkernels\.attention"):
        torch.onnx.export(model, (x,), dynamo=True, verbose=False)
