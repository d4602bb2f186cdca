"""The linear layer whose weight is a Monarch matrix: projection, expansion, initialisation."""

import copy
import pickle

import pytest
import torch
from support.mechanisms import agree_module
from torch import nn
from torch._subclasses import FakeTensorMode
from vitkernels.nn import MonarchLinear

# Inputs, outputs, blocks: divisible, padded on either side, one block, wider than high, fewer inner features than
# blocks, more blocks than features.
SIZES = [(16, 24, 4), (14, 18, 4), (18, 13, 4), (7, 5, 1), (24, 16, 5), (8, 12, 4), (3, 2, 8)]
SVD_ERROR = 1e-14  # of LAPACK, in float64, for matrices as small as these
every_size = pytest.mark.parametrize(("inputs", "outputs", "blocks"), SIZES)


def pairs(weight, inputs, outputs, blocks):
    """What lies between each block of inputs and each turn of outputs, and the rank that it may have."""
    p, s = -(-inputs // blocks), -(-outputs // blocks)
    q = min(p, s)
    for i in range(blocks):
        for j in range(blocks):
            rank = sum(n % blocks == j for n in range(i * q, (i + 1) * q))
            yield weight[j::blocks, i * p : (i + 1) * p], rank


@every_size
def test_forward(inputs, outputs, blocks):
    p, s = -(-inputs // blocks), -(-outputs // blocks)

    def formula(parameters, x):
        padded = torch.cat([x, x.new_zeros(*x.shape[:-1], blocks * p - inputs)], -1)
        inner = padded @ torch.block_diag(*parameters["blkdiag1"]).t()
        taken = torch.arange(blocks * min(p, s)).view(-1, blocks).t().flatten()
        turns = inner[..., taken] @ torch.block_diag(*parameters["blkdiag2"]).t()
        given = torch.arange(blocks * s).view(blocks, s).t().flatten()
        return turns[..., given][..., :outputs] + parameters["bias"]

    torch.manual_seed(0)
    agree_module(MonarchLinear(inputs, outputs, blocks), formula, torch.randn(2, 3, inputs))


@every_size
def test_projection_is_optimal(inputs, outputs, blocks):
    """By Eckart and Young: nothing of rank r is nearer than the singular values behind the first r."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, dtype=torch.float64)
    near = MonarchLinear.from_linear(linear, blocks)
    lost = sum(torch.linalg.svdvals(w)[r:].square().sum() for w, r in pairs(linear.weight, inputs, outputs, blocks))
    error = (lost.sqrt() / linear.weight.norm()).item()
    assert near.projection_error == pytest.approx(error, abs=SVD_ERROR)
    distance = (near.to_linear().weight - linear.weight).norm() / linear.weight.norm()
    assert distance.item() == pytest.approx(error, abs=SVD_ERROR)


@every_size
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back(inputs, outputs, blocks, dtype):
    """A Monarch matrix is its own projection, up to the rounding of the weights."""
    torch.manual_seed(0)
    layer = MonarchLinear(inputs, outputs, blocks, dtype=dtype)
    dense = layer.to_linear()
    again = MonarchLinear.from_linear(dense, blocks)
    eps = torch.finfo(dtype).eps
    assert again.projection_error < 2 * eps + SVD_ERROR
    x = torch.randn(3, inputs, dtype=dtype)
    tolerance = {"rtol": 8 * eps, "atol": 8 * eps}
    torch.testing.assert_close(dense(x), layer(x), **tolerance)
    torch.testing.assert_close(again(x), layer(x), **tolerance)


def test_one_block_is_exact():
    linear = nn.Linear(6, 9, dtype=torch.float64)
    assert MonarchLinear.from_linear(linear, 1).projection_error < SVD_ERROR


@pytest.mark.parametrize("bias", [True, False])
def test_what_stays(bias):
    linear = nn.Linear(12, 8, bias, dtype=torch.bfloat16).requires_grad_(False).eval()
    generator = torch.get_rng_state()
    layer = MonarchLinear.from_linear(linear)
    assert torch.equal(torch.get_rng_state(), generator), "random numbers were drawn"
    for module in (layer, layer.to_linear()):
        assert not module.training and (module.bias is not None) == bias
        assert {(p.dtype, p.requires_grad) for p in module.parameters()} == {(torch.bfloat16, False)}
        assert not bias or (torch.equal(module.bias, linear.bias) and module.bias is not linear.bias)
    layer.blkdiag1.requires_grad_()
    assert layer.train().to_linear().weight.requires_grad and layer.to_linear().training


def test_weight_of_zeros():
    linear = nn.Linear(8, 8)
    nn.init.zeros_(linear.weight)
    layer = MonarchLinear.from_linear(linear)
    assert layer.projection_error == 0 and torch.equal(layer(torch.ones(8)), linear.bias)


def test_names_and_shapes_are_published_ones():
    layer = MonarchLinear(384, 1536, 4)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {"blkdiag1": (4, 96, 96), "blkdiag2": (4, 384, 96), "bias": (1536,)}
    assert [tuple(p.shape) for p in MonarchLinear(1536, 384, 4, bias=False).parameters()] == [(4, 96, 384), (4, 96, 96)]
    assert repr(layer) == "MonarchLinear(in_features=384, out_features=1536, nblocks=4, bias=True)"


def test_initial_variance_is_that_of_linear():
    torch.manual_seed(0)
    x = torch.randn(512, 256)
    for blocks in (1, 4, 8):
        ours, dense = (m(x).var().item() for m in (MonarchLinear(256, 512, blocks), nn.Linear(256, 512)))
        assert ours == pytest.approx(dense, rel=0.05)


def test_subclass_and_copies():
    class Named(MonarchLinear):
        pass

    layer = Named.from_linear(nn.Linear(8, 12))
    assert type(layer) is Named and copy.deepcopy(layer).projection_error == layer.projection_error > 0


def test_autocast():
    layer, x = MonarchLinear(14, 18), torch.randn(3, 14)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=0.02, atol=0.02)
    out.sum().backward()
    assert layer.blkdiag1.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outputs", [16, 18])
def test_bias_and_activation(outputs, dtype):
    """In one pass, under autocast to another dtype as well."""
    layer, x = MonarchLinear(14, outputs, dtype=dtype), torch.randn(3, 14, dtype=dtype)
    without = MonarchLinear(14, outputs, bias=False, dtype=dtype)
    without.load_state_dict({n: p for n, p in layer.state_dict().items() if n != "bias"})
    for is_cast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            expected = without(x).double() + layer.bias.double()
            found, activated = layer(x), layer(x, "gelu")
        assert found.dtype == activated.dtype == (torch.bfloat16 if is_cast else dtype)
        error = 8 * torch.finfo(found.dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)
        torch.testing.assert_close(activated.double(), nn.functional.gelu(expected), rtol=error, atol=error)


@pytest.mark.parametrize("features", [16, 14])
def test_compile_and_export(features):
    layer = MonarchLinear(features, 18).eval()
    x = torch.randn(2, 3, features)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    for rows in (x, torch.randn(5, 3, features)):
        torch.testing.assert_close(compiled(rows), layer(rows), rtol=0, atol=0)
        torch.testing.assert_close(exported(rows), layer(rows), rtol=0, atol=0)


@pytest.fixture
def packings(monkeypatch):
    """Counts how often weights are packed to be kept."""
    calls, pack = [], torch.ops.vitkernels.blockdiag_butterfly_pack
    monkeypatch.setattr(torch.ops.vitkernels, "blockdiag_butterfly_pack", lambda *w: calls.append(w) or pack(*w))
    return calls


def changes():
    def step(layer):
        optimizer = torch.optim.SGD(layer.parameters(), 0.5)
        with torch.enable_grad():
            layer(torch.ones(2, 14)).sum().backward()
        optimizer.step()

    def replace(layer):
        layer.blkdiag2 = nn.Parameter(layer.blkdiag2.detach() * 3)

    def load(layer):
        layer.load_state_dict({n: 2 * p for n, p in layer.state_dict().items()})

    def transpose(layer):
        layer.blkdiag1.data = layer.blkdiag1.data.mT

    def set_data(layer):
        for _ in range(4):  # memory that was given up may be had again
            layer.blkdiag1.data = layer.blkdiag1.data + 1

    def change_data(layer):
        layer.blkdiag1.data.mul_(2)
        layer.pack()

    return {
        "optimizer": step,
        "in place": lambda layer: layer.blkdiag1.mul_(3),
        "element": lambda layer: layer.blkdiag2[0, 0, 0].fill_(7),
        "parameter": replace,
        "state_dict": load,
        "set data": set_data,
        "set strides": transpose,
        "data and pack": change_data,
        "swap": lambda layer: torch.utils.swap_tensors(layer.blkdiag1, nn.Parameter(layer.blkdiag1.detach() * 2)),
    }


@pytest.mark.parametrize("change", changes().values(), ids=changes())
def test_weights_are_packed_when_they_have_changed(change, packings):
    layer, x = MonarchLinear(14, 18).pack(), torch.randn(5, 14)
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(layer(x), before) and len(packings) == 1
        change(layer)
        after = layer(x)
        assert len(packings) == 2 and not torch.equal(after, before)
        fresh = MonarchLinear(14, 18)  # packs in each call
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(fresh(x), after) and len(packings) == 2


def test_weights_are_packed_for_each_dtype_and_each_copy(packings):
    layer, x = MonarchLinear(14, 18).pack(), torch.randn(5, 14)
    with torch.no_grad():
        plain = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            cast = layer(x)
            assert torch.equal(layer(x), cast) and len(packings) == 2
        assert torch.equal(layer(x), plain) and len(packings) == 3
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            twin.blkdiag1.zero_()
            assert torch.equal(twin(x), twin.bias.expand(5, -1)) and torch.equal(layer(x), plain)
        assert len(packings) == 5
        assert torch.equal(layer.double().float()(x), plain)
        functional = torch.func.functional_call(layer, {"blkdiag1": torch.zeros_like(layer.blkdiag1)}, (x,))
        assert torch.equal(functional, layer.bias.expand(5, -1))


def test_weights_are_not_packed_where_that_cannot_be_kept(packings):
    layer, x = MonarchLinear(14, 18).pack(), torch.randn(5, 14)
    expected = layer(x).detach()  # records a gradient
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(layer).eval()(x), expected)
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(x)).shape == (5, 18)
        assert torch.equal(copy.deepcopy(layer).share_memory()(x), expected)
    with torch.inference_mode():
        made = MonarchLinear(14, 18).pack()  # its parameters count no changes
        made.load_state_dict(layer.state_dict())
        assert torch.equal(made(x), expected)
    assert not packings


def test_packed_weights_in_a_transform(packings):
    """A frozen layer within ``torch.func.grad`` packs in each call, and as before behind it."""
    layer, x = MonarchLinear(14, 18).pack(), torch.randn(5, 14)

    def scaled(factor):
        with torch.no_grad():
            out = layer(x)
        return (factor * out).sum()

    found = torch.func.grad(scaled)(torch.ones(()))
    with torch.no_grad():
        assert not packings
        torch.testing.assert_close(found, layer(x).sum())
        assert len(packings) == 1


def test_vmap_over_inputs_and_over_layers():
    layers = [MonarchLinear(14, 18, dtype=torch.float64) for _ in range(3)]
    x = torch.randn(3, 5, 14, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(layers[0])(x), layers[0](x))
    parameters, buffers = torch.func.stack_module_state(layers)

    def call(parameters, buffers, x):
        return torch.func.functional_call(layers[0], (parameters, buffers), (x,))

    out = torch.func.vmap(call)(parameters, buffers, x)
    torch.testing.assert_close(out, torch.stack([layer(rows) for layer, rows in zip(layers, x, strict=True)]))
    biases = {"bias": parameters["bias"]}  # no other parameter, and no input, has a batch
    out = torch.func.vmap(lambda bias: torch.func.functional_call(layers[0], bias, (x[0],)))(biases)
    without = layers[0](x[0]) - layers[0].bias
    torch.testing.assert_close(out, without + parameters["bias"].unsqueeze(1))


@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 0, 16)])
def test_leading_dimensions(shape):
    assert MonarchLinear(16, 10)(torch.zeros(shape)).shape == (*shape[:-1], 10)


def not_finite():
    linear = nn.Linear(4, 4)
    nn.init.constant_(linear.weight, torch.nan)
    return linear


FROM = "MonarchLinear.from_linear: linear"
BAD = {
    "nblocks is 0, takes an integer": lambda: MonarchLinear(4, 4, 0),
    "nblocks is True, takes an integer": lambda: MonarchLinear(4, 4, True),
    "in_features is 0, takes an integer": lambda: MonarchLinear(0, 4),
    "nblocks is 2.0, takes an integer": lambda: MonarchLinear.from_linear(nn.Linear(4, 4), 2.0),
    r"MonarchLinear: x has shape \(2, 5\), takes \(..., 4\)": lambda: MonarchLinear(4, 4)(torch.zeros(2, 5)),
    r"MonarchLinear: x has shape \(\), takes": lambda: MonarchLinear(4, 4)(torch.zeros(())),
    f"{FROM} is a Conv1d, takes a torch.nn.Linear": lambda: MonarchLinear.from_linear(nn.Conv1d(4, 4, 1)),
    f"{FROM} has a weight of torch.complex64 on cpu": lambda: MonarchLinear.from_linear(
        nn.Linear(4, 4, dtype=torch.complex64)
    ),
    f"{FROM} has a weight of torch.float32 on meta": lambda: MonarchLinear.from_linear(nn.Linear(4, 4, device="meta")),
    f"{FROM} has a weight with NaN": lambda: MonarchLinear.from_linear(not_finite()),
}


@pytest.mark.parametrize("text", BAD)
def test_bad_arguments_are_named(text):
    with pytest.raises(RuntimeError, match=text) as raised:
        BAD[text]()
    assert str(raised.value).startswith("vitkernels.nn.")
