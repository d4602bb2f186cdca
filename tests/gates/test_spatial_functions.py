"""The named calls of spatial attention: each is the pattern that it says it is, by an account of its own."""

import inspect

import pytest
import torch
import vitkernels as vk
from support.calls import differentiate
from support.devices import dtype_of
from support.samples import COVERING
from support.samples_named import NAMED_SAMPLES

DTYPE = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def qkv(*grid, b=2, h=4, g=None, d=6, v=5):
    kv_heads = g or h
    shapes = (h, d), (kv_heads, d), (kv_heads, v)
    return [torch.randn(b, *grid, *shape, dtype=DTYPE, requires_grad=True) for shape in shapes]


def agree(function, reference, *tensors):
    call = {f"t{i}": t for i, t in enumerate(tensors)}
    found, expected = (differentiate(lambda f=f, **call: f(*call.values()), call) for f in (function, reference))
    for a, b in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def rows(grid):
    """``(N, axes)``: coordinates of the tokens."""
    return torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid))


def dense(q, k, v, visible, bias=None, scale=None):
    """Attention over all pairs of tokens that ``visible (N, N)`` leaves, on the map of ``q``."""
    flat = [t.flatten(1, -3) for t in (q, k, v)]
    minus = torch.where(visible, 0.0, -torch.inf).to(DTYPE)
    out = vk.reference.attention(*flat, bias=minus if bias is None else minus + bias, scale=scale)
    return out.unflatten(1, q.shape[1:-2])


def swin_bias(table, grid, window, offset):
    """``(heads, N, N)`` from Swin's table; pairs of different windows have any entry."""
    sizes = torch.tensor([2 * w - 1 for w in window])
    place = (offset + torch.tensor(window) - 1).minimum(sizes - 1).clamp(min=0)
    index = place[..., 0]
    for axis in range(1, len(window)):
        index = index * sizes[axis] + place[..., axis]
    return table[index].permute(2, 0, 1)


@pytest.mark.parametrize(
    ("grid", "window", "shift"), [((12, 9), (4, 3), (2, 1)), ((11, 8), (4, 5), (0, 3)), ((9,), (4,), (1,))]
)
def test_window_attention(grid, window, shift):
    place = rows(grid)
    block = (place - torch.tensor(shift)).div(torch.tensor(window), rounding_mode="floor")
    visible = (block[:, None] == block).all(-1)
    table = torch.randn(torch.tensor([2 * w - 1 for w in window]).prod(), 4, dtype=DTYPE, requires_grad=True)

    def reference(q, k, v, table):
        return dense(q, k, v, visible, swin_bias(table, grid, window, place[:, None] - place))

    agree(lambda q, k, v, t: vk.window_attention(q, k, v, window, shift, bias_table=t), reference, *qkv(*grid), table)


