"""Modules that route, beyond their formulas: any map in one exported program, options and errors."""

import pytest
import torch
import vitkernels as vk
from torch.export import Dim, export

BiLevel = vk.nn.BiLevelRoutingAttention


@pytest.mark.parametrize("size", [(7, 9), (6, 8)])
def test_one_program_takes_any_map(size):
    """Whether the regions divide the map that is exported or not."""
    module = BiLevel(16, 2, n_win=2, topk=2).eval()
    sizes = {1: Dim("height", min=3, max=100), 2: Dim("width", min=3, max=100)}
    program = export(module, (torch.randn(2, *size, 16),), dynamic_shapes={"x": sizes}).module()
    for height, width in ((8, 10), (6, 9), (7, 7), (3, 30)):
        x = torch.randn(2, height, width, 16)
        assert torch.equal(program(x), module(x))


def test_a_scale_of_zero_is_no_default():
    """Every key of the chosen regions counts alike."""
    module = BiLevel(8, 2, n_win=1, topk=1, qk_scale=0.0, side_dwconv=0, param_attention="qkv")
    x = torch.randn(2, 3, 4, 8)
    values = module.qkv.qkv(x)[..., 16:]
    torch.testing.assert_close(module(x), values.mean((1, 2), keepdim=True).expand_as(x))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"side_dwconv": 4}, "side_dwconv is 4, takes an odd number"),
        ({"side_dwconv": -1}, "side_dwconv is -1, takes an integer from 0 on"),
        ({"n_win": 0}, "n_win is 0, takes an integer from 1 on"),
        ({"topk": 1.5}, "topk is 1.5, takes an integer from 1 on"),
        ({"qk_dim": 0}, "qk_dim is 0, takes an integer from 1 on"),
        ({"qk_dim": 9}, "qk_dim is 9, takes a multiple of num_heads (2)"),
        ({"param_attention": "none"}, "param_attention is 'none', takes 'qkvo' or 'qkv'"),
    ],
)
def test_options(options, text):
    with pytest.raises(RuntimeError) as raised:
        BiLevel(16, 2, **options)
    assert str(raised.value) == f"vitkernels.nn.BiLevelRoutingAttention: {text}"
