"""That README's first page works as it stands, with the versions that the Makefile pins."""

import re

import pytest
from support import model_zoo  # noqa: F401  torchvision's wheel may be built for another torch
from support.paths import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```\n", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def test_python_runs_as_printed(capsys):
    pytest.importorskip("timm")
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert capsys.readouterr().out.splitlines()[0] == blocks("")[0].splitlines()[0]
    assert names["out"].shape == (8, 197, 6, 64) and names["bias"].grad.shape == names["bias"].shape


def test_install_names_the_pins():
    """The pair of torch and torchvision that the tests run with."""
    makefile = (ROOT / "Makefile").read_text()
    pins = dict(re.findall(r"\b(torch|torchvision)==([\d.]+)$", makefile, re.MULTILINE))
    (install,) = blocks("sh")
    assert f"pip install torch=={pins['torch']} timm " in install
    assert f"torch {pins['torch']} with torchvision {pins['torchvision']}" in " ".join(README.split())
