"""Finding and loading the library, and what it says about itself."""

import inspect
import os
import re
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


def test_import_adds_little_to_torch():
    """Models take seconds to import, torch's compiler two seconds and 65 MB; neither is needed to call a function."""
    ran = python("""
import sys, torch
def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
modules, before = set(sys.modules), megabytes()
import vitkernels
print(sorted({name.partition(".")[0] for name in set(sys.modules) - modules} - {"torch", "vitkernels"}))
print([name for name in ("torch._dynamo", "torch._inductor", "timm", "transformers") if name in sys.modules])
print(megabytes() - before)
""")
    others, unwanted, grown = ran.stdout.splitlines()
    assert (others, unwanted) == ("[]", "[]")
    assert float(grown) < 10


def test_library_named_by_the_environment():
    path = str(_library.cpu_library_path().resolve())
    ran = python("from vitkernels import _library as l; print(l.cpu_library_path())", VITKERNELS_LIBRARY=path)
    assert ran.stdout.strip() == path
    relative = os.path.relpath(path)
    ran = python("from vitkernels import _library as l; print(l.cpu_library_path())", VITKERNELS_LIBRARY=relative)
    assert os.path.samefile(ran.stdout.strip(), path), ran.stderr


CPU, CUDA = "VITKERNELS_LIBRARY", "VITKERNELS_CUDA_LIBRARY"
FOREIGN = torch._C.__file__  # a shared library that loads, with nothing of ours in it


NONSENSE = [
    (CPU, "/nowhere/lib.so", "there is no such file"),
    (CPU, "libvitkernels_cpu.so", "there is no such file"),  # of this folder, not of the linker's
    (CPU, "/", "this is no file"),
    (CPU, __file__, "invalid ELF header"),
    (CPU, FOREIGN, "this one has no vitkernels_isa"),
    (CUDA, "/nowhere/libvitkernels_cuda13.so", "there is no such file"),
    (CUDA, "/", "this is no file"),
    (CUDA, FOREIGN, "this is named otherwise"),
    (CUDA, "empty/libvitkernels_cuda13.so", "this one names no GPU architectures"),
]


@pytest.mark.parametrize(("variable", "value", "why"), NONSENSE)
def test_nonsense_for_a_library_is_an_error(variable, value, why, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "libvitkernels_cuda13.so").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ImportError) as raised:
        {CPU: _library._load, CUDA: _library._load_cuda}[variable]()
    takes = {CPU: "libvitkernels_cpu.so", CUDA: "libvitkernels_cuda<major>.so"}[variable]
    assert str(raised.value).startswith(f"vitkernels: {variable} is {value!r}, takes the path of a {takes}: ")
    assert str(raised.value).endswith(why)


@pytest.mark.parametrize("variable", [CPU, CUDA])
def test_nonsense_for_a_library_is_an_error_of_info(variable):
    command = [sys.executable, "-m", "vitkernels", "info"]
    ran = subprocess.run(command, env={**os.environ, variable: "/"}, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith(f"ImportError: vitkernels: {variable} is '/', takes the path of a ")


def test_nonsense_for_an_instruction_set_is_an_error():
    """Operators say the same (``test_isa.py``)."""
    command = [sys.executable, "-m", "vitkernels", "info"]
    ran = subprocess.run(command, env={**os.environ, "VITKERNELS_ISA": "sse9"}, capture_output=True, text=True)
    assert ran.returncode == 1
    takes = " ".join(_library.isas_supported())
    assert ran.stderr == f"vitkernels: VITKERNELS_ISA is 'sse9', this CPU takes {takes}\n"


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
    elsewhere = tmp_path / "elsewhere" / "libvitkernels_cuda13.so"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(b"vitkernels_cuda_architectures=80-virtual;")
    monkeypatch.setenv(CUDA, str(elsewhere))
    with pytest.raises(ImportError, match=rf"{CUDA} is '{elsewhere}', takes the path of a .*: .*file too short"):
        _library._load_cuda()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _library._load_cuda() == f"torch {torch.__version__} has no CUDA"


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


@pytest.mark.parametrize("command", [[], ["info"]], ids=["none", "info"])
def test_info_command(command):
    ran = subprocess.run([sys.executable, "-m", "vitkernels", *command], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for wanted in (vk.__version__, torch.__version__, str(_library.cpu_library_path()), _library.isa()):
        assert wanted in ran.stdout


def test_version_option():
    ran = subprocess.run([sys.executable, "-m", "vitkernels", "--version"], capture_output=True, text=True)
    assert ran.stdout == f"vitkernels {vk.__version__}\n", ran.stderr


def test_every_public_name_exists():
    assert all(hasattr(vk, name) for name in vk.__all__)
    assert set(vk.reference.__all__) <= set(vk.__all__), "a reference without a function"


def test_every_attention_says_how_far_a_nan_may_reach():
    named = [getattr(of, name) for of in (vk, vk.compat) for name in of.__all__]
    functions = [f for f in named if inspect.isfunction(f) and {"key", "k"} & inspect.signature(f).parameters.keys()]
    assert len(functions) > 12
    for function in functions:
        assert re.search("they share a tile|reaches all|^As :func:`vitkernels.na2d`", function.__doc__), function
