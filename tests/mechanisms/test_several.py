"""Mechanisms of the literature that are made of several attentions."""

import torch
import torch.nn.functional as F
import vitkernels as vk
from support.mechanisms import agree, dots, grid, plain, tokens, weigh


def test_agents():
    def ours(q, k, v, agent, agent_bias, query_bias):
        return vk.agent_attention(q, k, v, agent, agent_bias=agent_bias, query_bias=query_bias)

    def formula(q, k, v, agent, agent_bias, query_bias):
        agent_value = weigh(dots(agent, k) / 8**0.5 + agent_bias, v)
        return weigh(dots(q, agent) / 8**0.5 + query_bias, agent_value)

    qkv = [tokens(2, 40, 2, 8) for _ in range(3)]
    agree(ours, formula, *qkv, tokens(2, 9, 2, 8), tokens(2, 9, 40), tokens(2, 40, 9))


def test_proxy_tokens():
    chosen = torch.arange(5) * 6 + torch.randint(6, (5,))  # one of the six tokens of each window

    def ours(x):
        proxies = vk.attention(x[:, chosen], x[:, chosen], x[:, chosen])
        return vk.attention(x, proxies, proxies)

    def formula(x):
        is_proxy = torch.zeros(30, dtype=torch.bool).index_fill(0, chosen, True)
        among_proxies = plain(x, x, x, is_proxy)
        return plain(x, among_proxies, among_proxies, is_proxy)

    agree(ours, formula, tokens(2, 30, 2, 8))


def test_criss_cross():
    height, width = 5, 7

    def ours(q, k, v):  # [B, height, width, H, D]
        return vk.criss_cross_attention(q, k, v, scale=1.0).flatten(1, 2)

    def formula(q, k, v):
        q, k, v = (x.flatten(1, 2) for x in (q, k, v))
        y, x = grid(height, width).unbind(-1)
        visible = (y[:, None] == y) | (x[:, None] == x)
        return weigh(dots(q, k).masked_fill(~visible, -torch.inf), v)

    qk = [tokens(2, height, width, 1, 4) for _ in range(2)]
    agree(ours, formula, *qk, tokens(2, height, width, 1, 16))


def test_outer_product_of_two_attentions():
    near = torch.cdist(grid(4, 4), grid(4, 4)) <= 1.5

    def outer(over_channels, over_space):
        return torch.einsum("bchx,bnhy->bcnhxy", over_channels, over_space).flatten(-2)

    def ours(channel, space):  # [B, C, H, d_c], [B, N, H, d_s]
        on_map = space.unflatten(1, (4, 4))
        near_only = vk.spatial_attention(on_map, on_map, on_map, [vk.Full()] * 2, radius=1.5).flatten(1, 2)
        return outer(vk.attention(channel, channel, channel), near_only)

    def formula(channel, space):
        return outer(plain(channel, channel, channel), plain(space, space, space, near))

    agree(ours, formula, tokens(2, 5, 2, 3), tokens(2, 16, 2, 4))


def test_soft_merge_by_scores_of_an_mlp():
    def ours(x, w1, w2, scale):  # [B, N, C], [C, hidden], [k, hidden], [1]
        hidden = F.gelu(F.layer_norm(x, x.shape[-1:]) @ w1)[:, :, None]
        return vk.attention(w2[None, :, None], hidden, x[:, :, None], scale=scale)[:, :, 0]

    def formula(x, w1, w2, scale):
        scores = F.gelu(F.layer_norm(x, x.shape[-1:]) @ w1) @ w2.T  # [B, N, k]
        return (scores * scale).softmax(1).transpose(1, 2) @ x

    agree(ours, formula, tokens(2, 30, 12), tokens(12, 6), tokens(4, 6), torch.tensor([0.7]))


