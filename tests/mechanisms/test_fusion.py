"""Mechanisms in which tokens of several kinds meet: global ones, summaries, windows, images packed together."""

import torch
import vitkernels as vk
from support.mechanisms import agree, dots, grid, plain, tokens


def by_block(x, height, width, size):
    """The tokens of each square block: ``(B, height * width, H, D)`` -> ``(B, blocks, size * size, H, D)``."""
    x = x.unflatten(1, (height // size, size, width // size, size))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def test_global_tokens_of_a_reduced_map():
    # Two layers of the same weights. In each, the map shrinks step by step, its cells attend to one another and are
    # mixed into the global tokens, which the next layer takes over; then every pixel attends to these.
    def halved(x, height, width):
        return by_block(x, height, width, 2).mean(2)

    def ours(x, global_tokens, mix):  # [B, 8 * 8, H, D], [1, 2 * 2, H, D], [2 * 2]
        for _ in range(2):
            cells = halved(halved(x, 8, 8), 4, 4)
            cells = vk.attention(cells, cells, cells)
            global_tokens = torch.lerp(global_tokens, cells, mix.sigmoid()[:, None, None])
            x = x + vk.attention(x, global_tokens, global_tokens)
        return torch.cat([x, global_tokens], 1)

    def formula(x, global_tokens, mix):
        cell = grid(8, 8).long().div(4, rounding_mode="floor") @ torch.tensor([2, 1])
        mean = torch.nn.functional.one_hot(cell).to(x.dtype) / 16  # [N, cells]
        share = mix.sigmoid()[:, None, None]
        for _ in range(2):
            cells = torch.einsum("bnhd,nc->bchd", x, mean)
            global_tokens = (1 - share) * global_tokens + share * plain(cells, cells, cells)
            x = x + plain(x, global_tokens, global_tokens)
        return torch.cat([x, global_tokens], 1)

    agree(ours, formula, tokens(2, 64, 2, 8), tokens(1, 4, 2, 8), tokens(4))


def test_patches_relevant_to_a_text():
    keep = 6

    def relevant(x, text):  # [B, keep], in the order of the image
        return dots(text, x).mean((1, 2)).topk(keep).indices.sort().values

    def ours(x, text, summaries):  # [B, N, H, D], [B, 1, H, D], [1, S, H, D]
        kept = relevant(x, text)
        others = torch.zeros(x.shape[:2], dtype=x.dtype).scatter(1, kept, -torch.inf)
        one = vk.attention(text, x, x, key_bias=others[:, None])  # what was not kept, weighted by its relevance
        x = torch.cat([x.gather(1, kept[..., None, None].expand(-1, -1, *x.shape[2:])), one], 1)
        x = vk.attention(x, x, x)
        return torch.cat([x, vk.attention(summaries, x, x)], 1)

    def formula(x, text, summaries):
        is_kept = torch.zeros(x.shape[:2], dtype=torch.bool).scatter(1, relevant(x, text), True)
        one = plain(text, x, x, ~is_kept[:, None, None])
        x, is_kept = torch.cat([x, one], 1), torch.cat([is_kept, is_kept.new_ones(2, 1)], 1)
        x = plain(x, x, x, is_kept[:, None, None])
        summaries = plain(summaries.expand(2, -1, -1, -1), x, x, is_kept[:, None, None])
        return torch.cat([x[is_kept].unflatten(0, (2, keep + 1)), summaries], 1)

    agree(ours, formula, tokens(2, 30, 2, 8), tokens(2, 1, 2, 8), tokens(1, 4, 2, 8))


def test_windows_attend_to_learned_summaries():
    window = grid(6, 6).long().div(3, rounding_mode="floor") @ torch.tensor([2, 1])

    def ours(x, weight):  # [B, 6 * 6, H, D], [M, N]: a linear layer over the tokens
        on_map = x.unflatten(1, (6, 6))
        local = vk.window_attention(on_map, on_map, on_map, 3).flatten(1, 2)
        few = torch.einsum("mn,bnhd->bmhd", weight, x)
        return local + vk.attention(local, few, few)

    def formula(x, weight):
        local = plain(x, x, x, window[:, None] == window)
        few = (weight @ x.flatten(2)).unflatten(2, x.shape[2:])
        return local + plain(local, few, few)

    agree(ours, formula, tokens(2, 36, 2, 8), tokens(4, 36))


def test_packed_images_and_ragged_windows():
    sizes, side = [(5, 7), (3, 4)], 3
    position = torch.cat([grid(*size) for size in sizes])  # [tokens, 2]
    image = torch.arange(2).repeat_interleave(torch.tensor([h * w for h, w in sizes]))
    # Windows at the right and lower borders are smaller, and nothing is padded.
    row, column = position.long().div(side, rounding_mode="floor").unbind(1)
    window = (image * 10 + row) * 10 + column

    def rotated(x):  # [tokens, H, D]: one half of the channels turns with the row, the other with the column
        angle = position.to(x.dtype)[:, None, :, None] * torch.tensor(
            [1.0, 0.1], dtype=x.dtype
        )  # [tokens, 1, 2, D / 4]
        a, b = x.unflatten(-1, (2, 2, -1)).unbind(-2)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)

    def packed(x, rotate, group):
        lengths = group.unique(return_counts=True)[1]
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        longest = int(lengths.max())
        return vk.attention_varlen(rotate(x), rotate(x), x, offsets, offsets, longest, longest)

    def ours(x):
        order = window.argsort(stable=True)  # windows of an image stay together: whole images need no other order

        def rotate(y):
            return rotated(y[order.argsort()])[order]

        x = packed(x[order], rotate, window[order])
        return packed(x, rotate, image[order])[order.argsort()]

    def formula(x):
        for group in (window, image):
            q, v = rotated(x)[None], x[None]
            x = plain(q, q, v, group[:, None] == group)[0]
        return x

    agree(ours, formula, tokens(47, 2, 8))
