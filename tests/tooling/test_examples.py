"""Examples whose models need no files run, at a small size."""

import re

import pytest
from support import model_zoo  # noqa: F401  torchvision's wheel may be built for another torch


def test_monarch_vit(capsys):
    pytest.importorskip("timm")
    from examples import monarch_vit

    monarch_vit.main(["--model", "vit_tiny_patch16_224", "--batch", "1", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.strip().split("  ")[0]: line for line in lines[-3:]}
    assert rows.keys() == {"dense", "Monarch", "Monarch, accelerated"}
    parameters = {name: int(re.search(r"\d[\d,]+", row)[0].replace(",", "")) for name, row in rows.items()}
    before, now = (int(n.replace(",", "")) for n in re.findall(r"total of 24 +(\S+) +(\S+)", "\n".join(lines))[0])
    assert parameters["dense"] - before == parameters["Monarch"] - now == parameters["Monarch, accelerated"] - now
    with pytest.raises(SystemExit):
        monarch_vit.main(["--rounds", "0"])
    assert "--rounds 0: takes 1 or more" in capsys.readouterr().err
