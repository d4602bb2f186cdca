"""Tile registers (AMX) on CPUs without them: the library's machine code runs, its tile instructions emulated."""

import os
import shutil
import subprocess
import sys

import pytest
from support.paths import SUPPORT, TESTS
from support.samples import SAMPLES
from vitkernels import _library

NAME = "amx_bf16"
RUN_GATE = """
import ctypes, os, sys, pytest
from vitkernels import _library
assert _library.isa() == "amx_bf16", _library.isa()
emulator = ctypes.CDLL(os.environ["LD_PRELOAD"])
# pytest would take the signal that the emulator lives on.
failed = pytest.main(["-p", "no:faulthandler", "-p", "no:cacheprovider", "-x", *sys.argv[1:]])
emulator.amx_products.restype = emulator.amx_open_configurations.restype = ctypes.c_int64
print(emulator.amx_products(), "tile products,", emulator.amx_open_configurations(), "open configurations")
sys.exit(failed)
"""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    if NAME not in _library.isas_built():
        pytest.skip(f"the library has no kernels for {NAME}")
    if NAME in _library.isas_supported():
        pytest.skip(f"this CPU has {NAME}: test_isa.py runs it")
    if "avx512_bf16" not in _library.isas_supported():
        pytest.skip("the emulator does tile instructions alone, and this CPU lacks avx512_bf16")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    library = tmp_path_factory.mktemp("amx") / "libamx_emulator.so"
    subprocess.run(
        [
            compiler,
            "-std=c++20",
            "-O3",
            "-march=native",
            "-shared",
            "-fPIC",
            str(SUPPORT / "amx_emulator.cpp"),
            "-o",
            str(library),
        ],
        check=True,
    )
    return library


@pytest.mark.parametrize(
    ("selection", "count"),
    [
        (["gates/test_reference.py", "-k", "bfloat16 and (tokens or dims or all-terms) and not 801"], None),
        (["gates/test_determinism.py", "-k", "bfloat16 and (all-terms or bias-grouped-long)"], None),
        pytest.param(["gates/test_reference.py", "-k", "bfloat16"], len(SAMPLES), marks=pytest.mark.full),
        pytest.param(
            ["gates/test_layout.py", "-k", "uninitialised and bfloat16"], len(SAMPLES), marks=pytest.mark.full
        ),
    ],
    ids=["reference", "determinism", "reference-all", "poison"],
)
def test_gate(emulator, selection, count):
    ran = subprocess.run(
        [sys.executable, "-c", RUN_GATE, *selection], cwd=TESTS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "LD_PRELOAD": str(emulator), "VITKERNELS_ISA": NAME, "OMP_NUM_THREADS": "1"}, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    assert count is None or f"{count} passed" in ran.stdout, ran.stdout
    products, *_, open_configurations = ran.stdout.splitlines()[-1].split()[:4]
    assert int(products) > 0 and open_configurations == "0", ran.stdout
