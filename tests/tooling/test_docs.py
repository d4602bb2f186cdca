"""Every block of Python in the documentation runs, those of one page one after another. (README: test_readme.py.)

What pages show needs no network.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from support import model_zoo  # noqa: F401  torchvision's wheel may be built for another torch

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    return BLOCK.findall((ROOT / page).read_text())


PAGES = [str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_python_blocks(page, tmp_path):
    pytest.importorskip("timm")
    code = "\n".join(blocks(page))
    # What a page says of `model`, `query` and the like before any of its blocks.
    given = (
        "import support.model_zoo, torch, timm\nimport vitkernels as vk\n"
        "model = timm.create_model('vit_tiny_patch16_224', depth=1).eval()\n"
        "query, key, value = torch.randn(3, 1, 5, 3, 16).unbind(0)\nbias = torch.zeros(3, 5, 5)\n"
        "num_heads, importance = 3, torch.rand(3)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}  # for the zoo
    ran = subprocess.run(
        [sys.executable, "-c", given + code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope="module")
def configuration():
    for package in ("sphinx", "latex2mathml"):
        pytest.importorskip(package)
    return runpy.run_path(str(ROOT / "docs/conf.py"))


def test_formulas_become_mathml(configuration):
    formula = r"o_i = \sum_j \operatorname{softmax}_j(\ell_{ij}) \, v'_j, \quad dV \mathrel{+}= P^\top dO"
    assert configuration["mathml"](formula, "block").startswith("<math ")
    with pytest.raises(Exception, match="unknowncommand"):
        configuration["mathml"](r"\unknowncommand{x}", "inline")


@pytest.mark.parametrize(
    ("element", "found"),
    [
        ('<script defer="defer" src="https://cdn.example/mathjax.js"></script>', True),
        ("<link rel='stylesheet' href='//cdn.example/style.css'>", True),
        ('<img alt="" src="http://cdn.example/picture.png">', True),
        ('<script src="_static/doctools.js?v=1"></script><link rel="stylesheet" href="_static/furo.css">', False),
        ('<a href="https://example.org/">a link</a>', False),
    ],
)
def test_what_a_page_loads(configuration, element, found):
    assert bool(configuration["loaded_from_elsewhere"](element)) == found
