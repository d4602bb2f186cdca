"""What :class:`torch.utils.flop_counter.FlopCounterMode` counts for the operators."""

import pytest
import torch
import vitkernels as vk
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

OFFSETS = torch.tensor([0, 5, 5, 17])
AXES = {
    "full": [vk.Full(), vk.Full(is_causal=True)],
    "grid": [vk.Full(step=3), vk.Full(step=2)],
    "window": [vk.Block(4, shift=2), vk.Block(3)],
    "halo": [vk.Halo(4, 2), vk.Halo(3, 1, is_causal=True)],
    "neighborhood": [vk.Neighborhood(5), vk.Neighborhood(3, dilation=2)],
    "causal-neighborhood": [vk.Neighborhood(5, is_causal=True), vk.Neighborhood(3, stride=2)],
    "sliding": [vk.Sliding(5), vk.Sliding(4, dilation=2)],
}


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def forward_and_backward(call, *shapes):
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    forward = counted(lambda: call(*leaves))
    return forward, counted(lambda: call(*leaves).sum().backward()) - forward


def of_sdpa(*shapes):
    """The same for a batch of heads, by PyTorch."""
    q, k, v = ((b, h, n, d) for b, n, h, d in shapes)
    out = (*q[:3], v[3])
    return sdpa_flop_count(q, k, v), sdpa_backward_flop_count(out, q, k, v)


def test_vision_transformer():
    x = torch.randn(1, 197, 3, 64)
    assert counted(lambda: vk.attention(x, x, x)) == 29_805_312


def test_linear_attention_of_few_tokens():
    """Products of queries and keys, as of softmax attention."""
    shapes = (2, 2, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6)
    pairs = 2 * 4 * 2 * 7
    expected = 2 * pairs * (8 + 6), 2 * pairs * (3 * 8 + 2 * 6)
    assert forward_and_backward(vk.linear_attention, *shapes) == expected


def test_linear_attention():
    """Two products with a state, of every query and of every key; twice as many in the backward."""
    shapes = (2, 9, 4, 8), (2, 11, 2, 8), (2, 11, 2, 6)
    forward = 2 * (2 * 9 * 4 + 2 * 11 * 2) * 8 * 6
    assert forward_and_backward(vk.linear_attention, *shapes) == (forward, 2 * forward)


def test_channel_attention():
    """One product for each token of queries and keys, one for each of values; twice as many in the backward."""
    shapes = (2, 5, 4, 8), (2, 5, 4, 6), (2, 7, 4, 6)
    forward = 2 * (2 * 5 * 4 + 2 * 7 * 4) * 8 * 6
    assert forward_and_backward(vk.channel_attention, *shapes) == (forward, 2 * forward)


def test_long_conv():
    """The forward as PyTorch counts the convolution that it is, padded by the taps' reach."""
    shapes = (2, 6, 50), (6, 11)

    def padded(x, filter):
        return torch.nn.functional.conv1d(x, filter[:, None], padding=5, groups=6)

    def ours(x, filter):
        return vk.long_conv(x, filter, is_causal=False)

    forward, _ = forward_and_backward(padded, *shapes)
    assert forward_and_backward(ours, *shapes) == (forward, 2 * forward)


def test_spectral_gating():
    """The forward as PyTorch counts the convolution that it is, of a map that is repeated on two sides."""
    shapes = (2, 5, 6, 4), (5, 4, 4, 2)

    def circular(x, weight):
        kernel = torch.fft.irfft2(torch.view_as_complex(weight), s=(5, 6), dim=(0, 1)).permute(2, 0, 1)[:, None]
        repeated = torch.nn.functional.pad(x.permute(0, 3, 1, 2), (5, 0, 4, 0), mode="circular")
        return torch.nn.functional.conv2d(repeated, kernel.flip(2, 3), groups=4)

    forward, _ = forward_and_backward(circular, *shapes)
    assert forward_and_backward(vk.spectral_gating, *shapes) == (forward, 2 * forward)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention(kv_heads):
    shapes = (2, 5, 4, 8), (2, 7, kv_heads, 8), (2, 7, kv_heads, 6)
    of_all_heads = shapes[0], (2, 7, 4, 8), (2, 7, 4, 6)
    assert forward_and_backward(vk.attention, *shapes) == of_sdpa(*of_all_heads)


def test_attention_varlen():
    def call(q, k, v):
        return vk.attention_varlen(q, k, v, OFFSETS, OFFSETS, 12, 12)

    one_by_one = [of_sdpa(*[(1, n, 2, 8)] * 3) for n in OFFSETS.diff().tolist() if n]
    assert forward_and_backward(call, *[(17, 2, 8)] * 3) == tuple(map(sum, zip(*one_by_one, strict=True)))
    with torch._subclasses.FakeTensorMode():  # lengths are not known: as if all were the longest
        x, offsets = torch.empty(17, 2, 8), torch.empty(4, dtype=torch.int64)
        assert (
            counted(lambda: vk.attention_varlen(x, x, x, offsets, offsets, 12, 12))
            == 3 * of_sdpa(*[(1, 12, 2, 8)] * 3)[0]
        )


def test_attention_transposed():
    def call(q, k, w):
        lse = torch.zeros(q.shape[:-1])
        return vk.attention_transposed(q, k, w, lse)

    shapes = (2, 5, 4, 8), (2, 7, 4, 8), (2, 5, 4, 6)
    # A value for each query: as many products, of the same sizes.
    assert forward_and_backward(call, *shapes) == of_sdpa(shapes[0], shapes[1], (2, 7, 4, 6))


@pytest.mark.parametrize("outside", [None, "zero"])
@pytest.mark.parametrize("name", AXES)
def test_spatial_attention(name, outside):
    shapes = [(2, 11, 9, 2, 8)] * 2 + [(2, 11, 9, 2, 6)]

    def call(q, k, v):
        return vk.spatial_attention(q, k, v, AXES[name], outside=outside)

    # Keys that all have the same logit: the LSE is the logarithm of their number.
    zero = torch.zeros(shapes[0])
    _, lse = vk.spatial_attention(zero, zero, zero, AXES[name], outside=outside, return_lse=True)
    pairs = round(lse.double().exp().sum().item())
    assert forward_and_backward(call, *shapes) == (2 * pairs * (8 + 6), 2 * pairs * (3 * 8 + 2 * 6))


def test_window_attention_of_a_shared_query():
    x, query = torch.randn(2, 8, 8, 2, 4), torch.randn(1, 4, 4, 2, 4)
    call = vk.spatial_attention
    assert counted(lambda: call(query, x, x, [vk.Block(4)] * 2, is_shared_query=True)) == 2 * (2 * 64 * 16 * 2) * 8
