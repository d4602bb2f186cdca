"""Products with Monarch matrices beyond the sample table: layouts, tasks, needs and errors."""

import pytest
import torch
import vitkernels as vk
from vitkernels._library import multiplies_bfloat16

op = vk.blockdiag_butterfly_multiply


def weights(first, second, dtype=torch.float32):
    return tuple(torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5 for shape in (first, second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 27, 28, 29, 113, 1576, 1793])
def test_rows_do_not_depend_on_each_other(rows, dtype):
    """Bit by bit, however rows are divided between tasks."""
    w1, w2 = weights((4, 24, 40), (4, 33, 24), dtype)
    x = torch.randn(rows, 160).to(dtype)
    whole = op(x, w1, w2)
    for part in (slice(rows // 2), slice(rows // 3, rows // 3 + 17), slice(rows - 1, rows)):
        assert torch.equal(op(x[part], w1, w2), whole[part])


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 4)])
def test_any_leading_dimensions(shape):
    w1, w2 = weights((2, 6, 5), (3, 7, 4))
    x = torch.randn(*shape, 10)
    out = op(x, w1, w2)
    assert out.shape == (*shape, 21)
    torch.testing.assert_close(out, vk.reference.blockdiag_butterfly_multiply(x, w1, w2), rtol=1e-5, atol=1e-5)


def test_strides():
    w1, w2 = weights((2, 6, 5), (2, 7, 6))
    whole = torch.randn(4, 9, 30)
    for x in (
        whole[..., 7:17],
        whole[:, ::2, :10],
        whole.transpose(0, 1)[..., :10],
        whole[..., ::3],
        whole[:1, :, :10].expand(3, 9, 10),
    ):
        assert torch.equal(op(x, w1, w2), op(x.contiguous(), w1, w2))
    assert torch.equal(op(whole[..., :10], w1.mT.contiguous().mT, w2), op(whole[..., :10], w1, w2))


def test_only_requested_gradients():
    x, (w1, w2) = torch.randn(40, 10), weights((2, 6, 5), (2, 7, 6))
    grad, inner = torch.randn(40, 14), torch.empty(0, 12)
    backward = torch.ops.vitkernels.blockdiag_butterfly_multiply_backward
    of_x, of_w1, of_w2, _ = backward(grad, x, w1, w2, None, 0, False, False, inner, True, True, False)
    for needs in ((True, False), (False, True), (False, False)):
        found = backward(grad, x, w1, w2, None, 0, False, False, inner, *needs, False)[:3]
        assert torch.equal(found[0], of_x)
        for need, given, expected in zip(needs, found[1:], (of_w1, of_w2), strict=True):
            assert torch.equal(given, expected) if need else given.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [0, 1])
def test_backward_reads_what_the_forward_kept_or_computes_it(dtype, activation):
    """With the same bits, where the forward has what it keeps in the dtype of x."""
    if dtype is torch.bfloat16 and not multiplies_bfloat16:
        pytest.skip("the intermediate is float32, and is not kept")
    x, (w1, w2) = torch.randn(300, 20).to(dtype), weights((4, 13, 5), (4, 19, 13), dtype)
    grad, bias = torch.randn(300, 76).to(dtype), torch.randn(76).to(dtype)
    forward = torch.ops.vitkernels.blockdiag_butterfly_multiply
    backward = torch.ops.vitkernels.blockdiag_butterfly_multiply_backward
    found = []
    for keeps in (False, True):
        given = (x, w1, w2, bias, activation, False, keeps)
        out, inner = forward(*given, None)
        assert inner.shape == (300 * keeps, 52)
        found.append((out, *backward(grad, *given, inner, True, True, True)))
    assert all(torch.equal(*each) for each in zip(*found, strict=True))
    torch.testing.assert_close(inner, torch.einsum("nib,iab->nia", x.unflatten(1, (4, 5)), w1).flatten(1))
    with pytest.raises(RuntimeError, match=r"inner has shape \(0, 52\), takes \(300, 52\)"):
        backward(grad, *given, inner[:0], True, True, True)


