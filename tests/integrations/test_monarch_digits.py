"""A small vision transformer on handwritten digits learns as well with Monarch MLPs, and without attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import vitkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F

datasets = pytest.importorskip("sklearn.datasets")
DIM, DEPTH, PATCH = 64, 2, 2
EPOCHS, BATCH, RATE = 20, 64, 3e-3
TEST_IMAGES = 500
TOKENS = (8 // PATCH) ** 2
SEEDS = (0, 1, 2)  # over 15, Monarch is 0.3 points ahead with a standard deviation of 1.2; their mean varies less


def attention() -> nn.Module:
    return vk.nn.Attention(DIM, 4, qkv_bias=True)


def dense_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))


def monarch_mixer() -> nn.Module:
    return vk.nn.MonarchMixer(DIM, TOKENS, filter_order=32)


# The mixers of tokens and of channels.
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "dense": (attention, dense_mlp),
    "Monarch MLPs": (attention, lambda: vk.nn.MonarchMLP(DIM)),
    "Monarch Mixer": (monarch_mixer, lambda: vk.nn.MonarchMLP(DIM)),
}


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        mixer, mlp = KINDS[kind]
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn, self.mlp = mixer(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Digits(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH**2, DIM)
        self.position = nn.Parameter(0.02 * torch.randn(TOKENS, DIM))
        self.blocks = nn.Sequential(*(Block(kind) for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)  # [B, 16, 4]
        return self.head(self.norm(self.blocks(self.embed(patches) + self.position)).mean(1))


def accuracy(kind: str, seed: int) -> float:
    """In percent, on images that training has not seen."""
    data = datasets.load_digits()
    images, labels = torch.tensor(data.images).float() / 16, torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    held, rest = order[:TEST_IMAGES], order[TEST_IMAGES:]
    torch.manual_seed(seed)
    model = Digits(kind)
    steps = len(rest) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * steps)
    for _ in range(EPOCHS):
        shuffled = rest[torch.randperm(len(rest), generator=generator)]
        for batch in shuffled[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = model.eval()(images[held]).argmax(1) == labels[held]
    return 100 * right.double().mean().item()


@cache
def mean_accuracy(kind: str) -> float:
    return sum(accuracy(kind, seed) for seed in SEEDS) / len(SEEDS)


@pytest.mark.full
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
def test_within_a_point_of_dense(kind):
    dense = mean_accuracy("dense")
    assert dense > 94, "the task is learnt"
    assert mean_accuracy(kind) > dense - 1
