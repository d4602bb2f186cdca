"""``vk.monarchize`` and ``vk.expand_monarch`` on models of other libraries, and on layers that must stay."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import vitkernels as vk
from support.model_zoo import (
    expect_kernel_calls,
    output_of,
    randomised,
    timm_model,
    transformers_family,
    transformers_model,
)
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

MonarchLinear = vk.nn.MonarchLinear


def torchvision_model() -> tuple[nn.Module, torch.Tensor]:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=96, num_classes=5
    )
    return randomised(model.double().eval()), torch.randn(2, 3, 32, 32, dtype=torch.float64)


def of(library, make):
    def made():
        pytest.importorskip(library)
        return make()

    return made


MODELS = {
    "timm": (of("timm", timm_model), {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"}),
    "torchvision": (
        torchvision_model,
        {f"encoder.layers.encoder_layer_{i}.mlp.{j}" for i in range(2) for j in (0, 3)},
    ),
    "ViT": (
        of("transformers", transformers_model),
        {f"layers.{i}.mlp.fc{j}" for i in range(2) for j in (1, 2)},
    ),
    "DINOv3ViT": (
        of("transformers", lambda: transformers_model("DINOv3ViT")),
        {f"model.layer.{i}.mlp.{way}_proj" for i in range(2) for way in ("up", "down")},
    ),
    "Swinv2": (  # where attention has an output.dense as well, and an MLP of its own
        of("transformers", lambda: transformers_family("Swinv2")),
        {
            f"swinv2.encoder.layers.{i}.blocks.{j}.{part}.dense"
            for i, j in ((0, 0), (0, 1), (1, 0))
            for part in ("intermediate", "output")
        },
    ),
}
BLOCKS = 3
every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_mlps_there_and_back(name):
    """The expanded model computes what the Monarch one does, and the projection of its weights loses nothing."""
    build, names = MODELS[name]
    model, images = build()
    stock = output_of(model, images)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    report = vk.monarchize(model, nblocks=BLOCKS)
    assert {entry.name for entry in report.replaced} == names and not report.stock
    assert {n for n, m in model.named_modules() if isinstance(m, MonarchLinear)} == names
    for entry in report.replaced:
        assert entry.error == model.get_submodule(entry.name).projection_error > 0.1
    sparse = output_of(model, images)
    assert not torch.allclose(sparse, stock)
    back = vk.expand_monarch(model)
    assert {entry.name for entry in back.replaced} == names and not back.stock
    torch.testing.assert_close(output_of(model, images), sparse, rtol=1e-9, atol=1e-9)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if "bias" in key)
    assert max(entry.error for entry in vk.monarchize(model, nblocks=BLOCKS).replaced) < 1e-13


@every_model
def test_composes_with_accelerate(name):
    """In either order, with the outputs of the stock attention."""
    model, images = MODELS[name][0]()
    vk.monarchize(model, nblocks=BLOCKS)
    expected = output_of(model, images)
    other = MODELS[name][0]()[0]
    accelerated = len(vk.accelerate(model).replaced)
    assert accelerated and len(vk.accelerate(other).replaced) == accelerated
    vk.monarchize(other, nblocks=BLOCKS)
    for each in (model, other):
        torch.testing.assert_close(output_of(each, images), expected, rtol=1e-9, atol=1e-9)
    vk.restore(model)
    vk.expand_monarch(model)
    torch.testing.assert_close(output_of(model, images), expected, rtol=1e-9, atol=1e-9)


def test_projections_of_accelerated_attention():
    pytest.importorskip("timm")
    model, images = timm_model(depth=1)
    vk.monarchize(model, targets="attn.*")
    expected = output_of(model, images)
    assert len(vk.accelerate(model).replaced) == 1
    with expect_kernel_calls(1):
        torch.testing.assert_close(output_of(model, images), expected, rtol=1e-9, atol=1e-9)


def test_copies_and_training():
    pytest.importorskip("timm")
    model, images = timm_model(depth=1)
    vk.monarchize(model, nblocks=BLOCKS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output_of(twin, images), output_of(model, images))
    output_of(model.train(), images).square().sum().backward()
    assert all(p.grad is not None for p in model.blocks[0].mlp.parameters())


def mlp(features: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 2 * features), nn.GELU(), nn.Linear(2 * features, features))


def test_report():
    model = mlp(64)
    counts = [sum(p.numel() for p in model.parameters())]
    report = vk.monarchize(model, nblocks=2, targets=lambda name, linear: linear.in_features >= 64)
    counts.append(sum(p.numel() for p in model.parameters()))
    assert report.parameters == tuple(counts)
    assert [entry.shape for entry in report.entries] == [(64, 128), (128, 64)]
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(7, 64))
    assert counter.get_total_flops() == 7 * report.flops[1] and report.flops[0] == 4 * 64 * 128
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "shape", "blocks", "parameters", "now", "FLOPs", "a", "row", "now", "error"]
    assert lines[1].split()[:5] == ["0", "64", "->", "128", "2"]
    assert lines[-1].split() == ["total", "of", "2", *(f"{n:,}" for n in (*report.parameters, *report.flops))]
    back = vk.expand_monarch(model)
    assert back.parameters == report.parameters[::-1] and [entry.nblocks for entry in back.entries] == [2, 2]
    assert str(vk.expand_monarch(model)) == "nothing was replaced"


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("0", ["0"]),
        (["0", "2"], ["0", "2"]),
        ("*", ["0", "2"]),
        (lambda name, linear: linear.out_features == 16, ["2"]),
    ],
)
def test_targets(targets, names):
    model = mlp()
    assert [entry.name for entry in vk.monarchize(model, targets=targets).entries] == names
    assert [name for name, m in model.named_modules() if isinstance(m, MonarchLinear)] == names


def test_tied_modules_are_replaced_once():
    model = nn.ModuleDict({"a": mlp(), "b": mlp()})
    model["b"][0] = model["a"][0]
    report = vk.monarchize(model, targets="*.0")
    assert [entry.name for entry in report.replaced] == ["a.0"]
    assert isinstance(model["a"][0], MonarchLinear) and model["b"][0] is model["a"][0]
    vk.expand_monarch(model)
    assert type(model["a"][0]) is nn.Linear and model["b"][0] is model["a"][0]


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Reader(nn.Module):
    """Multiplies with the weight of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(16, 16)

    def forward(self, x):
        return x @ self.read.weight


