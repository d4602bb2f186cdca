"""How far two versions of one model agree."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from examples.dinov2 import Output

__all__ = ["Agreement", "agreement"]

FLOOR = 2e-5  # of the reference's largest value, about 170 float32 roundings through twelve layers


class Agreement(NamedTuple):
    """The largest absolute errors over all photos, and the lowest cosine similarity of a photo."""

    size: int
    output: str
    reference: str
    stock_error: float
    ours_error: float
    ours_cosine: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.ours_error <= self.limit  # false for NaN


def agreement(
    size: int, reference: str, references: list[Output], stock: list[Output], ours: list[Output]
) -> list[Agreement]:
    """One row for each output. Ours may be off by twice what stock is, plus ``FLOOR``."""

    def error(a: Tensor, b: Tensor) -> float:
        return (a.double() - b.double()).abs().max().item()

    def cosine(a: Tensor, b: Tensor) -> float:
        return torch.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()

    rows = []
    for output in Output._fields:
        r, s, o = ([getattr(one, output) for one in outputs] for outputs in (references, stock, ours))
        stock_error = max(map(error, s, r))
        limit = 2 * stock_error + FLOOR * max(one.abs().max().item() for one in r)
        worst = torch.tensor(list(map(error, o, r))).max().item()  # keeps a NaN, unlike max()
        rows.append(Agreement(size, output, reference, stock_error, worst, min(map(cosine, o, r)), limit))
    return rows
