"""``vk.accelerate`` and the attention function ``"vitkernels"`` on transformers' models."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vitkernels as vk
from support.model_zoo import (
    DEPTH,
    TRANSFORMERS_MODELS,
    add_low_rank,
    assert_close,
    assert_policy,
    expect_kernel_calls,
    output_of,
    outputs_and_gradients,
    transformers_model,
)
from support.paths import TESTS

transformers = pytest.importorskip("transformers")
every_model = pytest.mark.parametrize("name", TRANSFORMERS_MODELS)


@every_model
def test_outputs_and_gradients_agree(name):
    model, images = transformers_model(name)
    stock = outputs_and_gradients(model, images)
    assert len(vk.accelerate(model).replaced) == DEPTH
    with expect_kernel_calls(DEPTH):
        ours = outputs_and_gradients(model, images)
    assert_close(ours, stock)


@every_model
def test_float32_error_policy(name):
    model, images = transformers_model(name)
    truth = outputs_and_gradients(model, images)
    stock = outputs_and_gradients(model.float(), images.float())
    vk.accelerate(model)
    ours = outputs_and_gradients(model, images.float())
    assert_policy(ours, stock, truth, torch.finfo(torch.float32).eps)


@every_model
def test_restore_is_exact(name):
    model, images = transformers_model(name)
    before = outputs_and_gradients(model, images)
    attributes = [set(m.__dict__) for m in model.modules()]
    vk.accelerate(model)
    assert model.config._attn_implementation == "vitkernels"
    vk.restore(model)
    assert model.config._attn_implementation == "sdpa"
    assert [set(m.__dict__) for m in model.modules()] == attributes
    after = outputs_and_gradients(model, images)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_set_attn_implementation():
    vk.integrations.register_transformers()
    model, images = transformers_model()
    stock = output_of(model, images)
    model.set_attn_implementation("vitkernels")
    with expect_kernel_calls(DEPTH):
        torch.testing.assert_close(output_of(model, images), stock, rtol=1e-10, atol=1e-10)
    vk.accelerate(model)
    vk.restore(model)
    assert model.config._attn_implementation == "vitkernels"


def test_state_dict_and_saved_config_are_stock(tmp_path: Path):
    model, images = transformers_model()
    keys = list(model.state_dict())
    vk.accelerate(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    assert "vitkernels" not in (tmp_path / "config.json").read_text()
    loaded = transformers.ViTModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(output_of(loaded, images), output_of(model, images), rtol=1e-10, atol=1e-10)


def test_deepcopy_stays_accelerated():
    model, images = transformers_model()
    vk.accelerate(model)
    twin = copy.deepcopy(model)
    vk.restore(model)
    assert model.config._attn_implementation == "sdpa"
    with expect_kernel_calls(DEPTH):
        out = output_of(twin, images)
    torch.testing.assert_close(out, output_of(model, images), rtol=1e-10, atol=1e-10)
    vk.restore(twin)
    assert twin.config._attn_implementation == "sdpa"


def test_pickle_loads_in_a_fresh_process(tmp_path: Path):
    model, images = transformers_model()
    vk.accelerate(model)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    torch.save((images, output_of(model, images).detach()), tmp_path / "data.pt")
    program = (
        "import pickle, sys, torch\n"
        "from support.model_zoo import expect_kernel_calls, output_of\n"
        "model = pickle.load(open(sys.argv[1] + '/model.pkl', 'rb'))\n"
        "images, expected = torch.load(sys.argv[1] + '/data.pt')\n"
        f"with expect_kernel_calls({DEPTH}):\n"
        "    assert torch.equal(output_of(model, images), expected)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=TESTS, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_compiles_in_one_graph():
    model, images = transformers_model(num_hidden_layers=1)
    stock = output_of(model, images)
    vk.accelerate(model)
    torch._dynamo.reset()
    with torch.no_grad():
        ours = output_of(torch.compile(model, fullgraph=True), images)
    torch.testing.assert_close(ours, stock, rtol=1e-10, atol=1e-10)


def test_bfloat16_autocast_error_policy():
    model, images = transformers_model()
    truth = outputs_and_gradients(model, images)
    model, images = model.float(), images.float()
    with torch.autocast("cpu", torch.bfloat16):
        stock = outputs_and_gradients(model, images)
        vk.accelerate(model)
        with expect_kernel_calls(DEPTH) as recorder:
            ours = outputs_and_gradients(model, images)
    assert all(call[0].dtype == torch.bfloat16 for call in recorder.calls)
    assert_policy(ours, stock, truth, torch.finfo(torch.bfloat16).eps)


def test_gradient_checkpointing():
    model, images = transformers_model()
    vk.accelerate(model)
    model.train()
    plain = outputs_and_gradients(model, images)
    model.gradient_checkpointing_enable()
    with expect_kernel_calls(2 * DEPTH):
        checkpointed = outputs_and_gradients(model, images)
    assert all(torch.equal(checkpointed[key], plain[key]) for key in plain)


def test_low_rank_linears_inside_are_called():
    model, images = transformers_model()
    vk.accelerate(model)
    assert add_low_rank(model, lambda name: name.endswith(("q_proj", "v_proj"))) == 2 * DEPTH
    with expect_kernel_calls(DEPTH):
        ours = outputs_and_gradients(model, images)
    vk.restore(model)
    assert_close(ours, outputs_and_gradients(model, images))


def test_dropout_in_training_takes_the_stock_path():
    model, images = transformers_model(attention_probs_dropout_prob=0.2)
    model.train()
    torch.manual_seed(9)
    stock = outputs_and_gradients(model, images)
    report = vk.accelerate(model)
    assert all("stock path in training: attention dropout 0.2" in entry.reason for entry in report.replaced)
    torch.manual_seed(9)
    with expect_kernel_calls(0):
        ours = outputs_and_gradients(model, images)
    assert all(torch.equal(ours[key], stock[key]) for key in stock)


def test_output_attentions_takes_the_stock_path():
    model, images = transformers_model()
    stock = model(images, output_attentions=True)
    report = vk.accelerate(model)
    assert all("output_attentions" in entry.reason for entry in report.replaced)
    with expect_kernel_calls(0):
        ours = model(images, output_attentions=True)
    assert torch.equal(ours.last_hidden_state, stock.last_hidden_state)
    assert ours.attentions == stock.attentions


def test_eager_models_keep_their_attention_weights():
    model, images = transformers_model()
    model.set_attn_implementation("eager")
    report = vk.accelerate(model)
    assert not report.replaced
    assert {entry.reason for entry in report.stock} == {
        "its attention implementation is 'eager', only 'sdpa' is replaced"
    }
    assert len(model(images, output_attentions=True).attentions) == DEPTH
    vk.restore(model)
    assert model.config._attn_implementation == "eager"


def test_choosing_another_implementation_afterwards_works():
    model, images = transformers_model()
    vk.accelerate(model)
    model.set_attn_implementation("eager")
    with expect_kernel_calls(0):
        assert len(model(images, output_attentions=True).attentions) == DEPTH
    vk.restore(model)
    assert model.config._attn_implementation == "eager"


def test_accelerate_is_idempotent():
    model, _ = transformers_model()
    first = vk.accelerate(model)
    assert vk.accelerate(model) == first
    vk.restore(model)
    assert model.config._attn_implementation == "sdpa"


def test_attention_outside_the_registry_is_named():
    config = transformers.Swin2SRConfig(depths=[1], num_heads=[2], embed_dim=16, image_size=32)
    report = vk.accelerate(transformers.Swin2SRModel(config))
    assert [(entry.kind, entry.status, entry.reason) for entry in report.entries] == [
        ("transformers Swin2SRSelfAttention", "stock", "no fused replacement")
    ]


TOKENS = torch.arange(14).view(2, 7)
PADDING = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])


def text_model(name: str, **overrides) -> torch.nn.Module:
    from support.model_zoo import randomised

    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(vocab_size=20, **options, **overrides)
    return randomised(getattr(transformers, f"{name}Model")(config).double().eval())


def test_padding_is_one_row_for_all_queries():
    model = text_model("Bert")
    stock = outputs_and_gradients(model, TOKENS, attention_mask=PADDING)
    vk.accelerate(model)
    with expect_kernel_calls(1) as recorder:
        ours = outputs_and_gradients(model, TOKENS, attention_mask=PADDING)
    bias, key_bias = recorder.calls[0][5:7]
    assert bias is None
    assert key_bias.shape == (2, 1, 7)
    assert_close(ours, stock)


@pytest.mark.parametrize("padding", [None, PADDING, PADDING.flip(1)], ids=["none", "right", "left"])
def test_causal_grouped_heads(padding):
    model = text_model("Llama", num_key_value_heads=2)
    stock = outputs_and_gradients(model, TOKENS, attention_mask=padding)
    vk.accelerate(model)
    with expect_kernel_calls(1) as recorder:
        ours = outputs_and_gradients(model, TOKENS, attention_mask=padding)
    query, key = recorder.calls[0][:2]
    assert (query.size(2), key.size(2)) == (4, 2)
    assert_close(ours, stock)


def test_causal_decoding_with_a_cache():
    model = text_model("Llama", num_key_value_heads=2)
    whole = output_of(model, TOKENS)
    vk.accelerate(model)
    start = model(TOKENS[:, :4], use_cache=True)
    middle = model(TOKENS[:, 4:6], past_key_values=start.past_key_values, use_cache=True)
    last = model(TOKENS[:, 6:], past_key_values=middle.past_key_values, use_cache=True)
    parts = [part.last_hidden_state for part in (start, middle, last)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


def test_library_code_that_depends_on_the_name_sdpa_is_left_alone():
    # Its forward makes a mask only under the names "eager" and "sdpa".
    config = transformers.DeepseekV32Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        moe_intermediate_size=8, n_routed_experts=4, q_lora_rank=16, index_n_heads=2,
    )  # fmt: skip
    model = transformers.DeepseekV32Model(config)
    (entry,) = vk.accelerate(model).stock
    assert entry.reason == "its library module treats 'sdpa' specially"
    assert config._attn_implementation == "sdpa"


def test_library_code_that_overrides_sdpa_is_left_alone(monkeypatch):
    from transformers.modeling_utils import AttentionInterface
    from transformers.models.vit import modeling_vit

    own = AttentionInterface()
    own["sdpa"] = lambda *args, **kwargs: None
    monkeypatch.setattr(modeling_vit, "ALL_ATTENTION_FUNCTIONS", own)
    model, _ = transformers_model()
    assert {entry.reason for entry in vk.accelerate(model).stock} == {"its library module overrides 'sdpa'"}
    assert model.config._attn_implementation == "sdpa"