class Negative(nn.Module):
    def forward(self, x):
        return -x


def hooked():
    linear = nn.Linear(16, 16)
    linear.register_forward_hook(lambda module, args, out: out + 1)
    return linear


def hooked_gradient():
    linear = nn.Linear(16, 16)
    linear.weight.register_hook(lambda grad: 2 * grad)
    return linear


def hooked_file():
    linear = nn.Linear(16, 16)
    linear.register_state_dict_pre_hook(lambda *args: None)
    return linear


def overridden():
    linear = nn.Linear(16, 16)
    linear.forward = lambda x: x
    return linear


def parametrized():
    return parametrize.register_parametrization(nn.Linear(16, 16), "weight", Negative())


def tied():
    pair = nn.Sequential(nn.Linear(16, 16), nn.Embedding(16, 16))
    pair[1].weight = pair[0].weight
    return pair


def in_the_same_memory():
    pair = nn.Sequential(nn.Linear(16, 16), nn.Embedding(16, 16))
    pair[1].weight = nn.Parameter(pair[0].weight.data)
    return pair


def overlapping():
    """The second layer has the rows of the first from the second on."""
    rows = torch.randn(33, 16)
    pair = nn.Sequential(nn.Linear(16, 32), nn.Linear(16, 32))
    pair[0].weight, pair[1].weight = nn.Parameter(rows[:32]), nn.Parameter(rows[1:])
    return pair


def test_layers_side_by_side_in_a_storage():
    """As parameters that are flattened into one are."""
    rows = torch.randn(64, 16)
    pair = nn.Sequential(nn.Linear(16, 32), nn.Linear(16, 32))
    pair[0].weight, pair[1].weight = nn.Parameter(rows[:32]), nn.Parameter(rows[32:])
    assert len(vk.monarchize(pair, targets="*").replaced) == 2


def test_a_lazy_layer_is_left_alone():
    model = nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 32), nn.LazyBatchNorm1d())
    report = vk.monarchize(model, targets="*")
    assert [entry.name for entry in report.replaced] == ["1"]
    assert [entry.reason for entry in report.stock] == ["a subclass of Linear, LazyLinear, may compute something else"]


def not_finite():
    linear = nn.Linear(16, 16)
    nn.init.constant_(linear.bias, torch.nan)
    nn.init.constant_(linear.weight, torch.inf)
    return linear


