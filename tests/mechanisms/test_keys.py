"""Mechanisms of the literature by which heads, queries and keys meet."""

import pytest
import torch
import torch.nn.functional as F
import vitkernels as vk
from support.mechanisms import agree, dots, offset_index, plain, tokens, unsigned, weigh


def test_single_head_on_part_of_the_channels():
    def split(x):  # [B, N, 1, 8 + 8 + 24], one projection
        return x.split([8, 8, 24], -1)

    agree(lambda x: vk.attention(*split(x)), lambda x: plain(*split(x)), tokens(2, 49, 1, 40))


def heads_by_importance(importance, num_heads):
    """``(kv_heads,)`` -> ``(num_heads,)``: how many query heads a key head serves is proportional to its importance.

    A share is rounded such that all add up. Nothing is read back from the device, and every shape is known.
    """
    ends = (importance.cumsum(0) * (num_heads / importance.sum())).round()  # [kv_heads]
    ends[-1] = num_heads
    return torch.searchsorted(ends, torch.arange(num_heads, device=ends.device, dtype=ends.dtype), right=True)


def test_uneven_query_groups():
    groups = [3, 0, 1, 2]  # query heads per kv head, from the norms of the keys

    def ours(q, k, v):
        weight = torch.tensor(groups).to(k.dtype) + 0.1 * k.detach().square().mean((0, 1, 3)).tanh()
        return vk.attention(q, k, v, head_map=heads_by_importance(weight, 6))

    def formula(q, k, v):
        parts = zip(q.split(groups, 2), k.split(1, 2), v.split(1, 2), strict=True)
        return torch.cat([plain(a, b.expand_as(a), c.expand_as(a)) for a, b, c in parts], 2)

    agree(ours, formula, tokens(2, 9, 6, 8), tokens(2, 9, 4, 8), tokens(2, 9, 4, 8))


def test_uneven_query_groups_without_a_host():
    """On the meta device a value cannot be read: the head map is made of device operations alone."""
    importance = torch.tensor([0.9, 0.0, 0.4, 0.7])
    assert heads_by_importance(importance, 6).tolist() == [0, 0, 0, 2, 3, 3]
    assert heads_by_importance(importance.to("meta"), 6).shape == (6,)
    compiled = torch.compile(heads_by_importance, fullgraph=True, backend="eager")
    assert torch.equal(compiled(importance, 6), heads_by_importance(importance, 6))


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
        own = vk.attention(q, k, v, bias_table=unsigned(table, 4, 4), return_lse=True)
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
