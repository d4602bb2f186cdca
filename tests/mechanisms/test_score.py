"""Mechanisms of the literature that change the logits."""

import torch
import torch.nn.functional as F
import vitkernels as vk
from support.mechanisms import agree, by_offset, dots, grid, offset_index, plain, tokens, unsigned, weigh


def test_gaussian_mixture_mask():
    def mixture(alpha, sigma, squared):  # [H, K] each, distances [...] -> [H, ...]
        return torch.einsum("hk,hk...->h...", alpha, torch.exp(-squared / (2 * sigma[..., None, None] ** 2)))

    def ours(q, k, v, alpha, sigma):
        squared = by_offset(lambda dy, dx: dy**2 + dx**2, 4, 5).to(alpha.dtype)  # [7, 9]
        return vk.attention(q, k, v, multiplier_table=mixture(alpha, sigma, squared))

    def formula(q, k, v, alpha, sigma):
        squared = torch.cdist(grid(4, 5), grid(4, 5)).square().to(alpha.dtype)  # [N, N]
        return weigh(dots(q, k) / 8**0.5 * mixture(alpha, sigma, squared), v)

    qkv = [tokens(2, 20, 2, 8) for _ in range(3)]
    agree(ours, formula, *qkv, tokens(2, 5), 1 + tokens(2, 5).sigmoid())


def test_gaussian_mixture_mask_beside_a_class_token():
    squared = torch.cdist(grid(4, 5), grid(4, 5)).square()  # [N, N]

    def ours(q, k, v, sigma):
        table = by_offset(lambda dy, dx: torch.exp(-(dy**2 + dx**2) / (2 * sigma[:, None, None] ** 2)), 4, 5)
        return vk.attention(q, k, v, multiplier_table=table, num_prefix_tokens=1)

    def formula(q, k, v, sigma):
        mask = F.pad(torch.exp(-squared / (2 * sigma[:, None, None] ** 2)), (1, 0, 1, 0), value=1.0)
        return weigh(dots(q, k) / 8**0.5 * mask, v)

    agree(ours, formula, *(tokens(2, 21, 2, 8) for _ in range(3)), 1 + tokens(2).sigmoid())


def test_temperature():
    def ours(q, k, v, tau):
        return vk.attention(q, k, v, scale=(8**0.5 * tau).reciprocal())

    def formula(q, k, v, tau):
        return weigh(dots(q, k) / (8**0.5 * tau[:, None, None]), v)

    agree(ours, formula, *(tokens(2, 11, 3, 8) for _ in range(3)), torch.tensor([0.5, 1.0, 2.0]))


def test_temperature_of_query_and_value():
    def ours(q, k, v, tau_q, tau_v):
        return vk.attention(q, k, v * tau_v[..., None, None], scale=1.0, multiplier=tau_q[:, None, :, None])

    def formula(q, k, v, tau_q, tau_v):
        return weigh(dots(q * tau_q[..., None, None], k), v * tau_v[..., None, None])

    agree(ours, formula, *(tokens(2, 13, 2, 8) for _ in range(3)), tokens(2, 13), tokens(2, 13))


def test_bias_by_distance_with_wide_values():
    index = offset_index(7, 7)

    def ours(q, k, v, table):
        return vk.attention(q, k, v, bias_table=unsigned(table, 7, 7))

    def formula(q, k, v, table):
        return weigh(dots(q, k) / 8**0.5 + table[:, index], v)

    agree(ours, formula, tokens(2, 49, 2, 8), tokens(2, 49, 2, 8), tokens(2, 49, 2, 32), tokens(2, 49))


def test_relative_attention():
    def ours(q, k, v, embedding):  # [H, N, d], by distance
        signed = F.pad(embedding, (0, 0, embedding.size(1) - 1, 0))  # no key lies ahead
        return vk.attention(q, k, v, rel_pos=[signed / 8**0.5], is_causal=True)

    def formula(q, k, v, embedding):
        distance = torch.arange(19)[:, None] - torch.arange(19)
        relative = torch.einsum("bihd,hijd->bhij", q, embedding[:, distance.clamp(min=0)])
        logits = (dots(q, k) + relative) / 8**0.5
        return weigh(logits.masked_fill(distance < 0, -torch.inf), v)

    agree(ours, formula, *(tokens(2, 19, 2, 8) for _ in range(3)), tokens(2, 19, 8))


def test_decomposed_relative_positions():
    y, x = grid(4, 5).long().unbind(-1)

    def ours(q, k, v, rows, columns):
        return vk.attention(q, k, v, rel_pos=[rows, columns], num_prefix_tokens=1)

    def formula(q, k, v, rows, columns):
        embedding = rows[y[:, None] - y + 3] + columns[x[:, None] - x + 4]  # [N, N, d]
        relative = torch.einsum("bihd,ijd->bhij", q[:, 1:], embedding)
        return weigh(dots(q, k) / 8**0.5 + F.pad(relative, (1, 0, 1, 0)), v)

    agree(ours, formula, *(tokens(2, 21, 2, 8) for _ in range(3)), tokens(7, 8), tokens(9, 8))


def test_two_softmaxes_over_one_value():
    def position(dy, dx, weight):  # offsets [...], [H, 3] -> [H, ...]
        r = torch.stack([*torch.broadcast_tensors(dy, dx), dy**2 + dx**2], -1)
        return torch.einsum("...r,hr->h...", r.to(weight.dtype), weight)

    def ours(q, k, v, weight, gate):
        content = vk.attention(q, k, v)
        table = by_offset(lambda dy, dx: position(dy, dx, weight), 3, 4)
        local = vk.attention(torch.zeros_like(q), k, v, bias_table=table)
        return torch.lerp(content, local, gate.sigmoid()[:, None])

    def formula(q, k, v, weight, gate):
        g = gate.sigmoid()[:, None, None]
        dy, dx = (grid(3, 4)[:, None] - grid(3, 4)).unbind(-1)  # [N, N]
        p = (1 - g) * (dots(q, k) / 8**0.5).softmax(-1) + g * position(dy, dx, weight).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", p, v)

    agree(ours, formula, *(tokens(2, 12, 2, 8) for _ in range(3)), tokens(2, 3), tokens(2))


def test_proportional_attention():
    sizes = torch.tensor([1, 3, 2, 1, 5])

    def ours(q, k, v):
        return vk.attention(q, k, v, key_bias=sizes.to(q.dtype).log())

    def formula(q, k, v):  # a merged token counts as often as tokens were merged into it
        return plain(q, k.repeat_interleave(sizes, 1), v.repeat_interleave(sizes, 1))

    agree(ours, formula, *(tokens(2, 5, 2, 8) for _ in range(3)))
