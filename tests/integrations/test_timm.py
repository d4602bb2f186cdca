"""``vk.accelerate`` and ``vk.restore`` on timm's models."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
import vitkernels as vk
from support.model_zoo import (
    DEPTH,
    TIMM_MODELS,
    KernelCalls,
    add_low_rank,
    assert_close,
    assert_policy,
    expect_kernel_calls,
    outputs_and_gradients,
    run_python,
    timm_model,
)
from torch import nn

timm_attention = pytest.importorskip("timm.layers.attention")
every_model = pytest.mark.parametrize("name", TIMM_MODELS)


@every_model
def test_outputs_and_gradients_agree(name):
    model, images = timm_model(name)
    stock = outputs_and_gradients(model, images)
    assert len(vk.accelerate(model).replaced) == DEPTH
    with expect_kernel_calls(DEPTH):
        ours = outputs_and_gradients(model, images)
    assert_close(ours, stock)


@every_model
def test_float32_error_policy(name):
    model, images = timm_model(name)
    truth = outputs_and_gradients(model, images)
    stock = outputs_and_gradients(model.float(), images.float())
    vk.accelerate(model)
    ours = outputs_and_gradients(model, images.float())
    assert_policy(ours, stock, truth, torch.finfo(torch.float32).eps)


def test_bfloat16_autocast_error_policy():
    model, images = timm_model()
    truth = outputs_and_gradients(model, images)
    model, images = model.float(), images.float()
    with torch.autocast("cpu", torch.bfloat16):
        stock = outputs_and_gradients(model, images)
        vk.accelerate(model)
        with expect_kernel_calls(DEPTH) as recorder:
            ours = outputs_and_gradients(model, images)
    assert all(call[0].dtype == torch.bfloat16 for call in recorder.calls)
    assert_policy(ours, stock, truth, torch.finfo(torch.bfloat16).eps)


@every_model
def test_restore_is_exact(name):
    model, images = timm_model(name)
    before = outputs_and_gradients(model, images)
    classes = [type(m) for m in model.modules()]
    vk.accelerate(model)
    vk.restore(model)
    assert [type(m) for m in model.modules()] == classes
    after = outputs_and_gradients(model, images)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_state_dict_goes_both_ways():
    model, images = timm_model()
    torch.manual_seed(8)
    fresh, _ = timm_model()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    vk.accelerate(fresh)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(images), model(images), rtol=1e-10, atol=1e-10)
    assert list(fresh.state_dict()) == list(model.state_dict())
    model.load_state_dict(fresh.state_dict())


def test_isinstance_hooks_and_parameters_survive():
    model, images = timm_model()
    seen = []
    module = model.blocks[0].attn
    module.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    parameters = list(model.parameters())
    vk.accelerate(model)
    model(images)
    assert isinstance(module, timm_attention.Attention)
    assert len(seen) == 1
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_deepcopy_stays_accelerated():
    model, images = timm_model()
    vk.accelerate(model)
    twin = copy.deepcopy(model)
    vk.restore(model)
    with expect_kernel_calls(DEPTH):
        out = twin(images)
    torch.testing.assert_close(out, model(images), rtol=1e-10, atol=1e-10)


def test_pickle_loads_in_a_fresh_process(tmp_path: Path):
    model, images = timm_model()
    vk.accelerate(model)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    torch.save((images, model(images).detach()), tmp_path / "data.pt")
    program = (
        "import pickle, sys, torch\n"
        "from support import model_zoo\n"
        "folder = sys.argv[1]\n"
        "model = pickle.load(open(folder + '/model.pkl', 'rb'))\n"
        "images, expected = torch.load(folder + '/data.pt')\n"
        f"with model_zoo.expect_kernel_calls({DEPTH}):\n"
        "    assert torch.equal(model(images), expected)\n"
    )
    run_python(program, str(tmp_path))


def test_torch_save_and_load():
    model, images = timm_model()
    vk.accelerate(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(images), model(images))


def test_compiles_in_one_graph():
    model, images = timm_model(depth=1)
    stock = outputs_and_gradients(model, images)
    vk.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    ours = {key.removeprefix("_orig_mod."): t for key, t in outputs_and_gradients(compiled, images).items()}
    assert_close(ours, stock)


def test_traces_with_the_kernel():
    model, images = timm_model(depth=1)
    vk.accelerate(model)
    exported = torch.export.export(model, (images,))
    assert [n for n in exported.graph.nodes if n.target is torch.ops.vitkernels.attention.default]
    torch.testing.assert_close(exported.module()(images), model(images), rtol=1e-10, atol=1e-10)


def test_gradient_checkpointing():
    model, images = timm_model()
    vk.accelerate(model)
    model.train()
    plain = outputs_and_gradients(model, images)
    model.set_grad_checkpointing()
    with expect_kernel_calls(2 * DEPTH):
        checkpointed = outputs_and_gradients(model, images)
    assert all(torch.equal(checkpointed[key], plain[key]) for key in plain)


def test_low_rank_linears_inside_are_called():
    model, images = timm_model()
    vk.accelerate(model)
    assert add_low_rank(model, lambda name: name.endswith(("qkv", "attn.proj"))) == 2 * DEPTH
    with expect_kernel_calls(DEPTH):
        ours = outputs_and_gradients(model, images)
    vk.restore(model)
    assert_close(ours, outputs_and_gradients(model, images))


@pytest.mark.parametrize("option", ["qk_norm", "scale_norm", "gated"])
def test_variants_of_the_module_agree(option):
    torch.manual_seed(10)
    module = timm_attention.Attention(48, 3, norm_layer=nn.LayerNorm, dtype=torch.float64, **{option: True})
    x = torch.randn(2, 9, 48, dtype=torch.float64)
    stock = outputs_and_gradients(module, x)
    vk.accelerate(module)
    with expect_kernel_calls(1):
        ours = outputs_and_gradients(module, x)
    assert_close(ours, stock)


def attention_module() -> tuple[nn.Module, torch.Tensor]:
    model, _ = timm_model(depth=1)
    return model.blocks[0].attn, torch.randn(2, 9, 192, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["bool", "keys", "float", "causal"])
def test_masks_agree(kind):
    module, x = attention_module()
    visible = torch.rand(2, 1, 9, 9) > 0.4
    visible[..., 0] = True
    arguments = {
        "bool": {"attn_mask": visible},
        "keys": {"attn_mask": visible[:, :, :1]},
        "float": {"attn_mask": torch.randn(3, 9, 9, dtype=torch.float64)},
        "causal": {"is_causal": True},
    }[kind]
    stock = outputs_and_gradients(module, x, **arguments)
    vk.accelerate(module)
    with expect_kernel_calls(1):
        ours = outputs_and_gradients(module, x, **arguments)
    assert_close(ours, stock)


def difference_module() -> tuple[nn.Module, torch.Tensor]:
    from timm.layers import diff_attention

    torch.manual_seed(1)
    return diff_attention.DiffAttention(24, 3, dtype=torch.float64), torch.randn(2, 9, 24, dtype=torch.float64)


@pytest.mark.parametrize("fused_attn", [True, False])
@pytest.mark.parametrize("build", [attention_module, difference_module])
@pytest.mark.parametrize("kind", ["causal", "float16", "integer", "one axis", "heads"])
def test_other_masks_mean_what_they_mean_in_timm(kind, build, fused_attn):
    module, x = build()
    module.fused_attn = fused_attn
    kwargs = {
        "causal": {"attn_mask": torch.zeros(9, 9, dtype=torch.float64), "is_causal": True},
        "float16": {"attn_mask": torch.ones(9, 9, dtype=torch.float16)},
        "integer": {"attn_mask": torch.ones(9, 9, dtype=torch.int64).triu()},
        "one axis": {"attn_mask": torch.arange(9.0, dtype=torch.float64)},
        "heads": {"attn_mask": torch.randn(3, 9, 9, dtype=torch.float64)},
    }[kind]

    def outcome() -> torch.Tensor | str:
        try:
            return module(x, **kwargs)
        except (RuntimeError, IndexError) as error:
            return str(error)

    stock = outcome()
    vk.accelerate(module)
    with KernelCalls() as recorder:
        ours = outcome()
    if kind == "heads" and isinstance(stock, torch.Tensor):
        torch.testing.assert_close(ours, stock, rtol=1e-10, atol=1e-10)
    else:
        assert not recorder.calls
        assert torch.equal(ours, stock) if isinstance(stock, torch.Tensor) else ours == stock


def test_dropout_in_training_takes_the_stock_path():
    model, images = timm_model(attn_drop_rate=0.2)
    model.train()
    torch.manual_seed(9)
    stock = outputs_and_gradients(model, images)
    report = vk.accelerate(model)
    assert {entry.reason for entry in report.replaced} == {
        "stock path in training: attention dropout 0.2; stock path with hooks on attn_drop"
    }
    torch.manual_seed(9)
    with expect_kernel_calls(0):
        ours = outputs_and_gradients(model, images)
    assert all(torch.equal(ours[key], stock[key]) for key in stock)
    with expect_kernel_calls(DEPTH):
        model.eval()(images)


def test_device_without_kernels_takes_the_stock_path():
    module, x = attention_module()
    module.to("meta")
    (entry,) = vk.accelerate(module).entries
    assert entry.reason == "stock path on meta: no kernels for it; stock path with hooks on attn_drop"
    with expect_kernel_calls(0):
        assert module(x.to("meta")).shape == x.shape


class OtherAttention(nn.Linear):
    """Looks like attention and is none that is known."""


@pytest.mark.parametrize("fused_attn", [True, False])
def test_scale_counts_where_it_does_in_timm(fused_attn):
    module, x = attention_module()
    module.scale, module.fused_attn = 0.25, fused_attn
    stock = outputs_and_gradients(module, x)
    vk.accelerate(module)
    with expect_kernel_calls(1):
        ours = outputs_and_gradients(module, x)
    assert_close(ours, stock)


def test_what_may_compute_something_else_is_left_alone():
    class Scaled(timm_attention.Attention):
        def forward(self, x, attn_mask=None, is_causal=False):
            return 2 * super().forward(x, attn_mask, is_causal)

    def stock_attention():
        return timm_attention.Attention(8, 2)

    model = nn.ModuleDict({name: stock_attention() for name in ("overridden", "replaced")})
    model["subclass"] = Scaled(8, 2)
    model["other"] = OtherAttention(8, 2)
    model["overridden"].forward = lambda x: x
    report = vk.accelerate(model)
    assert [entry.name for entry in report.replaced] == ["replaced"]
    assert {entry.name: entry.reason for entry in report.stock} == {
        "overridden": "its forward is overridden on the instance",
        "subclass": "a subclass of timm's Attention may compute something else",
        "other": "no fused replacement",
    }
    assert type(model["subclass"]) is Scaled


def test_accelerate_is_idempotent_and_takes_the_module_itself():
    module, _ = attention_module()
    first = vk.accelerate(module)
    cls = type(module)
    assert vk.accelerate(module) == first
    assert type(module) is cls
    vk.restore(module)
    assert type(module) is timm_attention.Attention


def test_report_is_a_table():
    model, _ = timm_model()
    model.head = OtherAttention(192, 3)
    report = vk.accelerate(model)
    kernels = ", ".join(f"{device}: {state}" for device, state in vk._library.backends().items())
    assert str(report) == (
        "   2 x timm Attention -> vitkernels.attention (stock path with hooks on attn_drop)\n"
        f"   1 x {__name__.partition('.')[0]} OtherAttention -> stock (no fused replacement)\n"
        f"kernels: {kernels}"
    )


def test_report_says_when_there_is_nothing_to_replace():
    report = vk.accelerate(nn.Linear(2, 2))
    assert report.entries == []
    assert str(report).startswith("nothing to replace: no attention module found\n")


@pytest.mark.parametrize("function", [vk.accelerate, vk.restore])
def test_something_else_than_a_module_is_an_error(function):
    with pytest.raises(RuntimeError, match=r"model is a list, takes a torch\.nn\.Module"):
        function([])


def test_libraries_are_not_imported_for_the_user():
    run_python(
        "import sys, torch, vitkernels as vk\n"
        "vk.restore(torch.nn.Linear(2, 2)); vk.accelerate(torch.nn.Linear(2, 2))\n"
        "assert not {'timm', 'transformers'} & set(sys.modules)\n"
    )
