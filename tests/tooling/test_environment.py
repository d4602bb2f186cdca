"""That nothing is skipped for want of what ``make test`` installs or builds."""

import importlib.util
import os
import shutil

import pytest
import torch
from support import emulation

#: Set by the Makefile: the packages that tests compare with.
PEERS = os.environ.get("VITKERNELS_TEST_PEERS", "").split()


@pytest.mark.skipif(not PEERS, reason="not run by make test")
def test_peers_are_installed():
    assert not [name for name in PEERS if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(not PEERS, reason="not run by make test")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_the_emulator_is_built():
    assert emulation.why_not() is None
