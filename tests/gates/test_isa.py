"""Every instruction set that this CPU has, each in a process of its own."""

import os
import subprocess
import sys

import pytest
from support.paths import TESTS
from support.reference_worker import calls
from vitkernels import _library


def python(*args, isa):
    # One thread: results do not depend on their number, and two processes' threads would wait for each other.
    return subprocess.run(
        [sys.executable, *args], cwd=TESTS, env={**os.environ, "VITKERNELS_ISA": isa, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_best_is_used_unless_named():
    wanted = os.environ.get("VITKERNELS_ISA") or _library.isas_supported()[-1]
    assert _library.isa() == wanted
    assert set(_library.isas_supported()) <= set(_library.isas_built())


# The one in use has gone through the gate in this process.
@pytest.mark.parametrize("rows", ["short", pytest.param("all", marks=pytest.mark.full)])
@pytest.mark.parametrize("isa", [i for i in _library.isas_supported() if i != _library.isa()])
def test_reference_gate(isa, rows):
    ran = python("-m", "support.reference_worker", isa, rows, isa=isa)
    assert ran.returncode == 0, ran.stdout
    assert int(ran.stdout.splitlines()[-1]) == len(list(calls(rows == "short")))


USE_EACH_SAMPLE = """
import torch
from support.samples import SAMPLES
for sample in SAMPLES:
    if all(sample.sizes.values()):
        try:
            sample.function(**sample.call(torch.float32))
            print(sample, "ran")
        except RuntimeError as error:
            print(error)
"""


def test_unknown_name_is_an_error():
    ran = python("-c", USE_EACH_SAMPLE, isa="sse9")
    expected = f"vitkernels: VITKERNELS_ISA is 'sse9', this CPU takes {' '.join(_library.isas_supported())}"
    assert ran.returncode == 0, ran.stdout
    assert set(ran.stdout.splitlines()) == {expected}
