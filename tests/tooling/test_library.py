"""Finding and loading the library, and what it says about itself."""

import os
import subprocess
import sys

import pytest
import torch
import vitkernels as vk
from vitkernels import _library
from vitkernels.info import describe


def python(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_import_does_not_import_models():
    """``import vitkernels`` needs torch alone; timm and transformers take seconds."""
    ran = python("import sys, vitkernels; print([m for m in ('timm', 'transformers') if m in sys.modules])")
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr


def test_library_named_by_the_environment():
    ran = python("import vitkernels", VITKERNELS_LIBRARY="/nowhere/lib.so")
    assert ran.returncode != 0
    assert "ImportError: vitkernels: the CPU library is not at /nowhere/lib.so" in ran.stderr
    path = str(_library.cpu_library_path().resolve())
    ran = python("from vitkernels import _library as l; print(l.cpu_library_path())", VITKERNELS_LIBRARY=path)
    assert ran.stdout.strip() == path


def test_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ImportError, match=r"vitkernels needs torch >= 2\.10, found 2\.9\.1\+cpu"):
        _library._check_torch()
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    _library._check_torch()
    monkeypatch.setattr(torch, "__version__", "3.0.0a0+git123")
    _library._check_torch()


def test_backends():
    assert _library.backends()["cpu"] == "loaded"
    assert _library.backends()["cuda"] == "loaded" or "CUDA" in _library.backends()["cuda"]
    assert _library.why_no_kernel("attention", "cpu") is None
    assert _library.why_no_kernel("attention", "mps") == "no kernels for it"


CUDA_LIBRARIES = _library.cuda_library_paths()
needs_cuda_library = pytest.mark.skipif(not CUDA_LIBRARIES, reason="built without CUDA")


@needs_cuda_library
def test_info_names_the_cuda_library():
    for path in CUDA_LIBRARIES:
        assert f"{path} ({_library.cuda_architectures(path)})" in describe()
        assert "compute_80 (PTX)" in _library.cuda_architectures(path)


def test_why_cuda_is_not_loaded(monkeypatch, tmp_path):
    """The reasons, in the order in which they are looked for."""
    monkeypatch.setattr(_library, "cpu_library_path", lambda: tmp_path / "libvitkernels_cpu.so")
    assert _library._load_cuda() == "this build has no CUDA library"
    (tmp_path / "libvitkernels_cuda13.so").write_bytes(b"")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _library._load_cuda() == f"torch {torch.__version__} has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert _library._load_cuda() == "torch has CUDA 12.8, this build has libvitkernels_cuda13.so"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "libvitkernels_cuda13.so: file too short" in _library._load_cuda()
    monkeypatch.setenv("VITKERNELS_CUDA_LIBRARY", str(tmp_path / "elsewhere" / "libvitkernels_cuda13.so"))
    assert "elsewhere/libvitkernels_cuda13.so: cannot open shared object file" in _library._load_cuda()


@pytest.mark.skipif(_library.backends()["cuda"] == "loaded", reason="the kernels are there")
def test_operators_without_kernels_say_why():
    """CUDA tensors cannot be made without CUDA; the dispatcher takes any where it is told the key."""
    ran = python("""
import torch, vitkernels
from vitkernels.ops.registration import refusals
cuda, x = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), torch.ones(1, 1, 1, 1)
values = {"Tensor": x, "List[Tensor]": [x], "float": 1.0, "int": 0, "bool": False, "List[int]": []}
for op in ("attention", "merge_attentions"):
    overload = getattr(torch.ops.vitkernels, op).default
    assert op in refusals
    try:
        overload.redispatch(cuda, *(values.get(str(a.type)) for a in overload._schema.arguments))
    except RuntimeError as error:
        print(error)
""")
    reason = _library.backends()["cuda"]
    assert ran.stdout.splitlines() == [
        f"vitkernels::{op}: got CUDA tensors, takes tensors on the CPU: {reason}"
        for op in ("attention", "merge_attentions")
    ], ran.stderr


def test_info_command():
    ran = subprocess.run([sys.executable, "-m", "vitkernels", "info"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for wanted in (vk.__version__, torch.__version__, str(_library.cpu_library_path()), _library.isa()):
        assert wanted in ran.stdout


def test_every_public_name_exists():
    assert all(hasattr(vk, name) for name in vk.__all__)
    assert set(vk.reference.__all__) <= set(vk.__all__), "a reference without a function"
