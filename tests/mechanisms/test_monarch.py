"""Monarch matrices: as the product of five matrices."""

import copy

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


def test_nearest_monarch_matrix():
    """Every slice of a dense matrix of m^2 rows, seen as m x m x m x m, by its best matrix of rank 1."""
    m = 4
    torch.manual_seed(0)
    linear = torch.nn.Linear(m * m, m * m, bias=False, dtype=torch.float64)
    slices = linear.weight.detach().view(m, m, m, m)  # [row of the block, turn, block, column of the block]
    nearest = torch.empty_like(slices)
    for turn in range(m):
        for block in range(m):
            u, sigma, vh = torch.linalg.svd(slices[:, turn, block])
            nearest[:, turn, block] = sigma[0] * torch.outer(u[:, 0], vh[0])
    ours = vk.nn.MonarchLinear.from_linear(linear, m)
    torch.testing.assert_close(ours.to_linear().weight, nearest.view(m * m, m * m), rtol=1e-12, atol=1e-14)

    def formula(x):
        return x @ nearest.view(m * m, m * m).t()

    agree(lambda x: copy.deepcopy(ours).to(x.dtype)(x), formula, torch.randn(5, m * m))
