"""Mechanisms of the literature in which the batch is a set of windows, frames or groups."""

import torch
import torch.nn.functional as F
import vitkernels as vk
from support.mechanisms import agree, plain, tokens


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
