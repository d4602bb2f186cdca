"""Shared by the tests of mechanisms: each states a mechanism twice, and results and gradients are compared."""

import torch

DTYPES = {torch.float64: 1e-9, torch.float32: 3e-5}


def agree(ours, formula, *inputs):
    """``ours`` and ``formula`` have the same value and the same gradient for every input."""
    expected, expected_grads = differentiate(formula, torch.float64, inputs)
    for dtype, tolerance in DTYPES.items():
        found, found_grads = differentiate(ours, dtype, inputs)
        for a, b in zip([found, *found_grads], [expected, *expected_grads], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def differentiate(function, dtype, inputs):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    direction = torch.linspace(-1, 1, out.numel(), dtype=dtype).cos().view(out.shape)
    return out.detach(), torch.autograd.grad(out, leaves, direction)


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def dots(query, key):
    return torch.einsum("bihd,bjhd->bhij", query, key)


def weigh(logits, value):
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), value)


def plain(query, key, value, visible=None):
    """softmax(QK^T / sqrt(d)) V over the pairs in the boolean matrix ``visible``."""
    logits = dots(query, key) / query.size(-1) ** 0.5
    return weigh(logits if visible is None else logits.masked_fill(~visible, -torch.inf), value)


def grid(height, width):
    """Coordinates ``(height * width, 2)`` of a map's tokens, in float64."""
    return torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()


def offset_index(height, width):
    """Index of the unsigned offset of every pair of tokens, ``(N, N)`` in ``[0, N)``."""
    offset = (grid(height, width)[:, None] - grid(height, width)).abs().long()
    return offset[..., 0] * width + offset[..., 1]


def by_offset(function, height, width):
    """A table ``(..., 2 height - 1, 2 width - 1)`` from a function of the vertical and the horizontal offset."""
    return function(torch.arange(1 - height, height)[:, None], torch.arange(1 - width, width))


def unsigned(table, height, width):
    """The table by offset made from one by unsigned offset: ``(H, height * width)``."""
    return table[:, by_offset(lambda dy, dx: dy.abs() * width + dx.abs(), height, width)]