LEFT = {
    "a subclass of Linear, Scaled, may compute something else": lambda: Scaled(16, 16),
    "it is parametrized": parametrized,
    "it has hooks": hooked,
    "its forward is overridden on the instance": overridden,
    "it shares parameters with 0.1": tied,
    "Reader reads the weight of its read without calling it": Reader,
    "with 4 blocks some inputs would not reach some outputs": lambda: nn.Linear(12, 64),
    "it has a weight with NaN or infinity, takes finite values": not_finite,
    "it has a weight of torch.float32 on meta, takes floating-point values in memory": lambda: nn.Linear(
        16, 16, device="meta"
    ),
    "a MonarchLinear already": lambda: MonarchLinear(16, 16),
    "its weight is empty": lambda: nn.Linear(0, 16),
}


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        *LEFT.items(),
        ("it has hooks", hooked_gradient),
        ("it has hooks", hooked_file),
        ("it shares parameters with 0.1", in_the_same_memory),
        ("its weight is empty", lambda: nn.Linear(16, 0)),
    ],
)
def test_left_alone(reason, make):
    model = nn.Sequential(make(), nn.Linear(16, 32))
    before = [*model.modules()][:-1]
    report = vk.monarchize(model, targets="*")
    assert [entry.reason for entry in report.stock] == [reason]
    assert [entry.name for entry in report.replaced] == ["1"], "what may be replaced"
    assert [*model.modules()][:-1] == before
    assert str(report).splitlines()[-1] == f"   1 x left alone ({reason}): {report.stock[0].name}"


def test_weights_that_overlap_are_left_alone():
    model = nn.Sequential(overlapping(), nn.Linear(16, 32))
    reasons = ["it shares parameters with 0.1", "it shares parameters with 0.0"]
    assert [entry.reason for entry in vk.monarchize(model, targets="*").stock] == reasons


def test_transformer_encoder_layer():
    """Its fast path reads both weights."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 3, 16)
    expected = layer(x)
    assert not vk.monarchize(layer, targets="linear?").replaced
    assert torch.equal(layer(x), expected)


def test_expanded_with_care():
    class Own(MonarchLinear):
        pass

    model = nn.Sequential(Own(16, 16), MonarchLinear(16, 16), MonarchLinear(16, 16))
    model[1].register_forward_hook(lambda module, args, out: out + 1)
    report = vk.expand_monarch(model)
    reasons = ["a subclass of MonarchLinear, Own, may compute something else", "it has hooks"]
    assert [entry.reason for entry in report.stock] == reasons
    assert [entry.name for entry in report.replaced] == ["2"] and type(model[2]) is nn.Linear
    assert [entry.reason for entry in vk.expand_monarch(model[1]).stock] == [
        "it is the model itself, which cannot be replaced in place"
    ]


@pytest.mark.parametrize(("blocks", "smaller"), [(1, False), (2, False), (3, True)])
def test_only_smaller_layers(blocks, smaller):
    """Two dense factors of a square matrix have twice its size, those of two blocks its size."""
    model = nn.Sequential(nn.Linear(24, 24))
    report = vk.monarchize(model, nblocks=blocks, targets="*")
    reasons = [] if smaller else [f"with {blocks} blocks it would not be smaller"]
    assert [entry.reason for entry in report.stock] == reasons and len(report.replaced) == smaller


def test_the_model_itself():
    report = vk.monarchize(nn.Linear(16, 16), targets="*")
    assert [entry.reason for entry in report.stock] == ["it is the model itself, which cannot be replaced in place"]


BAD = {
    r"monarchize: model is a list, takes a torch.nn.Module": lambda: vk.monarchize([]),
    r"expand_monarch: model is a list, takes a torch.nn.Module": lambda: vk.expand_monarch([]),
    r"monarchize: nblocks is 0, takes an integer from 1 on": lambda: vk.monarchize(mlp(), nblocks=0, targets="*"),
    r"monarchize: nblocks is True, takes an integer": lambda: vk.monarchize(mlp(), nblocks=True, targets="*"),
    r"monarchize: targets is \('fc1', 'fc2', 'mlp.\*', .*\), takes what names .* linear layers: 2 x \*$": lambda: (
        vk.monarchize(nn.Sequential(*mlp()))
    ),
    r"monarchize: targets is 'fc3', takes .*: 4 x \*\.\*$": lambda: vk.monarchize(
        nn.Sequential(mlp(), mlp()), targets="fc3"
    ),
    r"monarchize: targets is 5, takes a pattern, several, or a function": lambda: vk.monarchize(mlp(), targets=5),
    r"monarchize: targets is \('fc1', 5\), takes a pattern": lambda: vk.monarchize(mlp(), targets=("fc1", 5)),
    r"monarchize: targets is \[\], takes .*: there is none": lambda: vk.monarchize(nn.GELU(), targets=[]),
}


@pytest.mark.parametrize("text", BAD)
def test_bad_arguments_are_named(text):
    with pytest.raises(RuntimeError, match="^vitkernels." + text):
        BAD[text]()
