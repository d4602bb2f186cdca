"""Mechanisms of the literature, written with the package's calls and with the paper's own formula.

Each test states a mechanism twice and compares results and gradients. docs/mechanisms.md names the tests. The
formulas work on all tokens at once and mask the pairs that a mechanism leaves out.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import vitkernels as vk

DTYPES = {torch.float64: 1e-9, torch.float32: 3e-5}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
    """softmax(QK^T / sqrt(d)) V over the pairs that the boolean matrix ``visible`` leaves."""
    logits = dots(query, key) / query.size(-1) ** 0.5
    return weigh(logits if visible is None else logits.masked_fill(~visible, -torch.inf), value)


def grid(height, width):
    """Coordinates ``(height * width, 2)`` of a map's tokens, in float64."""
    return torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()


def offset_index(height, width):
    """Index of the unsigned offset of every pair of tokens, ``(N, N)`` in ``[0, N)``."""
    offset = (grid(height, width)[:, None] - grid(height, width)).abs().long()
    return offset[..., 0] * width + offset[..., 1]


# Terms of the logit


def test_gaussian_mixture_mask():
    squared = torch.cdist(grid(4, 5), grid(4, 5)).square()  # [N, N]

    def mask(alpha, sigma):  # [H, K] each -> [H, N, N]
        return (alpha[..., None, None] * torch.exp(-squared / (2 * sigma[..., None, None] ** 2))).sum(1)

    def ours(q, k, v, alpha, sigma):
        return vk.attention(q, k, v, multiplier=mask(alpha, sigma))

    def formula(q, k, v, alpha, sigma):
        return weigh(dots(q, k) / 8**0.5 * mask(alpha, sigma), v)

    qkv = [tokens(2, 20, 2, 8) for _ in range(3)]
    agree(ours, formula, *qkv, tokens(2, 5), 1 + tokens(2, 5).sigmoid())


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
        return vk.attention(q, k, v, bias=table[:, index])

    def formula(q, k, v, table):
        return weigh(dots(q, k) / 8**0.5 + table[:, index], v)

    agree(ours, formula, tokens(2, 49, 2, 8), tokens(2, 49, 2, 8), tokens(2, 49, 2, 32), tokens(2, 49))


def test_two_softmaxes_over_one_value():
    coordinates = grid(3, 4)
    delta = coordinates[:, None] - coordinates
    r = torch.cat([delta, delta.square().sum(-1, keepdim=True)], -1)  # [N, N, 3]

    def position(weight):  # [H, 3] -> [H, N, N]
        return torch.einsum("ijr,hr->hij", r.to(weight.dtype), weight)

    def ours(q, k, v, weight, gate):
        content = vk.attention(q, k, v)
        local = vk.attention(torch.zeros_like(q), k, v, bias=position(weight))
        return torch.lerp(content, local, gate.sigmoid()[:, None])

    def formula(q, k, v, weight, gate):
        g = gate.sigmoid()[:, None, None]
        p = (1 - g) * (dots(q, k) / 8**0.5).softmax(-1) + g * position(weight).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", p, v)

    agree(ours, formula, *(tokens(2, 12, 2, 8) for _ in range(3)), tokens(2, 3), tokens(2))


def test_proportional_attention():
    sizes = torch.tensor([1, 3, 2, 1, 5])

    def ours(q, k, v):
        return vk.attention(q, k, v, key_bias=sizes.to(q.dtype).log())

    def formula(q, k, v):  # a merged token counts as often as tokens were merged into it
        return plain(q, k.repeat_interleave(sizes, 1), v.repeat_interleave(sizes, 1))

    agree(ours, formula, *(tokens(2, 5, 2, 8) for _ in range(3)))


# Which heads, queries and keys


def test_single_head_on_part_of_the_channels():
    def split(x):  # [B, N, 1, 8 + 8 + 24], one projection
        return x.split([8, 8, 24], -1)

    agree(lambda x: vk.attention(*split(x)), lambda x: plain(*split(x)), tokens(2, 49, 1, 40))


def test_uneven_query_groups():
    groups = [3, 0, 1, 2]  # query heads per kv head
    head_map = torch.arange(4).repeat_interleave(torch.tensor(groups))

    def ours(q, k, v):
        return vk.attention(q, k, v, head_map=head_map)

    def formula(q, k, v):
        parts = zip(q.split(groups, 2), k.split(1, 2), v.split(1, 2), strict=True)
        return torch.cat([plain(a, b.expand_as(a), c.expand_as(a)) for a, b, c in parts], 2)

    agree(ours, formula, tokens(2, 9, 6, 8), tokens(2, 9, 4, 8), tokens(2, 9, 4, 8))


