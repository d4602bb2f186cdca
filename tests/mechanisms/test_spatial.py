"""Mechanisms on maps: windows, grids, stripes, halos and neighborhoods."""

import torch
import torch.nn.functional as F
import vitkernels as vk
from support.mechanisms import agree, dots, grid, plain, tokens, unsigned, weigh

H, W = 8, 12


def on_map(call):
    """``call`` for tokens in a row: ``(B, H * W, heads, D)`` to and from the map."""
    return lambda x, *others: call(x.unflatten(1, (H, W)), *others).flatten(1, 2)


def place(height=H, width=W):
    return grid(height, width).long()


def together(key):
    """Pairs of tokens whose ``key (N, axes)`` is the same."""
    return (key[:, None] == key).all(-1)


def offset_bias(table, offset, reach):
    """``(heads, N, N)``: the table's entry of each ``offset (N, N, 2)``, of which none beyond ``reach`` is seen."""
    index = offset.clamp(-reach, reach) + reach
    return table[:, index[..., 0], index[..., 1]]


def biased(x, table, visible, offset, reach):
    logits = dots(x, x) / x.size(-1) ** 0.5 + offset_bias(table, offset, reach)
    return weigh(logits.masked_fill(~visible, -torch.inf), x)


def offsets():
    return place()[:, None] - place()


