"""Bi-level routing attention: the operator and the module, against the paper's form, which gathers keys and values."""

import pytest
import torch
import vitkernels as vk
from support.mechanisms import agree, agree_module, convolution, linear, tokens
from torch.nn import functional as F


def windows(x, n_win):
    """``(B, windows, tokens, C)`` of a map that ``n_win`` divides."""
    batch, height, width, channels = x.shape
    x = x.view(batch, n_win, height // n_win, n_win, width // n_win, channels).transpose(2, 3)
    return x.reshape(batch, n_win**2, -1, channels)


def maps(x, n_win, height, width):
    batch, _, _, channels = x.shape
    x = x.view(batch, n_win, n_win, height // n_win, width // n_win, channels).transpose(2, 3)
    return x.reshape(batch, height, width, channels)


def gathered_attention(q, k, v, graph, n_win, heads, scale):
    """Equation 5 and 6 on windows: the keys and values of the chosen ones are gathered, and attended to."""

    def chosen(t):
        # [B, windows, topk, tokens, C]
        listed = torch.stack([each[index] for each, index in zip(t, graph, strict=True)])
        return listed.flatten(2, 3).unflatten(-1, (heads, -1))

    logits = torch.einsum("bwihd,bwjhd->bwhij", q.unflatten(-1, (heads, -1)), chosen(k)) * scale
    return torch.einsum("bwhij,bwjhd->bwihd", logits.softmax(-1), chosen(v)).flatten(-2)


def test_regions_by_their_means():
    height, width, n_win, heads, topk = 6, 9, 3, 2, 2

    def ours(q, k, v):
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        region = height // n_win, width // n_win
        graph = vk.bilevel_route(q, k, region, topk)
        return vk.regional_routing_attention(q, k, v, 0.3, graph, region).flatten(-2)

    def formula(q, k, v):
        q, k, v = (windows(t, n_win) for t in (q, k, v))
        affinity = q.mean(2) @ k.mean(2).transpose(1, 2)
        graph = affinity.topk(topk).indices
        return maps(gathered_attention(q, k, v, graph, n_win, heads, 0.3), n_win, height, width)

    agree(ours, formula, *(tokens(2, height, width, 8) for _ in range(3)))


def bilevel_routing(n_win, heads, topk, qk_dim):
    def formula(parameters, x):
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % n_win, 0, -height % n_win))
        dim = x.shape[-1]
        q, k, v = linear(parameters, "qkv.qkv", x).split([qk_dim, qk_dim, dim], -1)
        side = parameters["lepe.weight"].shape[-1]
        lepe = convolution(parameters, "lepe", v.permute(0, 3, 1, 2), padding=side // 2, groups=dim)
        padded = x.shape[1:3]
        q, k, v = (windows(t, n_win) for t in (q, k, v))
        graph = (q.mean(2) @ k.mean(2).transpose(1, 2)).topk(topk).indices
        out = maps(gathered_attention(q, k, v, graph, n_win, heads, qk_dim**-0.5), n_win, *padded)
        return linear(parameters, "wo", out + lepe.permute(0, 2, 3, 1))[:, :height, :width]

    return formula


@pytest.mark.parametrize(("size", "auto_pad"), [((6, 9), False), ((5, 7), True)])
def test_bilevel_routing_attention(size, auto_pad):
    """BiFormer's layer; where it pads, the padding has keys."""
    module = vk.nn.BiLevelRoutingAttention(8, 2, n_win=3, qk_dim=12, topk=2, side_dwconv=5, auto_pad=auto_pad)
    agree_module(module, bilevel_routing(3, 2, 2, 12), tokens(2, *size, 8))