def test_class_token_queries_the_other_branch():
    def ours(small, large):
        key = torch.cat([small[:, :1], large[:, 1:]], 1)
        return vk.attention(small[:, :1], key, key)

    def formula(small, large):
        visible = torch.arange(small.size(1) + large.size(1)) != small.size(1)  # not the other class token
        visible[1 : small.size(1)] = False
        both = torch.cat([small, large], 1)
        return plain(small[:, :1], both, both, visible)

    agree(ours, formula, tokens(2, 26, 2, 8), tokens(2, 17, 2, 8))


def test_top_queries_against_all_keys():
    rows = tokens(2, 30).topk(3, 1).indices[..., None, None].expand(-1, -1, 2, 8)  # by attention roll-out

    def ours(q, k, v):
        return vk.attention(q.gather(1, rows), k, v)

    def formula(q, k, v):
        return plain(q, k, v).gather(1, rows)

    agree(ours, formula, *(tokens(2, 30, 2, 8) for _ in range(3)))


def test_keys_of_a_paired_image():
    def ours(q, k, v):
        return vk.attention(q, k, v, additional_keys=k.flip(0), additional_values=v.flip(0))

    def formula(q, k, v):
        return plain(q, torch.cat([k, k.flip(0)], 1), torch.cat([v, v.flip(0)], 1))

    agree(ours, formula, *(tokens(2, 10, 2, 8) for _ in range(3)))


def test_keys_of_earlier_blocks():
    index = offset_index(4, 4)

    def ours(q, k, v, earlier_k, earlier_v, table, earlier_bias):
        own = vk.attention(q, k, v, bias=table[:, index], return_lse=True)
        earlier = vk.attention(q, earlier_k, earlier_v, key_bias=earlier_bias, return_lse=True)
        return vk.merge_attentions(*map(list, zip(own, earlier, strict=True)))[0]

    def formula(q, k, v, earlier_k, earlier_v, table, earlier_bias):
        bias = torch.cat([table[:, index], earlier_bias[:, None].expand(-1, 16, -1)], -1)
        logits = dots(q, torch.cat([k, earlier_k], 1)) / 8**0.5 + bias
        return weigh(logits, torch.cat([v, earlier_v], 1))

    own, earlier = [tokens(2, 16, 2, 8) for _ in range(3)], [tokens(2, 3, 2, 8) for _ in range(2)]
    agree(ours, formula, *own, *earlier, tokens(2, 16), tokens(2, 3))


def test_absent_channels():
    present = torch.tensor([True, False, True]).repeat_interleave(9)  # three channels of nine patches

    def ours(q, k, v):
        key_bias = torch.zeros(27).masked_fill(~present, -torch.inf)
        return vk.attention(q, k, v, key_bias=key_bias)[:, present]

    def formula(q, k, v):
        return plain(q[:, present], k[:, present], v[:, present])

    agree(ours, formula, *(tokens(2, 27, 2, 8) for _ in range(3)))


def test_causal_with_class_token_last():
    def ours(q, k, v):
        return vk.attention(q, k, v, is_causal=True)

    def formula(q, k, v):
        return plain(q, k, v, torch.arange(17)[:, None] >= torch.arange(17))

    agree(ours, formula, *(tokens(2, 17, 2, 8) for _ in range(3)))


def pooled_tokens(x):  # [B, 64, H, D] -> [B, 16, H, D]
    return x.unflatten(1, (16, 4)).mean(2)


def strided_convolution(x):
    b, _, h, d = x.shape
    weight = torch.linspace(-1, 1, h * d * 9, dtype=x.dtype).view(h * d, 1, 3, 3)
    image = x.flatten(2).transpose(1, 2).unflatten(2, (8, 8))  # [B, HD, 8, 8]
    small = F.conv2d(image, weight, stride=2, padding=1, groups=h * d)
    return small.flatten(2).transpose(1, 2).reshape(b, 16, h, d)


def pyramid(x):
    image = x.flatten(2).transpose(1, 2).unflatten(2, (8, 8))  # [B, HD, 8, 8]
    levels = [F.adaptive_max_pool2d(image, size).flatten(2) for size in (1, 2, 3, 6)]
    return torch.cat(levels, -1).transpose(1, 2).unflatten(2, x.shape[2:])


@pytest.mark.parametrize("reduce", [pooled_tokens, strided_convolution, pyramid])
def test_keys_from_a_reduced_map(reduce):
    agree(
        lambda x: vk.attention(x, reduce(x), reduce(x)),
        lambda x: plain(x, reduce(x), reduce(x)),
        tokens(2, 64, 2, 8),
    )


def test_a_token_for_every_pixel():
    # All 50,176 keys, a few of the queries: the row must be right at its full length.
    query, key, value = tokens(1, 3, 1, 16), tokens(1, 50176, 1, 16), tokens(1, 50176, 1, 16)
    agree(vk.attention, plain, query, key, value)


