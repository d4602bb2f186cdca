"""Attention in windows and grids on a GPU: agreement with float64, traffic, and what has no kernels."""

import pytest
import torch
import vitkernels as vk
from support.devices import HALF
from support.emulation import conflicts, nbytes, needs_emulator
from support.operands import ROUNDING, tokens
from vitkernels import reference

pytestmark = needs_emulator


def operands(b=1, size=(14, 14), h=2, d=32, v=None, kv_heads=None, dtype=torch.bfloat16):
    g = kv_heads or h
    return (
        tokens(b, *size, h, d, dtype=dtype), tokens(b, *size, g, d, dtype=dtype, seed=1),
        tokens(b, *size, g, v or d, dtype=dtype, seed=2),
    )  # fmt: skip


def table(*shape, scale=1.0):
    return tokens(*shape, dtype=torch.float32, seed=3) * scale


def axes_of(call, name, size, shift=0):
    """Windows of a size and with a shift, or a grid of a size, of one number or one for each axis."""
    sizes = call[0].shape[1:-2]
    each = [value if isinstance(value, tuple) else (value,) * len(sizes) for value in (size, shift)]
    if name == "grid":
        return [vk.Full(step=n // g) for n, g in zip(sizes, each[0], strict=True)]
    return [vk.Block(n, offset) for n, offset in zip(*each, strict=True)]


def attend(function, call, axes, options, grads=None):
    """Output, LSE, and the gradients of operands and terms."""
    leaves = [t.detach().requires_grad_() for t in (*call, *options.values()) if isinstance(t, torch.Tensor)]
    rest = iter(leaves[3:])
    terms = {n: next(rest) if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    results = function(*leaves[:3], axes, return_lse=True, **terms)
    return results, torch.autograd.grad(results, leaves, grads) if grads else ()


def on_rounded_units(dtype):
    """The reference, which sees unit vectors as kernels do: in the operands' dtype."""

    def rounded(t):
        unit = t / t.norm(dim=-1, keepdim=True)
        return unit + (unit.to(dtype).double() - unit).detach()

    def function(query, key, value, axes, *, qk_norm=None, **options):
        if qk_norm:
            query, key = rounded(query), rounded(key)
        return reference.spatial_attention(query, key, value, axes, **options)

    return function


def check(call, name, *sizes, is_differentiated=True, **options):
    """Against float64: the output in units of the dtype's rounding, the LSE to float32's, gradients of the largest."""
    dtype, shape, axes = call[0].dtype, call[0].shape, axes_of(call, name, *sizes)
    grads = tokens(*shape[:-1], call[2].size(-1), dtype=dtype, seed=5), tokens(*shape[:-1], dtype=torch.float32, seed=6)
    found = attend(vk.spatial_attention, call, axes, options, grads if is_differentiated else None)
    wide = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    doubles = [t.double() for t in call], axes, wide, [t.double() for t in grads]
    (out, lse), expected = attend(on_rounded_units(dtype), *doubles)
    assert found[0][0].dtype == dtype
    largest = max(1.0, call[2].double().abs().max().item())
    assert (found[0][0].double() - out).abs().max() <= 2 * ROUNDING[dtype] * largest
    torch.testing.assert_close(found[0][1].double(), lse, rtol=2e-6, atol=2e-4)
    for i, (one, other) in enumerate(zip(found[1], expected, strict=False)):
        error = (one.double() - other).abs().max() / other.abs().max().clamp(min=1e-30) / ROUNDING[dtype]
        assert error <= 4, f"{[*'qkv', *options][i]}: {error:.2f}"
    return found


def kernels_of(emulator):
    return [launch.kernel.removeprefix("vitkernels::") for launch in emulator.launches()]


CALLS = [
    ("window", {}, (7,)), ("window", {}, (7, 3)), ("window", {"size": (8, 16)}, (8, 5)),
    ("window", {"size": (14, 7)}, (7, (3, 2))),
    ("window", {"size": (6, 4), "d": 8}, ((3, 1), (2, 0))),
    ("window", {"size": (48,), "d": 64}, (16, 1)), ("window", {"size": (64,)}, (64,)),
    ("window", {"size": (4, 6, 8), "d": 24}, ((2, 3, 4), (1, 1, 3))),
    ("window", {"size": (2, 2), "h": 1}, (1,)), ("window", {"size": (4, 4)}, ((1, 4), (0, 1))),
    ("window", {"b": 3, "h": 6, "kv_heads": 2, "d": 48, "v": 40}, (7, 6)),
    ("window", {"d": 16, "v": 56}, (7,)), ("window", {"d": 64, "v": 8}, (7, 1)),
    ("window", {"size": (5, 5)}, (9,)),
    ("grid", {}, (7,)), ("grid", {"size": (12, 8), "b": 2}, ((3, 4),)),
    ("grid", {"size": (30,), "d": 64}, (10,)),
]  # fmt: skip


@pytest.mark.parametrize("has_table", [False, True], ids=["plain", "table"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("name", "shape", "sizes"), CALLS, ids=str)
def test_shapes(name, shape, sizes, dtype, has_table, cuda_kernels):
    call = operands(**shape, dtype=dtype)
    axes, heads = call[0].dim() - 3, call[0].size(-2)
    window = sizes[0] if isinstance(sizes[0], tuple) else sizes[:1] * axes
    options = {"bias_table": table(heads, *(2 * size - 1 for size in window))} if has_table else {}
    has_groups = "kv_heads" in shape  # of heads with the same keys: without gradients
    check(call, name, *sizes, is_differentiated=not has_groups, **options)
    names = ["window_attention"] if has_groups else ["window_attention", "window_attention_backward"]
    assert [n.split("<")[0] for n in kernels_of(cuda_kernels)][: len(names)] == names


@pytest.mark.parametrize("shift", [0, 3])
def test_shared_table(shift, cuda_kernels):
    """... of all heads, and of more offsets."""
    check(operands(h=3), "window", 7, shift, scale=0.3, bias_table=table(1, 13, 15))


def test_blocks_of_many_windows(cuda_kernels):
    """Of which the last one has fewer."""
    check(operands(b=685, size=(2, 6), h=1, d=8), "window", 2, (0, 1), bias_table=table(1, 3, 3))
    assert {launch.grid[0] for launch in cuda_kernels.launches() if "window" in launch.kernel} == {1028}


def test_same_bits_in_every_run(cuda_kernels):
    call, bias = operands(b=2), table(2, 13, 13)
    found = check(call, "window", 7, 3, bias_table=bias)
    cuda_kernels.configure(multiprocessors=132, seed=1)
    again = check(call, "window", 7, 3, bias_table=bias)
    assert all(torch.equal(a, b) for a, b in zip(found[0] + found[1], again[0] + again[1], strict=True))


@pytest.mark.parametrize("size", [1e2, 3e3, 1e5, 1e9], ids=str)
def test_large_logits(size, cuda_kernels):
    query, key, value = operands()
    axes = [vk.Block(7, 3)] * 2
    found, lse = vk.spatial_attention(query * size, key, value, axes, return_lse=True)
    wide = [t.double() for t in (query * size, key, value)]
    expected, expected_lse = reference.spatial_attention(*wide, axes, return_lse=True)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-4)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02 + min(1.0, size * 2.0**-19) * 4)


def test_any_strides(cuda_kernels):
    """Rows are read from where they are, or if they are not one distance apart from a copy."""
    packed = tokens(2, 14, 14, 3, 2, 32)
    check(packed.unbind(3), "window", 7, 3)
    check([t[:, ::2, :, :, :24] for t in operands(size=(28, 14))], "window", 7, 3)
    check([t[..., 1:25] for t in operands()], "window", 7)
    check([t.transpose(1, 2) for t in operands(size=(7, 21))], "window", 7, 2)
    check([t[:1].expand(3, -1, -1, -1, -1) for t in operands()], "window", 7)
    check([t[:, :, :1].expand(-1, -1, 14, -1, -1) for t in operands()], "window", 7)
    check([t[:, :1].expand(-1, 14, -1, -1, -1) for t in operands()], "window", 7)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_expanded_gradients(axis, cuda_kernels):
    """As autograd makes them of a sum over an axis."""
    call = [t.requires_grad_() for t in operands(size=(2, 7, 7))]
    out = vk.spatial_attention(*call, [vk.Full(), *[vk.Block(7)] * 2])
    weights = tokens(*out.sum(axis).shape, dtype=out.dtype, seed=3)
    found = torch.autograd.grad((out.sum(axis) * weights).sum(), call, retain_graph=True)
    expected = torch.autograd.grad(out, call, weights.unsqueeze(axis).expand_as(out).contiguous())
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_small_gradients(dtype, cuda_kernels):
    """Those of logits have few bits in float16, whatever becomes of them later."""
    call = [t.requires_grad_() for t in operands(dtype=dtype)]
    wide = [t.detach().double().requires_grad_() for t in call]
    axes = [vk.Block(7)] * 2
    for scale, size in ((None, 1e-4), (1e-3, 1e-2)):
        grad_out = (tokens(1, 14, 14, 2, 32, seed=3) * size).to(dtype)
        found = torch.autograd.grad(vk.spatial_attention(*call, axes, scale=scale), call, grad_out)
        loss = reference.spatial_attention(*wide, axes, scale=scale)
        for one, other in zip(found, torch.autograd.grad(loss, wide, grad_out.double()), strict=True):
            assert (one.double() - other).abs().max() <= 4 * ROUNDING[dtype] * other.abs().max()


def test_lowest_tables(cuda_kernels):
    """A table of the lowest number hides nothing: there is no other."""
    query, key, value = operands()
    lowest = torch.full((2, 13, 13), torch.finfo(torch.float32).min)
    even = vk.window_attention(query * 0, key, value, 7)
    torch.testing.assert_close(vk.window_attention(query, key, value, 7, bias_table=lowest), even, rtol=0, atol=0.02)
    assert set(kernels_of(cuda_kernels)) == {"window_attention"}


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_of_lowest_tables(dtype, cuda_kernels):
    """The log-sum-exp of a row is the lowest number too, whatever the number of its keys."""
    call = [t.requires_grad_() for t in operands(dtype=dtype)]
    wide = [t.detach().double().requires_grad_() for t in call]
    lowest = torch.full((2, 13, 13), torch.finfo(torch.float32).min)
    grad_out = tokens(1, 14, 14, 2, 32, seed=3).to(dtype)
    found = torch.autograd.grad(vk.window_attention(*call, 7, bias_table=lowest), call, grad_out)
    query, key, value, grad = (
        t.unflatten(2, (2, 7)).unflatten(1, (2, 7)).permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)
        for t in (*wide, grad_out)
    )  # (b,windows,windows,h,7 * 7,d)
    logits = query @ key.mT * 32**-0.5  # what they add to the lowest number is lost, but not their gradient
    out = (logits - logits.detach()).softmax(-1) @ value
    for one, other in zip(found, torch.autograd.grad(out, wide, grad.double()), strict=True):
        assert (one.double() - other).abs().max() <= 4 * ROUNDING[dtype] * other.abs().max()
    assert set(kernels_of(cuda_kernels)) == {"window_attention", "window_attention_backward"}


@pytest.mark.parametrize(
    ("axes", "offsets"),
    [
        ([vk.Full(), vk.Block(4, 2)], (1, 3)), ([vk.Block(4), vk.Block(6, 2)], (7, 7)),
        ([vk.Block(3), vk.Block(7, 1)], (5, 11)),
    ],
    ids=str,
)  # fmt: skip
def test_tables_of_the_pairs_that_are_seen(axes, offsets, cuda_kernels):
    """A shift of the only window leaves no pair with the largest offsets, and tables need not have them."""
    sizes = [axis.size if isinstance(axis, vk.Block) else 1 for axis in axes]
    call = [t.requires_grad_() for t in (*operands(size=sizes), torch.randn(2, *offsets))]
    wide = [t.detach().double().requires_grad_() for t in call]

    def gradients(where, query, key, value, table):
        out = where.spatial_attention(query, key, value, axes, bias_table=table)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
        return torch.autograd.grad((out * weights).sum(), (query, key, value, table))

    for one, other in zip(gradients(vk, *call), gradients(reference, *wide), strict=True):
        assert (one.double() - other).abs().max() <= 8 * ROUNDING[torch.bfloat16] * other.abs().max()
    assert "window_attention" not in kernels_of(cuda_kernels)


def test_padding_is_never_read(cuda_kernels):
    def padded(t):
        wide = torch.full((*t.shape[:-1], t.size(-1) + 8), torch.nan, dtype=t.dtype)
        wide[..., :-8] = t
        return wide[..., :-8]

    check([padded(t) for t in operands(d=24)], "window", 7, 3)


def test_nan_stays_in_its_window(cuda_kernels):
    query, key, value = operands(size=(14, 14))
    key[0, 2, 3], value[0, 9, 9] = torch.nan, torch.nan
    out = vk.window_attention(query, key, value, 7)
    hit = torch.zeros(14, 14, dtype=torch.bool)
    hit[:7, :7] = hit[7:, 7:] = True
    assert torch.equal(out.isnan().flatten(3).any(-1)[0], hit)


HEAD_SCALES = {"usual": (14.0, 100.0, 0.8), "signs": (-3.0, 5.0, -0.7), "small": (0.0, 1e-3, 2.0)}


@pytest.mark.parametrize("has_table", [False, True], ids=["plain", "table"])
@pytest.mark.parametrize("norm", [None, "l2"], ids=["scaled", "cosine"])
@pytest.mark.parametrize("name", HEAD_SCALES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_head_scale(dtype, name, norm, has_table, cuda_kernels):
    """SwinV2's cosine attention, and a scale of each head that may be negative."""
    for shape, sizes in (({}, (7, 3)), ({"size": (8, 8), "d": 64}, (8,)), ({"size": (6, 5), "v": 8}, (5,))):
        call = operands(h=3, **shape, dtype=dtype)
        options = {"bias_table": table(3, *[2 * sizes[0] - 1] * 2)} if has_table else {}
        scale = torch.tensor(HEAD_SCALES[name]) * (1.0 if norm else 0.1)
        launched = len(cuda_kernels.launches())
        check(call, "window", *sizes, scale=scale, qk_norm=norm, **options)
        names = [n.split("<")[0] for n in kernels_of(cuda_kernels)[launched:]]
        is_divided = call[0].size(1) % sizes[0] == 0
        assert (names[:2] == ["window_attention", "window_attention_backward"]) == is_divided
        assert ("unit_rows" in names) == (norm is not None and not is_divided)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_norms(dtype, cuda_kernels):
    """Of any size, in the kernel of small windows and before the others; vectors of zeros stay as they are."""
    query, key, value = operands(dtype=dtype)
    sizes = torch.logspace(-3, 3, 196).view(1, 14, 14, 1, 1)
    call = (query.float() * sizes).to(dtype), (key.float() * sizes.flip(1, 2)).to(dtype), value
    axes = [vk.Block(7)] * 2
    grads = tokens(*value.shape, dtype=dtype, seed=5), tokens(*value.shape[:-1], dtype=torch.float32, seed=6)
    (out, lse), found = attend(vk.spatial_attention, call, axes, {"qk_norm": "l2", "scale": 3.0}, grads)
    wide = [t.double() for t in call]
    expected, exact = attend(on_rounded_units(dtype), wide, axes, {"qk_norm": "l2", "scale": 3.0},
                             [t.double() for t in grads])  # fmt: skip
    torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(out.double(), expected[0], rtol=0, atol=2 * ROUNDING[dtype])
    for one, other, factor in zip(found, exact, (sizes, sizes.flip(1, 2), 1.0), strict=True):
        assert ((one.double() - other) * factor).abs().max() <= 4 * ROUNDING[dtype] * (other * factor).abs().max()
    general = [t.clone().requires_grad_() for t in call]
    call = [t.clone().requires_grad_() for t in call]
    with torch.no_grad():
        for t in (*call[:2], *general[:2]):
            t[0, 1, 2] = 0.0
    found = torch.autograd.grad(vk.spatial_attention(*call, axes, qk_norm="l2", scale=3.0), call, grads[0])
    masked = torch.zeros(14, 14)  # takes the general kernels
    out = vk.spatial_attention(*general, axes, qk_norm="l2", scale=3.0, key_bias=masked)
    for one, other in zip(found, torch.autograd.grad(out, general, grads[0]), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=0.05, atol=2 * ROUNDING[dtype] * other.abs().max().item())
    assert {"unit_rows", "window_attention_backward"} <= {n.split("<")[0] for n in kernels_of(cuda_kernels)}


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_norms_of_grouped_heads(dtype, cuda_kernels):
    """Forward and backward round the same unit vectors: with a large scale, others would have other probabilities."""
    call = [t.requires_grad_() for t in operands(h=4, kv_heads=2, dtype=dtype)]
    wide = [t.detach().double().requires_grad_() for t in call]
    grad, axes = tokens(*call[0].shape, dtype=dtype, seed=5), [vk.Block(7)] * 2
    options = {"qk_norm": "l2", "scale": 1e6}
    found = torch.autograd.grad(vk.spatial_attention(*call, axes, **options), call, grad)
    expected = torch.autograd.grad(on_rounded_units(dtype)(*wide, axes, **options), wide, grad.double())
    assert all(t.isfinite().all() for t in found)
    assert (found[2].double() - expected[2]).abs().max() <= 4 * ROUNDING[dtype] * expected[2].abs().max()


@pytest.mark.parametrize("norm", [None, "l2"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("d", [32, 64])
def test_traffic(d, dtype, norm, cuda_kernels):
    """Operands are read once and results written once; a block reads its head's table once. Up to 32 columns meet no
    bank conflict."""
    call, bias = operands(b=2, size=(28, 28), d=d, dtype=dtype), table(2, 13, 13)
    out, lse = vk.window_attention(*call, 7, 3, bias_table=bias, qk_norm=norm, return_lse=True)
    (counters,) = cuda_kernels.counters().values()
    (launch,) = cuda_kernels.launches()
    tables = counters.read.total - nbytes(*call)
    assert 0 <= tables <= launch.grid[0] * 32 * 49 * 49, "a sector for each logit at most"
    assert counters.read.distinct == nbytes(*call) + -(-nbytes(bias) // 32) * 32
    assert counters.written.distinct == nbytes(out, lse)
    assert d > 32 or conflicts(counters) == {}


@pytest.mark.parametrize("norm", [None, "l2"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_traffic_of_the_backward(dtype, norm, cuda_kernels):
    """Operands are read once and gradients written once, and a part of the table's gradient for each block."""
    call, bias = [t.requires_grad_() for t in operands(b=2, size=(28, 28), dtype=dtype)], table(2, 13, 13)
    out, lse = vk.window_attention(*call, 7, 3, bias_table=bias.requires_grad_(), qk_norm=norm, return_lse=True)
    grad_out = tokens(*out.shape, dtype=dtype, seed=5)
    grads = torch.autograd.grad(out, (*call, bias), grad_out)
    name = next(name for name in cuda_kernels.counters() if "window_attention_backward" in name)
    counters = cuda_kernels.counters()[name]
    (blocks,) = (launch.grid[0] for launch in cuda_kernels.launches() if "window_attention_backward" in launch.kernel)
    tables = counters.read.total - nbytes(*call, grad_out)
    assert 0 <= tables <= 32 / 4 * nbytes(lse) + blocks * 32 * 49 * 49, "a sector for each logit and LSE at most"
    assert counters.read.distinct == nbytes(*call, grad_out, lse) + -(-nbytes(bias) // 32) * 32
    assert nbytes(*grads[:3]) <= counters.written.total <= nbytes(*grads[:3]) + blocks * nbytes(bias)


GENERAL = {
    "float32": lambda: vk.window_attention(*operands(dtype=torch.float32), 7),
    "head-dim-20": lambda: vk.window_attention(*operands(d=20), 7),
    "head-dim-72": lambda: vk.window_attention(*operands(d=72), 7),
    "uneven": lambda: vk.window_attention(*operands(size=(15, 14)), 7),
    "neighborhood": lambda: vk.na2d(*operands(), 3), "large": lambda: vk.window_attention(*operands(), 14),
    "key-bias": lambda: vk.window_attention(*operands(), 7, key_bias=torch.zeros(14, 14)),
    "negative-scale": lambda: vk.window_attention(*operands(), 7, scale=-1.0),
    "rel-pos": lambda: vk.window_attention(*operands(), 7, rel_pos=[torch.zeros(13, 32)] * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", GENERAL)
def test_other_calls_take_the_general_kernels(name, cuda_kernels):
    GENERAL[name]()
    assert kernels_of(cuda_kernels)[-1].startswith("spatial_attention")


def test_empty_batch(cuda_kernels):
    out = vk.window_attention(*operands(b=0), 7)
    assert out.shape == (0, 14, 14, 2, 32) and kernels_of(cuda_kernels) == []
