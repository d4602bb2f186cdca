"""Monarch Mixer: its modules, against the formula with PyTorch's transforms of padded sequences."""

import math

import pytest
import torch
import vitkernels as vk
from support.mechanisms import agree_module, linear
from torch.nn import functional as F

DIM, LONGEST = 6, 20


def monarch(parameters, name, x):
    """``x`` times a product of sparse matrices: of blocks, of the permutation between, of blocks, of that behind."""
    first, second = parameters[f"{name}.blkdiag1"], parameters[f"{name}.blkdiag2"]
    blocks, rows, inputs = first.shape
    padded = F.pad(x, (0, blocks * inputs - x.shape[-1]))
    inner = padded @ torch.block_diag(*first).t()
    inner = inner[..., torch.arange(blocks * rows).view(-1, blocks).t().flatten()]
    out = inner @ torch.block_diag(*second).t()
    bias = parameters[f"{name}.bias"]
    return out[..., torch.arange(out.shape[-1]).view(blocks, -1).t().flatten()][..., : len(bias)] + bias


def implicit_taps(parameters, name, length, is_causal):
    """Filters ahead and behind, each ``(length, DIM)``, of an MLP with sines."""
    z, t = (parameters[f"{name}.pos_emb.{key}"][0, :length] for key in ("z", "t"))
    decay = torch.exp(-t * parameters[f"{name}.modulation.deltas"][0].abs())

    def mlp(mlp_name):
        h = z
        for layer in (0, 2, 4):
            h = torch.sin(parameters[f"{mlp_name}.{layer + 1}.freq"] * linear(parameters, f"{mlp_name}.{layer}", h))
        return linear(parameters, f"{mlp_name}.6", h) * decay

    ahead = mlp(f"{name}.implicit_filter")
    return ahead, torch.zeros_like(ahead) if is_causal else mlp(f"{name}.implicit_filter_rev")


def convolved(x, ahead, behind):
    """Along the tokens of ``(B, N, DIM)``: a circular convolution of twice the length."""
    n = x.shape[1]
    circular = F.pad(ahead, (0, 0, 0, n)) + F.pad(behind.flip(0), (0, 0, n, 0))  # [2 N, DIM]
    spectrum = torch.fft.rfft(x, 2 * n, dim=1) * torch.fft.rfft(circular, dim=0)
    return torch.fft.irfft(spectrum, 2 * n, dim=1)[:, :n]


def long_convolution(parameters, name, x, is_causal, is_implicit):
    n = x.shape[1]
    if is_implicit:
        ahead, behind = implicit_taps(parameters, name, n, is_causal)
        return convolved(x, ahead, behind) + parameters[f"{name}.bias"] * x
    taps = parameters[f"{name}.weight"].t()
    if is_causal:
        return convolved(x, taps[:n], torch.zeros_like(taps[:n]))
    behind = F.pad(taps[LONGEST - n : LONGEST - 1].flip(0), (0, 0, 0, 1))
    return convolved(x, taps[LONGEST - 1 :][:n], behind)


@pytest.mark.parametrize("nblocks", [None, 4])
@pytest.mark.parametrize("residual", [False, True], ids=["one-filter", "residual"])
@pytest.mark.parametrize("is_implicit", [True, False], ids=["implicit", "explicit"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both"])
def test_gated_long_convolution_of_an_implicit_filter(is_causal, is_implicit, residual, nblocks):
    def projected(parameters, name, x):
        return (monarch if nblocks else linear)(parameters, name, x)

    def formula(parameters, x):
        n = x.shape[1]
        wide = F.pad(projected(parameters, "in_linear", x), (0, 0, 2, 0))  # [B, N + 2, 3 DIM]
        taps = parameters["short_filter.weight"][:, 0]  # [3 DIM, 3]
        short = sum(taps[:, i] * wide[:, i : i + n] for i in range(3)) + parameters["short_filter.bias"]
        x1, x2, v = short.split(DIM, -1)
        out = x2 * long_convolution(parameters, "filter_fn", x1 * v, is_causal, is_implicit)
        if residual:
            out = out + long_convolution(parameters, "filter_fn2", x, is_causal, is_implicit)
        return projected(parameters, "out_linear", out)

    torch.manual_seed(0)
    for length in (1, 2, 13, LONGEST):
        module = vk.nn.MonarchMixer(
            DIM, LONGEST, is_causal, nblocks, "implicit" if is_implicit else "explicit", residual, filter_order=8
        )
        agree_module(module, formula, torch.randn(2, length, DIM))


@pytest.mark.parametrize("length", [1, 2, 9])
def test_features_of_positions(length):
    """Hyena: the time, and the real and imaginary parts of waves; a decay to a hundredth in 0.3 to 1.5 times it."""
    filter_fn = vk.nn.MonarchMixer(5, length, filter_emb_dim=7, dtype=torch.float64).filter_fn
    for n in range(length):
        time = n / max(length - 1, 1)
        waves = [complex(math.cos(a), -math.sin(a)) for a in (2 * math.pi * n / length * f for f in (1e-4, 1.00005, 2))]
        features = [time, *(w.real for w in waves), *(w.imag for w in waves)]
        torch.testing.assert_close(filter_fn.pos_emb.z[0, n], torch.tensor(features, dtype=torch.float64))
        assert filter_fn.pos_emb.t[0, n].item() == pytest.approx(time)
    rates = filter_fn.modulation.deltas[0, 0]
    ends = torch.exp(torch.stack((1.5 * rates[0], 0.3 * rates[-1])))
    assert ends.tolist() == pytest.approx([0.01, 0.01])
    assert rates.diff().std() < 1e-12


def test_mlp_of_monarch_layers():
    def formula(parameters, x):
        return monarch(parameters, "fc2", F.gelu(monarch(parameters, "fc1", x)))

    torch.manual_seed(0)
    agree_module(vk.nn.MonarchMLP(10, 22, 4), formula, torch.randn(2, 3, 10))
    agree_module(vk.nn.MonarchMLP(8, nblocks=2), formula, torch.randn(2, 3, 8))
