"""Linear attention on a GPU: agreement with float64, sums that no 16-bit number holds, traffic, and what is refused."""

import pytest
import torch
import vitkernels as vk
from support.devices import HALF, ON_TENSOR_CORES
from support.emulation import nbytes, needs_emulator
from support.hostile import GOOD, HOSTILE, KEYS, QUERIES, are_disjoint, spans, uncovered
from support.operands import ROUNDING, tokens
from vitkernels import reference

pytestmark = needs_emulator

MAPS = ("identity", "relu", "elu", "exp", "focused")


def operands(q=200, k=300, h=2, g=None, d=32, v=None, b=1, dtype=torch.bfloat16):
    return [
        tokens(b, q, h, d, dtype=dtype), tokens(b, k, g or h, d, dtype=dtype, seed=1),
        tokens(b, k, g or h, v or d, dtype=dtype, seed=2),
    ]  # fmt: skip


def differentiate(function, call, grad_out, **options):
    leaves = [t.detach().requires_grad_() for t in call]
    out = function(*leaves, **options)
    return out, *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


def check(call, units=4, **options):
    """The output and the gradients against float64, in units of the dtype's rounding of their largest number."""
    dtype = call[0].dtype
    grad_out = tokens(*call[0].shape[:-1], call[2].size(-1), dtype=dtype, seed=5)
    found = differentiate(vk.linear_attention, call, grad_out, **options)
    expected = differentiate(reference.linear_attention, [t.double() for t in call], grad_out, **options)
    for name, one, other in zip(("out", *"qkv"), found, expected, strict=True):
        assert one.dtype == dtype
        error = (one.double() - other).abs().max() / other.abs().max() / ROUNDING.get(dtype, 2.0**-22)
        assert error <= units, f"{name}: {error:.2f}"
    return found


