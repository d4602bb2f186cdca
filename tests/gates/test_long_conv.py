"""Long convolutions beyond the sample table: lengths, layouts, tasks, needs and errors."""

import pytest
import torch
import vitkernels as vk

op = vk.long_conv
backward = torch.ops.vitkernels.long_conv_backward


def signals(*shape, taps=None, dtype=torch.float32):
    channels, length = shape[-2:]
    return torch.randn(shape).to(dtype), torch.randn(channels, length if taps is None else taps).to(dtype)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 64, 127, 128, 255, 257, 385, 511, 512, 577, 1024, 1025, 2049, 3073, 4096])
def test_every_tap_reaches_its_lag(length, is_causal):
    """An impulse through random taps gives the taps, at any length of the transforms, whatever their factors."""
    for at in {0, length // 3, length - 1}:
        x = torch.zeros(1, 3, length, dtype=torch.float64)
        x[..., at] = 1
        _, taps = signals(3, length, taps=length if is_causal else 2 * length - 1, dtype=torch.float64)
        first = 0 if is_causal else length - 1
        expected = torch.nn.functional.pad(taps, (length, length))[:, length + first - at :][:, :length]
        torch.testing.assert_close(op(x, taps, is_causal=is_causal)[0], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (2, 0, 5, 7), (2, 3, 4, 5, 7)])
def test_any_leading_dimensions(shape):
    x, taps = signals(*shape)
    out = op(x, taps)
    assert out.shape == shape
    torch.testing.assert_close(out, vk.reference.long_conv(x, taps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_no_bit(dtype):
    whole, taps = signals(4, 40, 300, taps=61, dtype=dtype)
    tokens = torch.randn(3, 200, 40).to(dtype)
    for x in (
        whole[..., 7:207],
        torch.randn(3, 80, 200).to(dtype)[:, ::2],
        whole[::2, :, ::2],
        whole.transpose(0, 1)[:, :1].expand(40, 40, 300)[..., :150],
        tokens.transpose(1, 2),
        torch.randn(3, 200, 80).to(dtype)[..., ::2].transpose(1, 2),
        torch.randn(200, 3, 40).to(dtype).permute(1, 2, 0),
    ):
        plain, g = x.contiguous(), torch.randn_like(x.contiguous())
        assert torch.equal(op(x, taps), op(plain, taps))
        expected = backward(g, plain, taps, False, True, True)
        for found in (
            backward(g, x, taps.t().contiguous().t(), False, True, True),
            backward(g.mT.contiguous().mT, x, taps, False, True, True),
        ):
            assert all(map(torch.equal, found, expected))
        grad_x, grad_taps = backward(g.mT, x.mT, taps, True, True, True)
        assert torch.equal(grad_x.mT, expected[0]) and torch.equal(grad_taps, expected[1])


def test_layout_is_kept():
    tokens, taps = torch.randn(2, 33, 17), torch.randn(17, 33)
    assert op(tokens.mT, taps).mT.is_contiguous()
    assert op(tokens.mT.contiguous(), taps).is_contiguous()
    assert op(tokens[0].mT, taps).mT.is_contiguous()


@pytest.mark.parametrize("channels", [1, 16, 24, 800])
def test_batches_and_channels_do_not_depend_on_each_other(channels):
    """Bit by bit, however they are divided between tasks; another one's values may be much larger."""
    x, taps = signals(7, channels, 150)
    whole = op(x, taps)
    assert torch.equal(op(x[3:4], taps), whole[3:4])
    assert torch.equal(op(x[:, channels // 2 :], taps[channels // 2 :]), whole[:, channels // 2 :])
    x[0] *= 1e20
    assert torch.equal(op(x, taps)[1:], whole[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_channel(value):
    x, taps = signals(5, 20, 90)
    x[1, 3, 41] = value
    found = op(x, taps).isfinite().logical_not()
    assert found[1, 3].all() and found.sum() == 90


@pytest.mark.parametrize("channels", [3, 800])
def test_only_requested_gradients(channels):
    x, taps = signals(2, channels, 50)
    grad = torch.randn_like(x)
    of_x, of_taps = backward(grad, x, taps, False, True, True)
    without = backward(grad, x, taps, False, True, False)
    assert torch.equal(without[0], of_x) and without[1].numel() == 0 and of_taps.shape == taps.shape


def test_gradients_add_up_over_the_batch():
    """Also where the batch is divided between tasks, whose sums are added up in the end."""
    x, taps = signals(9, 5, 70, dtype=torch.float64)
    grad = torch.randn_like(x)
    whole = backward(grad, x, taps, False, True, True)[1]
    one_by_one = [backward(grad[b : b + 1], x[b : b + 1], taps, False, True, True)[1] for b in range(9)]
    torch.testing.assert_close(whole, torch.stack(one_by_one).sum(0), rtol=1e-12, atol=1e-12)


def test_no_batch_is_a_gradient_of_zero():
    taps = torch.randn(3, 7, requires_grad=True)
    (grad,) = torch.autograd.grad(op(torch.randn(0, 3, 7), taps).sum(), taps)
    assert grad.eq(0).all()


X, TAPS = torch.zeros(2, 3, 7), torch.zeros(3, 7)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"x": None}, "x is None, takes a tensor"),
        ({"x": X[0, 0]}, "x has shape (7,), takes at least 2 dimensions (..., channels, N)"),
        ({"x": X.long()}, "x is int64, takes float64, float32, bfloat16 or float16"),
        ({"x": X[..., :0]}, "x has shape (2, 3, 0), takes at least one position"),
        ({"x": X[:, :2]}, "filter has size 3 in dimension 0, takes 2 (the channels of x)"),
        ({"x": X[..., :6]}, "filter has 7 taps, takes 1 to 6 (the length of x) if it is causal"),
        ({"filter": TAPS[:, :0]}, "filter has 0 taps, takes 1 to 7"),
        ({"filter": TAPS[0]}, "filter has shape (7), takes 2 dimensions (channels, taps)"),
        ({"filter": TAPS.half()}, "filter is float16, takes float32"),
        ({"filter": [1.0]}, "filter is a list, takes a tensor"),
        (
            {"filter": TAPS[:, :6], "is_causal": False},
            "filter has 6 taps, takes an odd number of them up to 13 (twice the length of x, less one) if it is not",
        ),
        ({"filter": torch.zeros(3, 15), "is_causal": False}, "filter has 15 taps, takes an odd number"),
        ({"is_causal": "yes"}, "is_causal is 'yes', takes True or False"),
    ],
)
def test_errors_are_the_callers(wrong, text):
    with pytest.raises(RuntimeError) as raised:
        op(**{"x": X, "filter": TAPS} | wrong)
    assert str(raised.value).startswith("vitkernels::long_conv: ") and text in str(raised.value)