# The batch is a set of windows, frames or groups


def test_query_shared_by_all_windows():
    index = offset_index(4, 4)

    def ours(q, k, v, table):  # q: [1, 16, H, D]; k, v: one window of one image per batch element
        return vk.attention(q, k, v, bias=table[:, index])

    def formula(q, k, v, table):
        windows = zip(k.split(1), v.split(1), strict=True)
        return torch.cat([weigh(dots(q, a) / 8**0.5 + table[:, index], b) for a, b in windows])

    agree(ours, formula, tokens(1, 16, 2, 8), tokens(6, 16, 2, 8), tokens(6, 16, 2, 8), tokens(2, 16))


def test_divided_space_time():
    frames, places = 3, 5

    def ours(x, cls):  # [B, T, S, H, D], [B, 1, H, D]
        columns = x.transpose(1, 2).flatten(0, 1)  # [BS, T, H, D]
        x = vk.attention(columns, columns, columns).unflatten(0, (2, places)).transpose(1, 2)
        images = x.flatten(0, 1)  # [BT, S, H, D]
        cls = cls.repeat_interleave(frames, 0)
        out = vk.attention(images, images, images, additional_keys=cls, additional_values=cls)
        return out.unflatten(0, (2, frames)).flatten(1, 2)

    def formula(x, cls):
        frame, place = torch.arange(frames).repeat_interleave(places), torch.arange(places).repeat(frames)
        x = x.flatten(1, 2)
        x = plain(x, x, x, place[:, None] == place)
        key = torch.cat([x, cls], 1)
        return plain(x, key, key, F.pad(frame[:, None] == frame, (0, 1), value=True))

    agree(ours, formula, tokens(2, frames, places, 2, 8), tokens(2, 1, 2, 8))


def test_frames_apart_then_together():
    def ours(x):  # [B, T, S, H, D]
        frames = x.flatten(0, 1)
        x = vk.attention(frames, frames, frames).unflatten(0, (2, 3)).flatten(1, 2)
        return vk.attention(x, x, x)

    def formula(x):
        frame = torch.arange(3).repeat_interleave(7)
        x = x.flatten(1, 2)
        x = plain(x, x, x, frame[:, None] == frame)
        return plain(x, x, x)

    agree(ours, formula, tokens(2, 3, 7, 2, 8))


def test_groups_and_latents():
    groups, size, num_latents = 4, 6, 2

    def ours(x, latents):  # [B, G, n, H, D], [B, G, l, H, D]
        x, latents = x.flatten(0, 1), latents.flatten(0, 1)
        latents = vk.attention(latents, x, x).unflatten(0, (2, groups)).flatten(1, 2)
        latents = vk.attention(latents, latents, latents).unflatten(1, (groups, -1)).flatten(0, 1)
        return vk.attention(x, latents, latents).unflatten(0, (2, groups)).flatten(1, 2)

    def formula(x, latents):
        of_token = torch.arange(groups).repeat_interleave(size)
        of_latent = torch.arange(groups).repeat_interleave(num_latents)
        x, latents = x.flatten(1, 2), latents.flatten(1, 2)
        latents = plain(latents, x, x, of_latent[:, None] == of_token)
        latents = plain(latents, latents, latents)
        return plain(x, latents, latents, of_token[:, None] == of_latent)

    agree(ours, formula, tokens(2, groups, size, 2, 8), tokens(2, groups, num_latents, 2, 8))


# Several attentions in one mechanism


def test_agents():
    def ours(q, k, v, agent, agent_bias, query_bias):
        return vk.attention(q, agent, vk.attention(agent, k, v, bias=agent_bias), bias=query_bias)

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
        rows = [x.flatten(0, 1) for x in (q, k, v)]
        columns = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        not_itself = torch.zeros(height, height).fill_diagonal_(-torch.inf)  # the row has seen it
        row = vk.attention(*rows, scale=1.0, return_lse=True)
        column = vk.attention(*columns, scale=1.0, bias=not_itself, return_lse=True)
        row = [x.unflatten(0, (2, height)) for x in row]
        column = [x.unflatten(0, (2, width)).transpose(1, 2).contiguous() for x in column]
        return vk.merge_attentions(*map(list, zip(row, column, strict=True)))[0].flatten(1, 2)

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
        bias = torch.zeros(16, 16).masked_fill(~near, -torch.inf)
        return outer(vk.attention(channel, channel, channel), vk.attention(space, space, space, bias=bias))

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


def test_the_table_names_these_tests():
    page = Path(__file__).parent.parent / "docs" / "mechanisms.md"
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))
    here = {name for name in globals() if name.startswith("test_")} - {"test_the_table_names_these_tests"}
    assert named == here
