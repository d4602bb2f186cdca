"""The model of examples/biformer.py: its files' keys, and training by fused and by gathered attention."""

from __future__ import annotations

import pytest
import torch
import vitkernels as vk
from torch.nn import functional as F

from examples.biformer import ALL_REGIONS, BiFormer, biformer_base, biformer_small, biformer_tiny

STEPS, BATCH = 40, 48


def test_keys_and_shapes_are_those_of_the_published_files():
    state = biformer_tiny().state_dict()
    assert len(state) == 264
    parameters = [
        sum(t.numel() for t in make().parameters()) for make in (biformer_tiny, biformer_small, biformer_base)
    ]
    assert parameters == [13_142_760, 25_536_232, 56_804_968]
    shapes = {
        "downsample_layers.0.0.weight": (32, 3, 3, 3),
        "downsample_layers.0.3.weight": (64, 32, 3, 3),
        "downsample_layers.3.1.running_var": (512,),
        "stages.0.0.pos_embed.weight": (64, 1, 3, 3),
        "stages.1.1.norm1.weight": (128,),
        "stages.2.7.attn.qkv.qkv.weight": (768, 256),
        "stages.2.7.attn.wo.bias": (256,),
        "stages.2.7.attn.lepe.weight": (256, 1, 5, 5),
        "stages.3.1.attn.qkv.weight": (1536, 512),
        "stages.3.1.attn.proj.bias": (512,),
        "stages.3.1.attn.lepe.bias": (512,),
        "stages.3.1.mlp.0.weight": (1536, 512),
        "stages.3.1.mlp.3.weight": (512, 1536),
        "norm.num_batches_tracked": (),
        "head.weight": (1000, 512),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def losses(images, labels):
    """Of a small model, which begins the same in every call."""
    torch.manual_seed(0)
    model = BiFormer((1, 1), (32, 64), (3, ALL_REGIONS), n_win=4, head_dim=16, in_chans=1, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    found = []
    for step in range(STEPS):
        batch = slice(step * BATCH % len(images), step * BATCH % len(images) + BATCH)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def test_digits_are_learnt_as_with_gathered_keys(monkeypatch):
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = F.interpolate(torch.tensor(data.images).float().unsqueeze(1) / 16, scale_factor=4.0)  # [N, 1, 32, 32]
    images, labels = images[: 960 // BATCH * BATCH], torch.tensor(data.target)[:960]
    ours = losses(images, labels)
    monkeypatch.setattr(vk.nn.routing, "regional_routing_attention", vk.reference.regional_routing_attention)
    torch.testing.assert_close(ours, losses(images, labels), rtol=1e-3, atol=1e-3)
    assert ours[-5:].mean() < 0.5 * ours[:5].mean(), "the task is learnt"
