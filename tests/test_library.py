"""Finding and loading the library, and what it says about itself."""

import os
import subprocess
import sys

import pytest
import torch
import vitkernels as vk
from vitkernels import _library


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
    assert "CUDA" in _library.backends()["cuda"]


def test_info_command():
    ran = subprocess.run([sys.executable, "-m", "vitkernels", "info"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for wanted in (vk.__version__, torch.__version__, str(_library.cpu_library_path()), _library.isa()):
        assert wanted in ran.stdout


def test_every_public_name_exists():
    assert all(hasattr(vk, name) for name in vk.__all__)
    assert set(vk.reference.__all__) <= set(vk.__all__), "a reference without a function"
