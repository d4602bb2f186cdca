"""Every block of Python in the documentation runs, those of one page one after another. (README: test_readme.py.)"""

import os
import re
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
