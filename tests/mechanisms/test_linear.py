"""Linear attention and attention between channels: by products over the tokens."""

import itertools
import math

import torch
import vitkernels as vk
from support.mechanisms import agree, tokens


def products(query, key, value):
    return torch.einsum("bihd,bjhd,bjhe->bihe", query, key, value)


def test_relu_features():
    """SLAB's: all pairs of a query and a key, divided by their sum."""

    def formula(q, k, v):
        pairs = torch.einsum("bihd,bjhd->bhij", q.relu(), k.relu())
        return torch.einsum("bhij,bjhe->bihe", pairs / (pairs.sum(-1, keepdim=True) + 1e-6), v)

    agree(vk.linear_attention, formula, *[tokens(2, 30, 2, 8) for _ in range(3)])


def test_random_features():
    """T2T's token performer: exp(w x - |x|^2 / 2) / sqrt(m)."""
    w = torch.randn(6, 8, dtype=torch.float64) / 4

    def positive(x):
        return (x @ w.to(x).t() - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(6)

    def formula(q, k, v):
        q, k = positive(q), positive(k)
        return products(q, k, v) / (torch.einsum("bihd,bjhd->bih", q, k).unsqueeze(-1) + 1e-8)

    features = vk.FeatureMap("performer", projection=w)
    agree(
        lambda q, k, v: vk.linear_attention(q, k, v, feature_map=features, eps=1e-8), formula,
        *[tokens(2, 30, 2, 8) for _ in range(3)],
    )  # fmt: skip


def test_linear_angular_attention():
    """The first two terms of an angle's series: 1/2 V + 1/pi Q (K^T V), of unit vectors."""

    def formula(q, k, v):
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
        return v / 2 + products(q, k, v) / math.pi

    def ours(q, k, v):
        options = {"feature_map": "identity", "normalize": False, "qk_norm": "l2"}
        return vk.linear_attention(q, k, v, scale=1 / math.pi, residual_v=0.5, **options)

    agree(ours, formula, *[tokens(2, 30, 2, 8) for _ in range(3)])


def test_attention_between_channels():
    """DaViT's: keys and values make the weights, queries are what they weigh."""

    def formula(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, groups, N, d]
        weights = ((k * 8**-0.5).transpose(-1, -2) @ v).softmax(-1)
        return (weights @ q.transpose(-1, -2)).permute(0, 3, 1, 2)

    agree(lambda q, k, v: vk.channel_attention(k, v, q), formula, *[tokens(2, 30, 3, 8) for _ in range(3)])


def test_decay_of_each_head():
    """TransNormer's: no denominator, a token's weight is a power of the head's decay."""
    decay = torch.tensor([0.9, 0.5], dtype=torch.float64)
    distance = torch.arange(90)[:, None] - torch.arange(90)
    weights = (decay[:, None, None] ** distance).masked_fill(distance < 0, 0.0)

    def formula(q, k, v):
        return torch.einsum("bihd,bjhd,hij,bjhe->bihe", q, k, weights, v)

    agree(
        lambda q, k, v: vk.decayed_linear_attention(q, k, v, decay), formula, *[tokens(2, 90, 2, 8) for _ in range(3)]
    )


def test_sequence_in_parts():
    """Lightning Attention's blocks: the state that a part leaves is where the next one begins."""
    cuts = (0, 7, 71, 100)

    def ours(q, k, v):
        outs, state = [], None
        for begin, end in itertools.pairwise(cuts):
            part = [t[:, begin:end] for t in (q, k, v)]
            out, state = vk.decayed_linear_attention(*part, 0.8, initial_state=state, return_state=True)
            outs.append(out)
        return torch.cat(outs, 1)

    def formula(q, k, v):
        return vk.reference.decayed_linear_attention(q, k, v, 0.8)

    agree(ours, formula, *[tokens(2, 100, 2, 8) for _ in range(3)])
