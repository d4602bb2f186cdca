"""Spectral gating beyond the sample table: sizes, layouts, tasks, needs and errors."""

import pytest
import torch
import vitkernels as vk

op = vk.spectral_gating
backward = torch.ops.vitkernels.spectral_gating_backward


def maps(batch, height, width, channels, dtype=torch.float32):
    return torch.randn(batch, height, width, channels).to(dtype), torch.randn(height, width // 2 + 1, channels, 2)


def gradients(function, x, weight, grad_out):
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    return torch.autograd.grad(function(*leaves), leaves, grad_out)


@pytest.mark.parametrize("length", [*range(1, 34), 49, 56, 60, 64, 77, 97, 112, 121, 128, 143, 197, 210, 256])
def test_every_length(length):
    """Of rows and of columns, whatever its factors, beside short and odd ones."""
    for height, width in ((length, 4), (length, 3), (4, length), (3, length)):
        x, weight = (t.double() for t in maps(2, height, width, 3))
        grad = torch.randn_like(x)
        torch.testing.assert_close(op(x, weight), vk.reference.spectral_gating(x, weight), rtol=1e-12, atol=1e-12)
        found, expected = (gradients(f, x, weight, grad) for f in (op, vk.reference.spectral_gating))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_weight_of_one_changes_nothing():
    x, weight = maps(2, 9, 14, 20)
    torch.testing.assert_close(op(x, torch.ones_like(weight) * torch.tensor([1.0, 0.0])), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [7, 8])
def test_imaginary_parts_of_real_frequencies_are_ignored(width):
    """In a single row the first frequency, and the last one of an even number, are real."""
    x, weight = maps(2, 1, width, 5)
    other = weight.clone()
    other[:, 0, :, 1] = 7.0
    if width % 2 == 0:
        other[:, -1, :, 1] = -7.0
    assert torch.equal(op(x, weight), op(x, other))
    _, grad = backward(torch.randn_like(x), x, weight, True)
    assert grad[:, 0, :, 1].abs().max() < 1e-6 < grad[:, 1, :, 1].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_no_bit(dtype):
    whole, _ = maps(4, 9, 30, 40, dtype)
    for x in (
        whole[:, 1:8, 3:24],
        torch.randn(3, 7, 21, 80).to(dtype)[..., ::2],
        whole[::2, 2:, ::2],
        whole[:1, :7, :21].expand(5, 7, 21, 40),
        torch.randn(3, 40, 7, 21).to(dtype).permute(0, 2, 3, 1),
        torch.randn(7, 21, 3, 40).to(dtype).permute(2, 0, 1, 3),
        whole.permute(0, 2, 1, 3)[:, :7, :],
    ):
        of_x = torch.randn(x.size(1), x.size(2) // 2 + 1, 40, 2)
        plain, g = x.contiguous(), torch.randn_like(x.contiguous())
        assert torch.equal(op(x, of_x), op(plain, of_x))
        assert op(x, of_x).is_contiguous()
        expected = backward(g, plain, of_x, True)
        for found in (
            backward(g, x, of_x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), True),
            backward(g.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), x, of_x, True),
        ):
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("channels", [1, 16, 24, 800])
def test_batches_and_channels_do_not_depend_on_each_other(channels):
    """Bit by bit, however they are divided between tasks; another one's values may be much larger."""
    x, weight = maps(7, 5, 6, channels)
    whole = op(x, weight)
    assert torch.equal(op(x[3:4], weight), whole[3:4])
    half = channels // 2
    assert torch.equal(op(x[..., half:], weight[:, :, half:]), whole[..., half:])
    x[0] *= 1e20
    assert torch.equal(op(x, weight)[1:], whole[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_channel(value):
    x, weight = maps(5, 7, 6, 20)
    x[1, 6, 3, 11] = value
    found = op(x, weight).isfinite().logical_not()
    assert found[1, ..., 11].all() and found.sum() == 42


@pytest.mark.parametrize("channels", [3, 800])
def test_only_requested_gradients(channels):
    x, weight = maps(2, 6, 7, channels)
    grad = torch.randn_like(x)
    of_x, of_weight = backward(grad, x, weight, True)
    without = backward(grad, x, weight, False)
    assert torch.equal(without[0], of_x) and without[1].numel() == 0 and of_weight.shape == weight.shape


@pytest.mark.parametrize("channels", [5, 800])
def test_gradients_add_up_over_the_batch(channels):
    """Also where the batch is divided between tasks, whose sums are added up in the end."""
    x, weight = (t.double() for t in maps(9, 4, 5, channels))
    grad = torch.randn_like(x)
    whole = backward(grad, x, weight, True)[1]
    one_by_one = [backward(grad[b : b + 1], x[b : b + 1], weight, True)[1] for b in range(9)]
    torch.testing.assert_close(whole, torch.stack(one_by_one).sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [5, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_in_16_bits(dtype, channels):
    """The same results as by its values in float32; its gradient is rounded once."""
    x, weight = maps(3, 6, 7, channels, dtype)
    narrow, grad = weight.to(dtype), torch.randn_like(x)
    assert torch.equal(op(x, narrow), op(x, narrow.float()))
    (grad_x, of_narrow), (expected, of_wide) = (backward(grad, x, w, True) for w in (narrow, narrow.float()))
    assert torch.equal(grad_x, expected) and torch.equal(of_narrow, of_wide.to(dtype))


def test_no_batch_is_a_gradient_of_zero():
    weight = torch.randn(3, 3, 5, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(op(torch.randn(0, 3, 4, 5), weight).sum(), weight)
    assert grad.eq(0).all()


X, WEIGHT = torch.zeros(2, 6, 7, 3), torch.zeros(6, 4, 3, 2)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"x": None}, "x is None, takes a tensor"),
        ({"x": X[0]}, "x has shape (6, 7, 3), takes 4 dimensions (B, H, W, channels)"),
        ({"x": X.long()}, "x is int64, takes float64, float32, bfloat16 or float16"),
        ({"x": X[:, :0]}, "x has shape (2, 0, 7, 3), takes at least one row and one column"),
        ({"x": X[:, :5]}, "weight has shape (6, 4, 3, 2), takes (5, 4, 3, 2)"),
        ({"x": X[:, :, :5]}, "weight has shape (6, 4, 3, 2), takes (6, 3, 3, 2)"),
        ({"x": X[..., :2]}, "weight has shape (6, 4, 3, 2), takes (6, 4, 2, 2)"),
        ({"weight": WEIGHT[..., :1]}, "weight has shape (6, 4, 3, 1), takes (6, 4, 3, 2)"),
        ({"weight": torch.view_as_complex(WEIGHT)}, "weight has shape (6, 4, 3), takes 4 dimensions (H, W // 2 + 1,"),
        ({"weight": WEIGHT.half()}, "weight is float16, takes float32"),
        ({"x": X.half(), "weight": WEIGHT.bfloat16()}, "weight is bfloat16, takes float16 or float32"),
        ({"x": X.double()}, "weight is float32, takes float64"),
        ({"weight": [1.0]}, "weight is a list, takes a tensor"),
    ],
)
def test_errors_are_the_callers(wrong, text):
    with pytest.raises(RuntimeError) as raised:
        op(**{"x": X, "weight": WEIGHT} | wrong)
    assert str(raised.value).startswith("vitkernels::spectral_gating: ") and text in str(raised.value)