def test_grid_attention():
    place = rows((8, 9))
    step = torch.tensor([8 // 4, 9 // 3])
    visible = (place[:, None] % step == place % step).all(-1)
    offset = place[:, None].div(step, rounding_mode="floor") - place.div(step, rounding_mode="floor")
    table = torch.randn(7 * 5, 4, dtype=DTYPE, requires_grad=True)

    def reference(q, k, v, table):
        return dense(q, k, v, visible, swin_bias(table, (8, 9), (4, 3), offset))

    agree(lambda q, k, v, t: vk.grid_attention(q, k, v, (4, 3), bias_table=t), reference, *qkv(8, 9), table)


@pytest.mark.parametrize("stride", [1, 2])
def test_halo_attention(stride):
    """Blocks by ``unfold`` of the padded map; queries are every other token where there is a stride."""

    def reference(q, k, v):
        def unfolded(t):  # [B, y, x, H, d, 8, 8]
            t = torch.nn.functional.pad(t.permute(0, 3, 4, 1, 2), (2, 2, 2, 2))
            return t.unfold(3, 8, 4).unfold(4, 8, 4).permute(0, 3, 4, 1, 2, 5, 6)

        size = 4 // stride
        blocks = q.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3, 4)  # [B, y, x, n, H, d]
        logits = torch.einsum("byxnhd,byxhdkl->byxhnkl", blocks, unfolded(k)).flatten(-2) / q.size(-1) ** 0.5
        out = torch.einsum("byxhnm,byxhdm->byxnhd", logits.softmax(-1), unfolded(v).flatten(-2))
        return out.unflatten(3, (size, size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    q, k, v = qkv(8, 12)
    agree(
        lambda q, k, v: vk.halo_attention(q, k, v, 4, 2, outside="zero"),
        reference,
        q[:, ::stride, ::stride].detach().requires_grad_(),
        k,
        v,
    )


@pytest.mark.parametrize("grid", [(13,), (9, 8), (4, 5, 6)])
def test_neighborhood_attention(grid):
    """NATTEN's neighborhoods, and its order of ``rpb``: by the offset of the key from the query."""
    place, kernel = rows(grid), 3
    centre = place.clamp(min=1).minimum(torch.tensor(grid) - 2)
    visible = ((place - centre[:, None]).abs() <= 1).all(-1)
    offset = (place - place[:, None]).clamp(-2, 2) + 2
    rpb = torch.randn(4, *(5,) * len(grid), dtype=DTYPE, requires_grad=True)
    call = {1: vk.na1d, 2: vk.na2d, 3: vk.na3d}[len(grid)]

    def reference(q, k, v, rpb):
        return dense(q, k, v, visible, rpb[(slice(None), *offset.unbind(-1))])

    agree(lambda q, k, v, rpb: call(q, k, v, kernel, rpb=rpb), reference, *qkv(*grid), rpb)


def test_neighborhood_attention_with_nattens_options():
    q, k, v = qkv(12, 13, h=4, g=2)
    extra = [torch.randn(2, 3, 2, n, dtype=DTYPE, requires_grad=True) for n in (6, 5)]
    axes = [vk.Neighborhood(5, 2, 2), vk.Neighborhood(3, 1, 4, is_causal=True)]

    def ours(q, k, v, *extra):
        return vk.na2d(q, k, v, (5, 3), (2, 1), (2, 4), (False, True), 0.3, *extra, return_lse=True)

    def reference(q, k, v, *extra):
        named = dict(zip(("additional_keys", "additional_values"), extra, strict=True))
        return vk.reference.spatial_attention(q, k, v, axes, scale=0.3, return_lse=True, **named)

    agree(ours, reference, q, k, v, *extra)


NATTEN = {
    "1d": ((17,), {"kernel_size": (5,), "stride": (3,), "dilation": (2,)}),
    "2d": ((9, 11), {"kernel_size": (3, 5)}),
    "2d, strided, dilated, causal on one axis": (
        (12, 13),
        {"kernel_size": (5, 3), "stride": (2, 1), "dilation": (2, 4), "is_causal": (False, True), "scale": 0.3},
    ),
    "3d": ((4, 6, 7), {"kernel_size": (3, 3, 5), "dilation": (1, 2, 1), "is_causal": (True, False, False)}),
}


@pytest.mark.parametrize("case", NATTEN)
def test_neighborhood_attention_is_nattens_own(case):
    """Its functions, in float32, the widest type that they take; on the CPU they have no gradients."""
    natten = pytest.importorskip("natten")
    grid, options = NATTEN[case]
    tensors = [torch.randn(2, *grid, 2, 8) for _ in range(3)]
    found, expected = (getattr(library, f"na{len(grid)}d")(*tensors, **options) for library in (vk, natten.functional))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_cross_shaped_window_attention():
    place = rows((7, 8))
    columns, lines = place[:, 1] // 3, place[:, 0] // 3
    visible = torch.stack([columns[:, None] == columns] * 2 + [lines[:, None] == lines] * 2)
    scale = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=DTYPE, requires_grad=True)
    agree(
        lambda q, k, v, s: vk.cross_shaped_window_attention(q, k, v, 3, scale=s),
        lambda q, k, v, s: dense(q, k, v, visible, scale=s),
        *qkv(7, 8),
        scale,
    )


@pytest.mark.parametrize("grid", [(6, 5), (1, 4), (4, 1), (1, 1)])
def test_criss_cross_attention(grid):
    place = rows(grid)
    visible = (place[:, None] == place).any(-1)
    agree(
        lambda q, k, v: vk.criss_cross_attention(q, k, v, scale=1.0),
        lambda q, k, v: dense(q, k, v, visible, scale=1.0),
        *qkv(*grid, h=4, g=2),
    )


CALLS = {
    "na2d": lambda q, k, v: vk.na2d(q, k, v, 3, dilation=2),
    "window": lambda q, k, v: vk.window_attention(q, k, v, 4, 2, return_lse=True),
    "grid": lambda q, k, v: vk.grid_attention(q, k, v, 4),
    "halo": lambda q, k, v: vk.halo_attention(q, k, v, 4, 1, outside="zero"),
    "stripes": lambda q, k, v: vk.cross_shaped_window_attention(q, k, v, 2),
    "criss-cross": lambda q, k, v: vk.criss_cross_attention(q, k, v),
}


EMPTY = CALLS | {
    "na2d": lambda q, k, v: vk.na2d(q, k, v, 3, dilation=(1, 1), return_lse=True),
    "window": lambda q, k, v: vk.window_attention(q, k, v, 4, 2, rel_pos=[torch.zeros(7, 6)] * 2, return_lse=True),
    "criss-cross": lambda q, k, v: vk.criss_cross_attention(q, k, v, return_lse=True),
}
ONE_OF_EACH = [
    next(s for s in (COVERING + NAMED_SAMPLES) if s.operator == name)
    for name in vk.functional.__all__
    if "scale" in inspect.signature(getattr(vk, name)).parameters and not name.startswith("linear_attention")
]


@pytest.mark.parametrize("function", CALLS.values(), ids=CALLS)
def test_compiles_once_for_all_sizes(function):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        for grid in ((12, 16), (16, 20), (20, 12)):
            tensors = qkv(*grid)
            agree(compiled, function, *tensors)
    torch._dynamo.reset()


@pytest.mark.parametrize("grid", [(0, 8), (8, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("function", EMPTY.values(), ids=EMPTY)
def test_empty_maps(function, grid):
    tensors = qkv(*grid)
    found = function(*tensors)
    for t in found if isinstance(found, tuple) else [found]:
        assert t.shape[:4] == (2, *grid, 4)
        t.sum().backward(retain_graph=True)
    assert all(t.grad.shape == t.shape for t in tensors)


@pytest.mark.parametrize("length", [0, 9])
def test_empty_map_of_one_axis(length):
    q, k, v = qkv(length)
    extra = [torch.randn(2, 3, 4, n, dtype=DTYPE) for n in (6, 5)]
    rpb = torch.randn(4, 5, dtype=DTYPE)
    out, lse = vk.na1d(q, k, v, 3, 1, 2, True, None, *extra, rpb=rpb, return_lse=True)
    assert out.shape == (2, length, 4, 5) and lse.shape == (2, length, 4)


def test_swins_name_of_the_shift():
    tensors = qkv(6, 8)
    found = vk.window_attention(*tensors, 4, shift_size=(1, 2))
    assert torch.equal(found, vk.window_attention(*tensors, 4, (1, 2)))


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("sample", ONE_OF_EACH, ids=str)
def test_one_scale_for_all_heads(sample, shape):
    call = sample.call(dtype_of(sample, DTYPE), sizes=sample.small())
    call["scale"] = torch.full(shape, 0.3, dtype=DTYPE, requires_grad=True)
    heads = call["query"].shape[-2]
    found = differentiate(sample.function, call)
    expected = differentiate(lambda scale, **rest: sample.function(scale=scale.reshape(1).expand(heads), **rest), call)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)
    assert call["scale"].shape == shape


TRACED = CALLS | {
    "strided halo": lambda q, k, v: vk.halo_attention(q[:, ::2, ::2], k, v, 4, 2),
    "pooled windows": lambda q, k, v: vk.window_attention(q, k[:, ::2, ::2], v[:, ::2, ::2], 4, 2),
    "grid, all options": lambda q, k, v: vk.grid_attention(
        q, k, v, (4, 2), bias_table=q[0, :7, :3, :, 0].permute(2, 0, 1), key_bias=k[:, 0, ..., 0, 0][:, None, None],
        additional_keys=k[:, 0, :3], additional_values=v[:, 0, :3], scale=q[0, 0, 0, :, 0], return_lse=True,
    ),
    "scaled by the size": lambda q, k, v: vk.spatial_attention(q, k, v, [vk.Block(q.shape[3])] * 2),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("function", TRACED.values(), ids=TRACED)
def test_a_trace_is_right_at_other_sizes(function):
    traced = torch.jit.trace(function, qkv(8, 16), check_trace=False)
    for grid in ((8, 16), (16, 8), (24, 16)):
        agree(traced, function, *qkv(*grid))


OF_SIZES = {
    "kernel_size": lambda n, x: vk.na2d(x, x, x, n // 2 - 1),
    "stride": lambda n, x: vk.na2d(x, x, x, 3, (1, n // 4)),
    "dilation": lambda n, x: vk.na2d(x, x, x, 3, 1, n // 4),
    "window_size": lambda n, x: vk.window_attention(x, x, x, n // 2),
    "shift": lambda n, x: vk.window_attention(x, x, x, 4, n // 4),
    "shift_size": lambda n, x: vk.window_attention(x, x, x, 4, shift_size=n // 4),
    "grid_size": lambda n, x: vk.grid_attention(x, x, x, n // 2),
    "block_size": lambda n, x: vk.halo_attention(x, x, x, n // 2, 1),
    "halo_size": lambda n, x: vk.halo_attention(x, x, x, 4, n // 4),
    "stripe_width": lambda n, x: vk.cross_shaped_window_attention(x, x, x, n // 2),
    "step": lambda n, x: vk.spatial_attention(x, x, x, [vk.Full(n // 4), vk.Full()]),
    "radius": lambda n, x: vk.spatial_attention(x, x, x, [vk.Full(), vk.Full()], radius=n / 4),
    "num_prefix_tokens": lambda n, x: vk.attention(
        *[x.flatten(1, 2)] * 3, bias_table=x.new_ones(2, 251), num_prefix_tokens=n // 4
    ),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("option", OF_SIZES)
def test_a_trace_does_not_take_an_option_of_another_size(option):
    """An option is a constant in a trace: what was computed from a size is right, or raises, at another."""

    def function(x):
        return OF_SIZES[option](x.shape[1], x)

    traced = torch.jit.trace(function, torch.randn(1, 8, 16, 2, 8), check_trace=False)
    agree(traced, function, torch.randn(2, 8, 16, 2, 8))
    with pytest.raises(RuntimeError, match=rf"vitkernels::\w+: {option} is not \d, as it was where this was traced"):
        traced(torch.randn(1, 16, 16, 2, 8))
