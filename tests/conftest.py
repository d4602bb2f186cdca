"""What every test starts from and must leave behind."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator

import pytest
import torch
from support import emulation
from support.costs import pytest_runtest_makereport, pytest_runtest_protocol, pytest_terminal_summary  # noqa: F401  hooks
from support.devices import DEVICE, ON_CPU, why_not
from support.emulation import cuda_kernels, emulator  # noqa: F401  fixtures
from support.error_policy import STORE
from vitkernels import _library

# What cuBLAS asks for where PyTorch is to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_configure(config: pytest.Config) -> None:
    """A folder that the processes of this run share, for what one of them computes for all."""
    if STORE not in os.environ:
        os.environ[STORE] = folder = tempfile.mkdtemp(prefix="vitkernels-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_report_header() -> list[str]:
    return [
        f"vitkernels: {_library.isa()}, {torch.get_num_threads()} threads, {_library.cpu_library_path()}",
        f"CUDA kernels: {emulation.why_not() or f'emulated, {emulation.DIRECTORY}'}",
        *([] if ON_CPU else [f"device: {torch.cuda.get_device_name(DEVICE)}, {_library.backends()['cuda']}"]),
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what has no kernels on the device."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "sample" in parameters and (reason := why_not(parameters["sample"], parameters.get("dtype"))):
            item.add_marker(pytest.mark.skip(reason=reason))


def _state() -> tuple[object, ...]:
    return (
        torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def unchanged_settings() -> Iterator[None]:
    """A setting of the process that one test leaves behind would decide what the next one tests."""
    torch.manual_seed(0)
    before = _state()
    yield
    assert _state() == before


@pytest.fixture(autouse=not ON_CPU)
def usable_device() -> Iterator[None]:
    """End the process whose device a kernel has made useless: every later test would fail for that alone."""
    yield
    try:
        torch.cuda.synchronize(DEVICE)
    except RuntimeError as error:
        print(f"the device is lost: {error}", file=sys.__stderr__, flush=True)
        os._exit(70)  # pytest-xdist names the test, and starts another worker


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    """Sets the precision of float32 matrix products; what was set before comes back."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)
