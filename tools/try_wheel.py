"""Install a wheel into an environment of its own, beside this interpreter's torch, and use it there.

python tools/try_wheel.py dist/vitkernels-*.whl
python tools/try_wheel.py    # use what is installed in this environment
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
from importlib import metadata
from pathlib import Path


def install(wheel: str, folder: Path) -> str:
    """Make an environment with the wheel and, without a download, torch; returns its interpreter."""
    venv.create(folder, with_pip=False)
    python = str(folder / "bin" / "python")
    options = ["--disable-pip-version-check", "--quiet", "--python", python]
    subprocess.run([sys.executable, "-m", "pip", *options, "install", "--no-index", "--no-deps", wheel], check=True)
    # Later in the path than the wheel; the *.pth files in there, as of an editable install, do not count.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n" + sysconfig.get_path("platlib") + "\n")
    return python


def use() -> None:
    """Compare results and gradients with PyTorch's, and what the package says about itself with its metadata."""
    import torch
    import vitkernels as vk

    folders = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    assert any(Path(vk.__file__).is_relative_to(folder) for folder in folders), f"{vk.__file__} is not installed"
    assert metadata.version("vitkernels") == vk.__version__
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 50, 3, 32, requires_grad=True) for _ in range(3))
    ours = vk.attention(query, key, value)
    heads_second = [t.transpose(1, 2) for t in (query, key, value)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*heads_second).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(out.square().sum(), [query, key, value]) for out in (ours, theirs)]
    torch.testing.assert_close(*grads)
    subprocess.run([sys.executable, "-I", "-m", "vitkernels", "info"], check=True)


def main() -> None:
    if len(sys.argv) < 2:
        return use()
    (wheel,) = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        # Isolated: neither this folder nor PYTHONPATH, where the sources may lie.
        subprocess.run([install(wheel, Path(folder)), "-I", __file__], check=True)


if __name__ == "__main__":
    main()
