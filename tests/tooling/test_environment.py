"""That nothing is skipped for want of what ``make test`` installs or builds."""

import importlib.util
import os

import pytest
import torch
from support import emulation

#: Set by the Makefile: the packages that tests compare with, and the path of nvcc where the emulator is built.
PEERS = os.environ.get("VITKERNELS_TEST_PEERS", "").split()
NVCC = os.environ.get("VITKERNELS_TEST_NVCC")


@pytest.mark.skipif(not PEERS, reason="not run by make test")
def test_peers_are_installed():
    assert not [name for name in PEERS if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(not NVCC, reason="not run by make test, or without nvcc")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_the_emulator_is_built():
    assert emulation.why_not() is None
