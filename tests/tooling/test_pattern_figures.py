"""The pictures of docs/patterns.md: drawn from pattern.h as it is today, and true of the operator."""

import re

import pytest
import torch
import vitkernels as vk
from support import pattern

from tools.pattern_figures import PATTERNS, QUERIES, ROOT, SIDE, pictures, seen

pytestmark = pytest.mark.skipif(pattern.compiler() is None, reason="no C++ compiler was found")


def test_pictures_are_up_to_date():
    for name, content in pictures().items():
        path = ROOT / "docs" / "figures" / name
        assert path.read_text() == content, f"{path}: run python -m tools.pattern_figures"


def test_every_picture_is_shown():
    shown = re.findall(r"\(figures/(pattern-[\w-]+\.svg)\)", (ROOT / "docs" / "patterns.md").read_text())
    assert sorted(shown) == sorted(pictures())


@pytest.mark.parametrize("name", PATTERNS)
def test_pictures_show_what_the_operator_does(name):
    """With values that name their place, the output of a query is the average of the keys that it sees."""
    query = torch.zeros(1, SIDE, SIDE, 1, 4)
    places = torch.eye(SIDE**2).view(1, SIDE, SIDE, 1, SIDE**2)
    outs = [vk.spatial_attention(query, query, places, axes) for axes in PATTERNS[name]]
    for y, x in QUERIES:
        found = sum(out[0, y, x, 0] for out in outs).view(SIDE, SIDE).nonzero().tolist()
        assert {(i, j) for i, j in found} == seen(PATTERNS[name], y, x)
