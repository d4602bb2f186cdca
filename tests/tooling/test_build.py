"""What a build says of a machine before it downloads or compiles anything."""

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from support.paths import ROOT

PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
CMAKE = shutil.which("cmake", path=PATH)
CUDA_13 = "cuda: Optional[str] = '13.0'"

needs_cmake = pytest.mark.skipif(CMAKE is None or shutil.which("g++") is None, reason="no cmake, or no g++")


def configure(folder, torch=None, cuda="cuda: Optional[str] = None", options=(), **environment):
    """CMake's exit status and words, for an interpreter that has only ``torch``: a version, or none."""
    venv.create(folder / "env", with_pip=False)
    (site,) = folder.glob("env/lib/python*/site-packages")
    if torch is not None:
        (site / "torch").mkdir()
        (site / "torch" / "__init__.py").touch()
        (site / "torch" / "version.py").write_text(f"__version__ = '{torch}'\n{cuda}\n")
    python = f"-DPython_EXECUTABLE={folder / 'env' / 'bin' / 'python'}"
    ran = subprocess.run(
        [CMAKE, "-S", ROOT, "-B", folder / "build", python, *options],
        env={**os.environ, "PATH": PATH, "CXX": "g++", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return ran.returncode, " ".join(ran.stdout.split())


@needs_cmake
@pytest.mark.parametrize(
    ("torch", "cuda", "options", "environment", "message"),
    [
        (None, "", [], {}, "pip install --no-build-isolation ."),
        ("2.9.1+cpu", "", [], {}, "vitkernels needs torch >= 2.10 to build, found 2.9 in "),
        ("2.13.0", "", [], {"CXXFLAGS": "-U__GNUC__ -D__GNUC__=11"}, "vitkernels needs g++ 12 or newer, found 11."),
        (
            "2.13.0", CUDA_13, ["-DVITKERNELS_CUDA=ON"], {"CUDACXX": "/nowhere/nvcc"},
            "the CUDA sources cannot be compiled: no nvcc was found; set CUDACXX to its path (VITKERNELS_CUDA=OFF",
        ),
    ],
    ids=["no-torch", "old-torch", "old-compiler", "no-nvcc"],
)  # fmt: skip
def test_what_is_missing_is_named(torch, cuda, options, environment, message, tmp_path):
    status, said = configure(tmp_path, torch, cuda, options, **environment)
    assert status == 1
    assert message in said


@needs_cmake
@pytest.mark.parametrize(
    ("cuda", "options", "reason"),
    [
        ("cuda: Optional[str] = None", [], "this torch has no CUDA (VITKERNELS_CUDA=ON builds it all the same)"),
        (CUDA_13, [], "no nvcc was found; set CUDACXX to its path"),
        (CUDA_13, ["-DVITKERNELS_CUDA=OFF"], "VITKERNELS_CUDA=OFF"),
    ],
    ids=["no-cuda", "no-nvcc", "off"],
)
def test_why_there_is_no_cuda_library(cuda, options, reason, tmp_path):
    status, said = configure(tmp_path, "2.13.0", cuda, options, CUDACXX="/nowhere/nvcc")
    assert status == 0, said
    assert f"-- vitkernels: no CUDA library: {reason} --" in said


@pytest.mark.parametrize("hook", ["prepare_metadata_for_build_wheel", "prepare_metadata_for_build_editable"])
def test_no_torch_stops_pip_before_it_downloads_one(hook, monkeypatch, tmp_path):
    """pip resolves what the package requires at run time from the metadata, before it builds."""
    pytest.importorskip("scikit_build_core")
    from tools import build_backend

    monkeypatch.chdir(ROOT)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    with pytest.raises(SystemExit, match=r"needs torch >= 2\.10 to build.*\n.*\n +pip install --no-build-isolation \."):
        getattr(build_backend, hook)(str(tmp_path))
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    assert getattr(build_backend, hook)(str(tmp_path)).startswith("vitkernels-")
