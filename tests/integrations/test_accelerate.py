"""``vk.accelerate`` and ``vk.restore`` on models that torch, or somebody's own code, has changed."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import vitkernels as vk
from support.model_zoo import (
    assert_close,
    expect_kernel_calls,
    outputs_and_gradients,
    timm_family,
    timm_model,
    transformers_model,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

timm_attention = pytest.importorskip("timm.layers.attention")


def multihead_model() -> tuple[nn.Module, torch.Tensor]:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(24, 3, batch_first=True, dtype=torch.float64)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    return Block(), torch.randn(2, 5, 24, dtype=torch.float64)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


# Name -> model and input, path of its attention, the attention's class, and a tensor of the attention itself.
MODELS = {
    "timm": (lambda: timm_model(depth=1), "blocks.0.attn", timm_attention.Attention, None),
    "torch": (multihead_model, "attention", nn.MultiheadAttention, "in_proj_weight"),
}
every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_parametrized_after_accelerate(name):
    build, path, stock_class, tensor = MODELS[name]
    model, x = build()
    stock = outputs_and_gradients(model, x)["output"]
    module = model.get_submodule(path)
    first = vk.accelerate(model)
    if tensor is None:
        module.register_parameter(tensor := "sink", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    parametrize.register_parametrization(module, tensor, Doubled())
    with expect_kernel_calls(1):
        assert vk.accelerate(model) == first
        assert_close({"output": model(x)}, {"output": stock})
    vk.restore(model)
    with expect_kernel_calls(0):
        assert_close({"output": model(x)}, {"output": stock})
    assert parametrize.type_before_parametrizations(module) is stock_class
    assert type(module).__name__ == f"Parametrized{stock_class.__name__}"
    parametrize.remove_parametrizations(module, tensor)
    assert type(module) is stock_class


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped")
@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
@every_model
def test_fully_sharded_after_accelerate(name, one_process):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    build, path, stock_class, _ = MODELS[name]
    model, x = build()
    stock = model(x)
    module = model.get_submodule(path)
    vk.accelerate(model)
    fully_shard(module, mesh=dist.init_device_mesh("cpu", (1,)))
    with expect_kernel_calls(1):
        (entry,) = vk.accelerate(model).replaced
        torch.testing.assert_close(model(x), stock, rtol=1e-10, atol=1e-10)
    assert entry.name == path
    vk.restore(model)
    assert isinstance(module, FSDPModule)
    assert type(module).__mro__[2] is stock_class
    with expect_kernel_calls(0):
        assert torch.equal(model(x), stock)


def test_what_changes_after_accelerate_is_undone_by_the_next():
    model, _ = multihead_model()
    vk.accelerate(model)
    model.attention.forward = lambda *args, **kwargs: (args[0], None)
    (entry,) = vk.accelerate(model).entries
    assert (entry.status, entry.reason) == ("stock", "its forward is overridden on the instance")
    assert type(model.attention) is nn.MultiheadAttention


class Direct(nn.Module):
    """Attention written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1))


sdpa = torch.nn.functional.scaled_dot_product_attention


def attend(q, k, v):
    return sdpa(q, k, v)


class Helped(Direct):
    """The same by a function."""

    def forward(self, x):
        return attend(*self.qkv(x).chunk(3, dim=-1))


class NotTorchs(Direct):
    """A function of the same name."""

    def forward(self, x):
        return vk.compat.scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1))


def test_handwritten_attention_is_named():
    model = nn.Sequential(Direct(), Helped(), NotTorchs(), nn.Linear(8, 8))
    report = vk.accelerate(model)
    assert [(entry.name, entry.status) for entry in report.entries] == [("0", "stock"), ("1", "stock")]
    assert all("vitkernels.compat.scaled_dot_product_attention" in entry.reason for entry in report.entries)
    assert "nothing was replaced" in str(report)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["maxvit_tiny_tf_224", "davit_tiny", "swin_tiny_patch4_window7_224"])
def test_traces_like_stock(name):
    model, images = timm_family(name)
    with torch.no_grad():
        stock = torch.jit.trace(model, images, check_trace=False)
        vk.accelerate(model)
        ours = torch.jit.trace(model, images, check_trace=False)
        for x in (images, torch.cat([images.flip(0), images])):
            torch.testing.assert_close(ours(x), stock(x), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
@every_model
def test_script_asks_for_restored(name):
    model, x = MODELS[name][0]()
    vk.accelerate(model)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script: .* `with vitkernels\.restored\(model\):`"):
        torch.jit.script(model)
    vk.restore(model)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*MODELS, "transformers"])
def test_exporter_without_dynamo_asks_for_restored(name):
    model, x = transformers_model() if name == "transformers" else MODELS[name][0]()
    vk.accelerate(model)
    with pytest.raises(RuntimeError, match=r"torch\.onnx\.export: .* `with vitkernels\.restored\(model\):`"):
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)
