"""Monarch matrices: as the product of five matrices."""

import torch
import vitkernels as vk
from support.mechanisms import agree


def test_permuted_blocks():
    """y = P L P^T R x with block-diagonal L and R; P reads the columns of a matrix row by row."""
    blocks, outputs, inputs, inner = 4, 9, 5, 8

    def permutation(rows, columns, like):
        index = torch.arange(rows * columns).view(rows, columns).t().flatten()
        return torch.eye(rows * columns).to(like)[index]

    def formula(x, w1, w2):
        first, second = (torch.block_diag(*w) for w in (w1, w2))
        into_turns = permutation(inner, blocks, x)
        out_of_turns = permutation(blocks, outputs, x)
        return x @ (out_of_turns @ second @ into_turns @ first).t()

    shapes = (3, 7, blocks * inputs), (blocks, inner, inputs), (blocks, outputs, inner)
    agree(vk.blockdiag_butterfly_multiply, formula, *[torch.randn(s, dtype=torch.float64) for s in shapes])