def test_prototypes_of_a_region():
    inside = torch.rand(2, 36) < 0.5

    def ours(x, weight):  # [B, N, C], [n, C]: a 1x1 convolution
        key_bias = torch.zeros(2, 1, 36).masked_fill(~inside[:, None], -torch.inf)
        x = x[:, :, None]
        return vk.attention(weight[None, :, None], x, x, scale=1.0, key_bias=key_bias)[:, :, 0]

    def formula(x, weight):
        scores = (weight @ x.transpose(1, 2)).masked_fill(~inside[:, None], -torch.inf)  # [B, n, N]
        return scores.softmax(-1) @ x

    agree(ours, formula, tokens(2, 36, 8), tokens(3, 8))


def test_reading_and_writing_through_one_map():
    def block(compressed, weight):  # stands for the layers on the compressed tokens
        return torch.tanh(compressed @ weight)

    def ours(q, k, v, lookup, weight):  # [B, M, H, d], three of [B, N, H, d], [d, d]
        read, lse = vk.attention(q, k, v, return_lse=True)
        return lookup + vk.attention_transposed(q, k, block(read, weight), lse)

    def formula(q, k, v, lookup, weight):
        a = (dots(q, k) / 8**0.5).softmax(-1)  # [B, H, M, N]
        read = torch.einsum("bhij,bjhd->bihd", a, v)
        return lookup + torch.einsum("bhij,bihd->bjhd", a, block(read, weight))

    agree(ours, formula, tokens(2, 9, 3, 8), *(tokens(2, 49, 3, 8) for _ in range(3)), tokens(8, 8))


def attention_received(query, key, lse, query_weight=None):
    """Column sums of the attention map, ``(B, Nk, heads)``."""
    ones = query.new_ones(()).expand(*lse.shape, 1)
    return vk.attention_transposed(query, key, ones, lse, query_weight=query_weight).squeeze(-1)


def take(x, index):
    """Rows ``index`` of ``x``, ``[B, N, ...]`` by ``[B, k]``."""
    return x[torch.arange(x.size(0))[:, None], index]


def test_tokens_that_receive_most_attention():
    frames, places, kept, key_frame = 4, 9, 6, 2
    is_key = torch.arange(frames * places) // places == key_frame

    def keep(x, score):
        others = score.masked_fill(is_key, -torch.inf).topk(kept).indices  # [B, kept]
        return torch.cat([x[:, is_key], take(x, others)], 1).flatten(2) * score.mean()

    def ours(q, k, v, factor):  # factor: of the key frame's queries
        weight = torch.where(is_key, factor, 1.0)[:, None]
        out, lse = vk.attention(q, k, v, return_lse=True)
        return keep(out, attention_received(q, k, lse, weight).mean(-1) / q.size(1))

    def formula(q, k, v, factor):
        a = (dots(q, k) / 8**0.5).softmax(-1)  # [B, H, N, N]
        score = (a * torch.where(is_key, factor, 1.0)[:, None]).mean((1, 2))
        return keep(torch.einsum("bhij,bjhd->bihd", a, v), score)

    agree(ours, formula, *(tokens(2, frames * places, 2, 8) for _ in range(3)), torch.tensor([3.0]))


def test_patches_that_the_class_token_attends_to():
    kept = 10

    def reorganise(x, score):  # [B, N, H, d], [B, N - 1]
        order = score.argsort(descending=True) + 1
        rest = take(x, order[:, kept:]) * take(score, order[:, kept:] - 1)[..., None, None]
        return torch.cat([x[:, :1], take(x, order[:, :kept]), rest.sum(1, keepdim=True)], 1)

    def ours(q, k, v):
        out, lse = vk.attention(q, k, v, return_lse=True)
        return reorganise(out, attention_received(q[:, :1], k, lse[:, :1]).mean(-1)[:, 1:])

    def formula(q, k, v):
        a = (dots(q, k) / 8**0.5).softmax(-1)  # [B, H, N, N]
        return reorganise(torch.einsum("bhij,bjhd->bihd", a, v), a[:, :, 0, 1:].mean(1))

    agree(ours, formula, *(tokens(2, 26, 3, 8) for _ in range(3)))