SHAPES = {
    "split": {"k": 1100, "q": 600}, "groups": {"h": 4, "g": 2, "d": 64, "b": 2}, "odd": {"d": 13, "v": 7, "k": 90},
    "wide-value": {"d": 24, "v": 64, "q": 65}, "wide-key": {"d": 64, "v": 8, "q": 1, "k": 128},
    "wide": {"d": 104, "v": 128, "k": 140, "h": 1},
}  # fmt: skip


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, dtype, feature_map, cuda_kernels):
    call = operands(**SHAPES[name], dtype=dtype)
    if name == "wide" and (dtype != torch.bfloat16 or feature_map == "focused"):
        pytest.skip("what becomes float32 has a head dimension of at most 64")
    normalize = feature_map != "identity"
    check(call, feature_map=feature_map, normalize=normalize, scale=0.7, eps=1e-3 if normalize else 0.0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_many_keys(dtype, cuda_kernels):
    """Sums of features and values that float16 does not hold, and denominators whose reciprocals it does not."""
    query, key, value = operands(q=70, k=3000, h=1, dtype=dtype)
    found = check([query * 20, key * 20, value * 20])
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rows_without_features(dtype, cuda_kernels):
    """... are zero, and do not spoil those beside them, whatever their denominator is."""
    call = operands(dtype=dtype)
    call[0][:, ::3] = -1.0
    for eps in (1e-6, 0.0):
        found = check(call, eps=eps)
        assert (found[0][:, ::3] == 0).all()


@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
def test_queries_with_small_denominators(dtype, cuda_kernels):
    """... leave the gradients of the others as they are: their own may be millions of times larger."""
    query, key, value = operands(q=64, k=128, h=1, dtype=dtype)
    key[..., 0] = -key[..., 0].abs()  # no key is active in this column, and the first query only there
    query[:, 0] = -query[:, 0].abs()
    query[:, 0, :, 0] = 1.0
    check([query, key, value])


def test_range_of_features(cuda_kernels):
    """float16 would not hold the norm of a row in one column, nor exponentials."""
    query, key, value = operands(q=40, k=40, d=32, dtype=torch.float16)
    for feature_map, size in (("focused", 1e4), ("exp", 5.0)):
        out = vk.linear_attention(query * size, key * size, value, feature_map=feature_map)
        wide = [t.double() for t in (query * size, key * size, value)]
        torch.testing.assert_close(
            out.double(), reference.linear_attention(*wide, feature_map=feature_map), rtol=0, atol=0.01
        )


@pytest.mark.serial  # it takes 11 GB
def test_distant_tokens(cuda_kernels):
    """From a token to the next there may be more bytes than 32 bits count."""
    query = torch.empty(2**30 + 64).as_strided((1, 2, 1, 8), (2**30, 2**30, 8, 1))
    query[0, 0, 0], query[0, 1, 0] = torch.arange(8.0) + 1, torch.arange(8.0) * torch.tensor([1.0, -1.0] * 4)
    key, value = tokens(1, 3, 1, 8, dtype=torch.float32), tokens(1, 3, 1, 8, dtype=torch.float32, seed=1)
    expected = vk.linear_attention(query.contiguous(), key, value)
    assert torch.equal(vk.linear_attention(query, key, value), expected)


def test_precision_of_float32(cuda_kernels):
    """TF32 only where PyTorch allows it."""
    call = operands(dtype=torch.float32)
    expected = reference.linear_attention(*[t.double() for t in call])
    exact = (vk.linear_attention(*call) - expected).abs().max()
    torch.set_float32_matmul_precision("high")
    try:
        rounded = (vk.linear_attention(*call) - expected).abs().max()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert exact < 2e-6 < rounded < 4e-3


def test_any_strides(cuda_kernels):
    packed = tokens(2, 100, 3, 2, 32)
    check(packed.unbind(2))
    check([t.transpose(1, 2).contiguous().transpose(1, 2) for t in operands()])
    check([t[:, ::2] for t in operands()])
    check([t[..., 1:26] for t in operands()], residual_v=0.0)
    check([t[:1].expand(3, -1, -1, -1) for t in operands()])


def test_residual(cuda_kernels):
    for feature_map in ("relu", "identity"):
        check(operands(q=150, k=150, h=4, g=2), feature_map=feature_map, residual_v=-0.5, eps=1e-2)


def test_same_bits_in_every_run(cuda_kernels):
    call = operands(k=1100, q=1100, dtype=torch.float16)
    found = check(call)
    cuda_kernels.configure(multiprocessors=132, seed=1)
    assert all(torch.equal(*both) for both in zip(found, check(call), strict=True))


@pytest.mark.parametrize("d", [32, 64, 128])
def test_traffic(d, cuda_kernels):
    """Every pass reads its tokens once and writes its results once; the state is small beside them."""
    query, key, value = (t.requires_grad_() for t in operands(q=1024, k=1024, h=2, d=d))
    out = vk.linear_attention(query, key, value)
    grads = torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    state = 2 * d * (d + 1) * 4
    expected = {  # tokens that are read, written, and states
        "linear_state": (nbytes(key, value), 0), "linear_output": (nbytes(query), nbytes(out)),
        "linear_grad_query": (nbytes(query, out), nbytes(grads[0])),
        "linear_grad_key": (nbytes(key, value), nbytes(*grads[1:])),
    }  # fmt: skip
    for name, (read, written) in expected.items():
        counters = cuda_kernels.counters()[f"vitkernels::{name}"]
        (blocks,) = (launch.grid[0] for launch in cuda_kernels.launches() if launch.kernel == f"vitkernels::{name}")
        assert read <= counters.read.distinct <= read + 2 * state
        assert written <= counters.written.total <= written + blocks // 2 * state
    assert cuda_kernels.counters()["vitkernels::linear_state"].read.total == nbytes(key, value)


def test_refusals(cuda_kernels):
    for change, text in (
        ({"dtype": torch.float64}, "query is float64 on CUDA, takes float32, bfloat16 or float16"),
        ({"d": 130}, "query or value has head dimension 130 on CUDA, takes at most 128"),
        (
            {"d": 65, "dtype": torch.float32},
            "query or value has head dimension 65 on CUDA, takes at most 64 in float32",
        ),
    ):
        with pytest.raises(RuntimeError, match=f"vitkernels::linear_attention: {text}"):
            vk.linear_attention(*operands(q=3, k=3, **change))


def test_nothing(cuda_kernels):
    for empty in ({"b": 0}, {"q": 0}, {"k": 0}):
        call = [t.requires_grad_() for t in operands(**empty)]
        out = vk.linear_attention(*call)
        assert (out == 0).all()
        assert all((t == 0).all() for t in torch.autograd.grad(out.sum(), call))


def by_sequence(query, key, value, of_queries, of_keys, **options):
    """Each sequence by itself; rows of no sequence are zero."""
    nothing = 0.0 * sum(t.sum() for t in (query, key, value))  # has gradients
    out = torch.zeros(*query.shape[:2], value.size(-1), dtype=query.dtype) + nothing
    for queries, keys in zip(of_queries, of_keys, strict=True):
        if queries:
            data = query[queries.start : queries.stop], *(t[keys.start : keys.stop] for t in (key, value))
            found = reference.linear_attention(*(t[None] for t in data), **options)[0]
            out = out.index_put((torch.tensor(queries),), found)
    return out


@pytest.mark.parametrize(
    ("are_queries", "are_keys"), [(True, False), (False, True), (True, True)], ids=["q", "k", "qk"]
)
@pytest.mark.parametrize("offsets", HOSTILE, ids=str)
def test_hostile_offsets(offsets, are_queries, are_keys, cuda_kernels):
    """Tokens that no sequence covers have results and gradients of zero, the others those of their sequence."""
    call = [tokens(n, 2, d, dtype=torch.float32, seed=n + d) for n, d in ((QUERIES, 8), (KEYS, 8), (KEYS, 5))]
    packing = [
        torch.tensor(offsets if is_it else good) for is_it, good in zip((are_queries, are_keys), GOOD, strict=True)
    ]
    of_queries, of_keys = (spans(o.tolist(), n, len(t)) for o, n, t in zip(packing, (4, 6), call[:2], strict=True))
    grad_out = tokens(QUERIES, 2, 5, dtype=torch.float32, seed=5)

    def function(*data, **options):
        return vk.linear_attention_varlen(*data, *packing, 4, 6, **options)

    out, *grads = differentiate(function, call, grad_out, eps=0.1)
    assert not any(t[uncovered(of_queries, QUERIES)].any() for t in (out, grads[0]))
    assert not any(t[uncovered(of_keys, KEYS)].any() for t in grads[1:])
    if are_disjoint(of_queries) and are_disjoint(of_keys):
        expected = differentiate(by_sequence, [t.double() for t in call], grad_out, of_queries=of_queries,
                                 of_keys=of_keys, eps=0.1)  # fmt: skip
        for one, other in zip((out, *grads), expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("longest", [(0, 6), (4, 0), (0, 0), (2**31, 2**31)], ids=str)
@pytest.mark.parametrize("offsets", [[0], [3], [0, 11], [-5, 20]], ids=str)
def test_hostile_lengths(offsets, longest, cuda_kernels):
    """No sequences, or none that may have tokens: the results are zeros."""
    call, packing = [tokens(11, 2, 8, dtype=torch.bfloat16, seed=i) for i in range(3)], torch.tensor(offsets)
    found = differentiate(lambda *data: vk.linear_attention_varlen(*data, packing, packing, *longest), call, call[0])
    is_empty = 0 in longest or offsets != [0, 11]
    assert all(t.isfinite().all() and bool(t.any()) != is_empty for t in found)


def test_head_map_out_of_range(cuda_kernels):
    """A query head whose kv head does not exist has results and gradients of zero."""
    call = operands(q=70, k=90, h=3, g=2)
    grad_out = tokens(*call[0].shape, seed=5)
    for wrong in (-1, 2, 2**62, -(2**63)):
        head_map = torch.tensor([0, wrong, 1])
        out, *grads = differentiate(vk.linear_attention, call, grad_out, head_map=head_map)
        assert not out[:, :, 1].any() and not grads[0][:, :, 1].any()
        two = [call[0][:, :, ::2], *call[1:]]
        found = differentiate(vk.linear_attention, two, grad_out[:, :, ::2])
        for one, other in zip((out[:, :, ::2], grads[0][:, :, ::2], *grads[1:]), found, strict=True):
            torch.testing.assert_close(one, other)