def test_shifted_windows():
    size, shift = 4, 2

    def ours(x, table):  # [B, N, heads, D], [(2 size - 1)^2, heads]
        x = vk.window_attention(x, x, x, size, bias_table=table)
        return vk.window_attention(x, x, x, size, shift, bias_table=table)

    def windows(x):  # [B, H, W, heads, D] -> [B, windows, size^2, heads, D]
        return x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def reverse(x):
        x = x.unflatten(1, (H // size, W // size)).unflatten(3, (size, size))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def formula(x, table):
        by_head = table.t().unflatten(1, (2 * size - 1, 2 * size - 1))
        inside = place(size, size)
        bias = offset_bias(by_head, inside[:, None] - inside, size - 1)
        for by in (0, shift):
            # Regions of the rolled map that the roll has put next to each other.
            region = torch.zeros(1, H, W, 1, 1, dtype=torch.int64)
            if by:
                for i, rows in enumerate((slice(-size), slice(-size, -by), slice(-by, None))):
                    for j, columns in enumerate((slice(-size), slice(-size, -by), slice(-by, None))):
                        region[:, rows, columns] = 3 * i + j
            region = windows(region)[0, :, :, 0, 0]  # [windows, size^2]
            mask = (region[:, None] != region[:, :, None]).to(x.dtype) * -100.0
            w = windows(x.roll((-by, -by), (1, 2)))
            logits = torch.einsum("bwihd,bwjhd->bwhij", w, w) / x.size(-1) ** 0.5 + bias + mask[:, None]
            x = reverse(torch.einsum("bwhij,bwjhd->bwihd", logits.softmax(-1), w)).roll((by, by), (1, 2))
        return x

    agree(ours, formula, tokens(2, H, W, 2, 8), tokens(49, 2))


def test_windows_with_a_bias_by_distance():
    size = 4

    def ours(x, biases):  # [B, N, heads, D], [heads, size^2]: one for each unsigned offset
        return vk.window_attention(x, x, x, size, bias_table=unsigned(biases, size, size))

    def formula(x, biases):
        apart = offsets().abs().clamp(max=size - 1)
        bias = biases[:, apart[..., 0] * size + apart[..., 1]]
        logits = dots(x, x) / x.size(-1) ** 0.5 + bias
        return weigh(logits.masked_fill(~together(place() // size), -torch.inf), x)

    agree(on_map(ours), formula, tokens(2, H * W, 2, 8), tokens(2, size**2))


def test_windows_of_the_map_and_of_a_rolled_one():
    size, by = 4, 2

    def ours(x):
        rolled = x.roll((by, by), (1, 2))
        rolled = vk.window_attention(rolled, rolled, rolled, size).roll((-by, -by), (1, 2))
        return (vk.window_attention(x, x, x, size) + rolled) / 2

    def formula(x):
        around = (place() + by) % torch.tensor([H, W])
        return (plain(x, x, x, together(place() // size)) + plain(x, x, x, together(around // size))) / 2

    agree(on_map(ours), formula, tokens(2, H * W, 2, 8))


def test_windows_then_grids():
    size = 4

    def ours(x, window_table, grid_table):  # tables: [(2 size - 1)^2, heads]
        x = vk.window_attention(x, x, x, size, bias_table=window_table)
        return vk.grid_attention(x, x, x, size, bias_table=grid_table)

    def formula(x, window_table, grid_table):
        apart = torch.tensor([H, W]) // size
        tables = [t.t().unflatten(1, (7, 7)) for t in (window_table, grid_table)]
        x = biased(x, tables[0], together(place() // size), offsets(), size - 1)
        steps = place()[:, None].div(apart, rounding_mode="floor") - place().div(apart, rounding_mode="floor")
        return biased(x, tables[1], together(place() % apart), steps, size - 1)

    agree(on_map(ours), formula, tokens(2, H * W, 2, 8), tokens(49, 2), tokens(49, 2))


def test_windows_then_equal_remainders():
    group, interval = 4, 4

    def made(w1, w2, y, x):  # the dynamic position bias: an MLP of the offset
        place = torch.stack(torch.broadcast_tensors(y, x), -1).to(w1.dtype)
        return (F.relu(place @ w1) @ w2).movedim(-1, 0)

    def ours(x, w1, w2):
        def table(height, width):
            return made(w1, w2, torch.arange(1 - height, height)[:, None], torch.arange(1 - width, width))

        x = vk.window_attention(x, x, x, group, bias_table=table(group, group))
        size = (H // interval, W // interval)
        return vk.grid_attention(x, x, x, size, bias_table=table(*size))

    def formula(x, w1, w2):
        far = place()[:, None] // interval - place() // interval
        for visible, offset in ((together(place() // group), offsets()), (together(place() % interval), far)):
            logits = dots(x, x) / x.size(-1) ** 0.5 + made(w1, w2, *offset.unbind(-1))
            x = weigh(logits.masked_fill(~visible, -torch.inf), x)
        return x

    agree(on_map(ours), formula, tokens(2, H * W, 2, 8), tokens(2, 5), tokens(5, 2))


def test_cross_shaped_stripes():
    width = 2

    def encoding(v, kernel, visible):  # the depthwise convolution of each stripe by itself
        step = offsets()
        reach = visible & (step.abs() <= 1).all(-1)
        entry = kernel[:, (1 - step[..., 0]).clamp(0, 2), (1 - step[..., 1]).clamp(0, 2)]  # [C, N, N]
        return torch.einsum("cij,bjc->bic", entry * reach, v)

    def stripes():
        return together(place()[:, 1:] // width), together(place()[:, :1] // width)

    def ours(x, kernels):  # [B, H, W, heads, D], [2, C / 2, 3, 3]
        module = vk.nn.CrossShapedWindowAttention(16, 4, width)
        out = vk.cross_shaped_window_attention(x, x, x, width).flatten(-2)
        parts = []
        for i, (v, kernel) in enumerate(zip(x.flatten(-2).chunk(2, -1), kernels, strict=True)):
            stripe = (H, width) if i == 0 else (width, W)
            parameters = {"get_v.weight": kernel[:, None], "get_v.bias": kernel.new_zeros(8)}
            parts.append(torch.func.functional_call(module.attns[i], parameters, (v, *stripe)))
        return out + torch.cat(parts, -1)

    def formula(x, kernels):
        halves = zip(x.chunk(2, 2), kernels, stripes(), strict=True)
        return torch.cat([plain(h, h, h, s).flatten(2) + encoding(h.flatten(2), k, s) for h, k, s in halves], -1)

    agree(on_map(ours), formula, tokens(2, H * W, 4, 4), tokens(2, 8, 3, 3))


def test_overlapping_windows():
    size, overlap = 4, 2

    def ours(x, table):  # the queries of a window, the keys of one that is larger by `overlap` on each side
        return vk.halo_attention(x, x, x, size, overlap, bias_table=table, outside="zero")

    def formula(x, table):
        by_head = table.t().unflatten(1, (2 * (size + overlap) - 1,) * 2)
        padded = F.pad(x.unflatten(1, (H, W)), (0,) * 4 + (overlap,) * 4).flatten(1, 2)
        keys = place(H + 2 * overlap, W + 2 * overlap) - overlap
        begin = place() // size * size
        beyond = keys - begin[:, None] + overlap  # [N, keys, 2]
        visible = ((beyond >= 0) & (beyond < size + 2 * overlap)).all(-1)
        bias = offset_bias(by_head, place()[:, None] - keys, size + overlap - 1)
        logits = dots(x, padded) / x.size(-1) ** 0.5 + bias
        return weigh(logits.masked_fill(~visible, -torch.inf), padded)

    agree(on_map(ours), formula, tokens(2, H * W, 2, 8), tokens(121, 2))


def test_blocks_with_a_halo():
    size, halo = 4, 1

    def ours(x, rows, columns):  # relative logits: embeddings of the offsets, [2 (size + halo) - 1, D]
        return vk.halo_attention(x, x, x, size, halo, rel_pos=[rows, columns])

    def formula(x, rows, columns):
        beyond = place() - (place() // size * size)[:, None]
        visible = ((beyond >= -halo) & (beyond < size + halo)).all(-1)
        index = offsets().clamp(1 - size - halo, size + halo - 1) + size + halo - 1
        relative = rows[index[..., 0]] + columns[index[..., 1]]  # [N, N, D]
        logits = dots(x, x) / x.size(-1) ** 0.5 + torch.einsum("bihd,ijd->bhij", x, relative)
        return weigh(logits.masked_fill(~visible, -torch.inf), x)

    agree(on_map(ours), formula, tokens(2, H * W, 2, 8), tokens(9, 8), tokens(9, 8))


def test_dilated_neighborhoods():
    size, dilation = 3, 2

    def ours(x, rpb):  # [heads, 2 size - 1, 2 size - 1], by the offset of the key
        return vk.na2d(x, x, x, size, dilation=dilation, rpb=rpb)

    def formula(x, rpb):
        # The nearest keys that are a multiple of the dilation away, moved inwards at the border.
        length = torch.tensor([H, W]) // dilation
        at = place() // dilation
        centre = at.clamp(min=1).minimum(length - 2)
        visible = ((at - centre[:, None]).abs() <= 1).all(-1) & together(place() % dilation)
        return biased(x, rpb, visible, at - at[:, None], size - 1)

    agree(on_map(ours), formula, tokens(2, H * W, 2, 8), tokens(2, 5, 5))


def test_windows_around_each_token_with_zeros_outside():
    size = 5

    def ours(x, table):
        return vk.spatial_attention(x, x, x, [vk.Sliding(size)] * 2, outside="zero", bias_table=table)

    def formula(x, table):  # every window unfolded from the padded map
        padded = F.pad(x.unflatten(1, (H, W)), (0,) * 4 + (size // 2,) * 4)
        keys = padded.unfold(1, size, 1).unfold(2, size, 1).flatten(-2).flatten(1, 2)  # [B, N, heads, D, size^2]
        bias = table.flip(1, 2).flatten(1)  # from the offset of the query to that of the key
        logits = torch.einsum("bnhd,bnhdm->bnhm", x, keys) / x.size(-1) ** 0.5 + bias
        return torch.einsum("bnhm,bnhdm->bnhd", logits.softmax(-1), keys)

    agree(on_map(ours), formula, tokens(2, H * W, 2, 8), tokens(2, 5, 5))


def test_query_shared_by_all_windows():
    size = 4

    def ours(x, q, table):  # one query window for each image: [B, size, size, heads, D]
        return vk.window_attention(q, x, x, size, bias_table=table, is_shared_query=True)

    def formula(x, q, table):
        inside = place() % size
        q = q[:, inside[:, 0], inside[:, 1]]
        bias = offset_bias(table.t().unflatten(1, (7, 7)), inside[:, None] - inside, size - 1)
        logits = dots(q, x) / x.size(-1) ** 0.5 + bias
        return weigh(logits.masked_fill(~together(place() // size), -torch.inf), x)

    agree(on_map(ours), formula, tokens(2, H * W, 2, 8), tokens(2, size, size, 2, 8), tokens(49, 2))


def test_space_and_time_as_axes():
    frames = 3

    def ours(x):  # [B, T, H, W, heads, D]: within a place, within a frame, then all
        for axes in (
            [vk.Full(), vk.Block(1), vk.Block(1)],
            [vk.Block(1), vk.Full(), vk.Full()],
            [vk.Full()] * 3,
        ):
            x = vk.spatial_attention(x, x, x, axes)
        return x.flatten(1, 3)

    def formula(x):
        at = torch.cartesian_prod(torch.arange(frames), torch.arange(4), torch.arange(5))
        x = x.flatten(1, 3)
        for visible in (together(at[:, 1:]), together(at[:, :1]), None):
            x = plain(x, x, x, visible)
        return x

    agree(ours, formula, tokens(2, frames, 4, 5, 2, 8))
