"""Shared by the tests of mechanisms: each states a mechanism twice, and results and gradients are compared."""

import copy

import torch
from torch.nn import functional as F

DTYPES = {torch.float64: 1e-9, torch.float32: 3e-5}


def agree(ours, formula, *inputs, slack=1):
    """``ours`` and ``formula`` have the same value and the same gradient for every input; ``slack`` is float32's."""
    expected, expected_grads = differentiate(formula, torch.float64, inputs)
    for dtype, tolerance in DTYPES.items():
        found, found_grads = differentiate(ours, dtype, inputs)
        tolerance *= slack if dtype == torch.float32 else 1
        for a, b in zip([found, *found_grads], [expected, *expected_grads], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def agree_module(module, formula, *inputs, slack=1):
    """A module and ``formula(parameters, *inputs)`` agree, also in the gradient for every parameter that learns."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    constants = dict(module.named_buffers()) | {n: p for n, p in module.named_parameters() if not p.requires_grad}
    constants = {name: t.detach().to(torch.float64, copy=True) for name, t in constants.items()}
    names = [name for name, p in module.named_parameters() if p.requires_grad]

    def split(arguments):
        return arguments[: len(inputs)], dict(zip(names, arguments[len(inputs) :], strict=True))

    def joined(outputs):
        return torch.cat([t.flatten() for t in outputs]) if isinstance(outputs, tuple) else outputs

    def ours(*arguments):
        data, parameters = split(arguments)
        twin = copy.deepcopy(module).to(data[0].dtype)  # calls may count
        return joined(torch.func.functional_call(twin, parameters, data))

    def theirs(*arguments):
        data, parameters = split(arguments)
        return joined(formula(constants | parameters, *data))

    agree(ours, theirs, *inputs, *(p for p in module.parameters() if p.requires_grad), slack=slack)


def linear(parameters, name, x):
    return F.linear(x, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))


def norm(parameters, name, x):
    return F.layer_norm(x, x.shape[-1:], parameters[f"{name}.weight"], parameters[f"{name}.bias"])


def convolution(parameters, name, x, **options):
    return F.conv2d(x, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"), **options)


def mlp(parameters, name, x):
    return linear(parameters, f"{name}.fc2", F.gelu(linear(parameters, f"{name}.fc1", x)))


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
