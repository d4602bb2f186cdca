"""That the check of the arrows (tools/check_rooms.py, part of make lint) sees an arrow that points up."""

import pytest
from support.paths import ROOT

from tools.check_rooms import violations


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def house(tmp_path):
    """A tree with one file in each room, whose arrows point down."""
    engine, package = "csrc/attention", "python/vitkernels"
    write(tmp_path, "csrc/common/range.h", "#include <cstdint>\n")
    write(tmp_path, "csrc/common/stable.h", "#include <torch/csrc/stable/tensor.h>\n")
    write(tmp_path, "csrc/cpu/simd.h", '#include "common/range.h"\n')
    write(tmp_path, "csrc/cuda/copy.h", '#include "common/range.h"\n')
    write(tmp_path, f"{engine}/dense.h", '#include "common/range.h"\n')
    write(tmp_path, f"{engine}/cpu/forward.cpp", '#include "attention/dense.h"\n#include "cpu/simd.h"\n')
    write(tmp_path, f"{engine}/cuda/forward.cu", '#include "attention/dense.h"\n#include "cuda/copy.h"\n')
    write(tmp_path, f"{engine}/op/dense.h", '#include "common/stable.h"\n')
    write(tmp_path, "csrc/tokens/merge.h", '#include "common/range.h"\n')
    for name in ("ops", "functional", "nn", "integrations"):
        write(tmp_path, f"{package}/{name}/__init__.py", "")
    write(tmp_path, f"{package}/axes.py", "import torch\n")
    write(tmp_path, f"{package}/nn/window.py", "from vitkernels import axes\nfrom vitkernels.functional import x\n")
    assert not violations(tmp_path)
    return tmp_path


UPWARDS = {
    "csrc/cpu/rows.h": '#include "attention/dense.h"\n',
    "csrc/cuda/rows.h": '#include "attention/dense.h"\n',
    "csrc/common/rows.h": '#include "cpu/simd.h"\n',
    "csrc/attention/rows.h": '#include "attention/cpu/forward.cpp"\n',
    "csrc/attention/cpu/rows.h": '#include "attention/op/dense.h"\n',
    "csrc/attention/cpu/tiles.h": '#include "attention/cuda/forward.cu"\n',
    "csrc/attention/cuda/rows.h": '#include "cpu/simd.h"\n',
    "csrc/attention/op/rows.h": '#include "tokens/merge.h"\n',
    "csrc/attention/cpu/torch.h": "#include <torch/csrc/stable/tensor.h>\n",
    "csrc/attention/cpu/indirect.h": '#include "common/stable.h"\n',
    "python/vitkernels/ops/attention.py": "from vitkernels.functional import attention\n",
    "python/vitkernels/functional/windows.py": "def f():\n    import vitkernels.nn\n",
    "python/vitkernels/nn/report.py": "from vitkernels import integrations\n",
    "python/vitkernels/axes_of.py": "from vitkernels import attention\n",
    "python/vitkernels/nn/relative.py": "from .window import Window\n",
}


@pytest.mark.parametrize("name", UPWARDS)
def test_arrow_that_points_up(house, name):
    write(house, name, UPWARDS[name])
    found = violations(house)
    assert found and all(name.removeprefix("python/") in line for line in found)


def test_this_tree():
    assert not violations(ROOT)