def test_the_intermediate_is_kept_for_what_reads_it():
    tensors = torch.randn(300, 20), *weights((4, 13, 5), (4, 19, 13)), torch.randn(76)

    def kept(*learning, dtype=torch.float32, **options):
        saved = []
        call = [t.detach().to(dtype).requires_grad_(i in learning) for i, t in enumerate(tensors)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
            op(*call, **options)
        return saved.count((300, 52))

    assert [kept(), kept(0), kept(1), kept(2), kept(3)] == [0, 0, 0, 1, 0]
    assert [kept(i, activation="gelu") for i in range(4)] == [1, 1, 1, 1]
    assert [kept(2, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)] == [0, int(multiplies_bfloat16)]
    with torch.autocast("cpu", torch.float16):
        assert kept(2) == 0
    with torch.no_grad():
        assert kept(2) == 0
    x, w1, w2, _ = tensors
    out, inner = torch.ops.vitkernels.blockdiag_butterfly_multiply(
        x.requires_grad_(), w1, w2, None, 0, False, True, None
    )
    assert out.requires_grad and not inner.requires_grad


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_an_intermediate_beyond_the_range_of_float16(activation):
    """It is float32 on the CPU, in the backward too."""
    call = [
        torch.full(shape, v, dtype=torch.float16) for shape, v in (((40, 8), 100), ((1, 8, 8), 200), ((1, 4, 8), 1e-4))
    ]
    grad = torch.full((40, 4), 1e-3, dtype=torch.float16)
    found, expected = (
        torch.autograd.grad(function(*leaves, activation=activation), leaves, grad.to(leaves[0].dtype))
        for function, leaves in (
            (op, [t.clone().requires_grad_() for t in call]),
            (vk.reference.blockdiag_butterfly_multiply, [t.double().requires_grad_() for t in call]),
        )
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_bias_in_either_dtype(dtype, activation):
    """The same results, and gradients in the bias's own dtype."""
    x, (w1, w2) = torch.randn(300, 20).to(dtype), weights((4, 12, 5), (4, 19, 12), dtype)
    grad, bias = torch.randn(300, 76).to(dtype), torch.randn(76).to(dtype)
    found = []
    for given in (bias, bias.float()):
        given.requires_grad_()
        out = op(x, w1, w2, given, activation=activation)
        (of_bias,) = torch.autograd.grad(out, given, grad)
        assert of_bias.dtype == given.dtype
        found.append((out, of_bias.to(dtype)))
    assert all(torch.equal(*each) for each in zip(*found, strict=True))
    expected = vk.reference.blockdiag_butterfly_multiply(
        x.double(), w1.double(), w2.double(), bias.double(), activation=activation
    )
    torch.testing.assert_close(found[0][0].double(), expected, rtol=2e-2, atol=2e-2)


def test_gelu_beyond_all_range():
    """Its tails, in relative error: what is negative and far has no cancellation."""
    x = torch.cat([torch.linspace(-13, 13, 4001), torch.tensor([-1e30, 1e30, float("inf"), float("nan")])])[:, None]
    one = torch.ones(1, 1, 1)
    expected = x.double() * torch.special.erfc(x.double() * -(0.5**0.5)) / 2  # PyTorch's own cancels, in float64 too
    found = op(x, one, one, activation="gelu").double()
    is_normal = expected.abs() > 1e-35
    torch.testing.assert_close(found[is_normal], expected[is_normal], rtol=2e-5, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_packed_weights_are_read_instead(dtype):
    x, (w1, w2) = torch.randn(70, 20).to(dtype), weights((4, 13, 5), (4, 19, 13), dtype)
    forward, pack = (getattr(torch.ops.vitkernels, f"blockdiag_butterfly_{name}") for name in ("multiply", "pack"))
    packed = pack(w1, w2)
    given = (None, 0, False, False)
    assert torch.equal(forward(x, w1, w2, *given, packed)[0], op(x, w1, w2))
    assert torch.equal(forward(x, w1.mul(2), w2, *given, packed)[0], op(x, w1, w2))
    with pytest.raises(RuntimeError, match=r"multiply: packed has shape \(\d+\), takes \(\d+\)"):
        forward(x, w1, w2, *given, packed[1:])
    with pytest.raises(RuntimeError, match="pack: w2 has shape"):
        pack(w1, w2[..., :9])


def test_no_row_is_a_gradient_of_zero():
    w1, w2 = (w.requires_grad_() for w in weights((2, 6, 5), (2, 7, 6)))
    grads = torch.autograd.grad(op(torch.randn(0, 10), w1, w2).sum(), (w1, w2))
    assert all(g.eq(0).all() for g in grads)


def test_nan_stays_in_its_row():
    x, (w1, w2) = torch.randn(90, 20).bfloat16(), weights((4, 12, 5), (4, 7, 12), torch.bfloat16)
    x[41, 3] = float("nan")
    assert op(x, w1, w2).isnan().any(-1).nonzero().flatten().tolist() == [41]


X, W1, W2 = torch.zeros(3, 10), torch.zeros(2, 6, 5), torch.zeros(3, 7, 4)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"x": None}, "x is None, takes a tensor"),
        ({"x": X[0, 0]}, "x has shape (), takes at least 1 dimension (..., k * p)"),
        ({"x": X.long()}, "x is int64, takes float64, float32, bfloat16 or float16"),
        ({"x": X[:, :9]}, "x has size 9 in dimension 1, takes 10 (the columns of w1's blocks together)"),
        ({"w1": W1[0]}, "w1 has shape (6, 5), takes 3 dimensions (k, q, p)"),
        ({"w1": W1.half()}, "w1 is float16, takes float32"),
        ({"w1": W1[:, :0]}, "w1 has shape (2, 0, 5), takes at least one element"),
        ({"w2": W2[0]}, "w2 has shape (7, 4), takes 3 dimensions (l, s, r)"),
        ({"w2": W2.double()}, "w2 is float64, takes float32"),
        ({"w2": W2[..., :3]}, "w2 has shape (3, 7, 3), takes 12 columns in all blocks together (w1's rows)"),
        ({"w2": [1.0]}, "w2 is a list, takes a tensor"),
        ({"bias": torch.zeros(20)}, "bias has shape (20), takes (21)"),
        ({"bias": torch.zeros(21).half()}, "bias is float16, takes float32"),
        ({"bias": 1.0}, "bias is a float, takes a tensor"),
        ({"activation": "relu"}, "activation is 'relu', takes 'none' or 'gelu'"),
        ({"activation": 1}, "activation is 1, takes 'none' or 'gelu'"),
    ],
)
def test_errors_are_the_callers(wrong, text):
    with pytest.raises(RuntimeError) as raised:
        op(**{"x": X, "w1": W1, "w2": W2} | wrong)
    assert str(raised.value).startswith("vitkernels::blockdiag_butterfly_multiply: ") and text in str(raised.value)
