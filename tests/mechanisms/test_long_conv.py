"""Long convolutions: as products with Toeplitz matrices, and as the mixers that use them state them."""

import torch
import vitkernels as vk
from support.mechanisms import agree, tokens


def toeplitz(taps, first_lag, length):
    """Matrices ``[channels, length, length]`` whose element (t, s) is the tap of lag t - s."""
    positions = torch.arange(length)
    lag = positions[:, None] - positions - first_lag
    is_tap = (lag >= 0) & (lag < taps.shape[-1])
    return torch.where(is_tap, taps[:, lag.clamp(0, taps.shape[-1] - 1)], taps.new_zeros(()))


def test_causal_convolution():
    def formula(x, taps):
        return torch.einsum("cts,bcs->bct", toeplitz(taps, 0, x.shape[-1]), x)

    agree(vk.long_conv, formula, tokens(3, 5, 50), tokens(5, 50))
    agree(vk.long_conv, formula, tokens(2, 5, 150), tokens(5, 9))


def test_two_filters_ahead_and_behind():
    """M2-BERT: a circular convolution of twice the length; the filter behind is turned around at the end of it."""
    length = 37

    def ours(x, ahead, behind):
        both = torch.cat((behind[:, : length - 1].flip(-1), ahead), -1)
        return vk.long_conv(x, both, is_causal=False)

    def formula(x, ahead, behind):
        def pad(t, *amount):
            return torch.nn.functional.pad(t, amount)

        circular = pad(ahead, 0, length) + pad(behind.flip(-1), length, 0)
        shift = (torch.arange(length)[:, None] - torch.arange(length)) % (2 * length)
        return torch.einsum("cts,bcs->bct", circular[:, shift], x)

    agree(ours, formula, tokens(2, 5, length), tokens(5, length), tokens(5, length))


def test_gated_long_convolutions_of_tokens():
    """Hyena of order 2 on tokens ``(B, N, C)``: two long convolutions, each followed by a gate."""

    def ours(value, first_gate, second_gate, filters):
        for gate, taps in zip((first_gate, second_gate), filters, strict=True):
            value = gate * vk.long_conv(value.mT, taps).mT
        return value

    def formula(value, first_gate, second_gate, filters):
        diagonals = (torch.diag_embed(gate.mT) for gate in (first_gate, second_gate))  # [B, C, N, N]
        matrices = [d @ toeplitz(taps, 0, value.shape[1]) for d, taps in zip(diagonals, filters, strict=True)]
        return torch.einsum("bcts,bsc->btc", matrices[1] @ matrices[0], value)

    agree(ours, formula, *[tokens(2, 29, 6) for _ in range(3)], tokens(2, 6, 29), slack=4)
