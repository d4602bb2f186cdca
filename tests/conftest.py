"""What every test starts from and must leave behind."""

from __future__ import annotations

from collections.abc import Iterator

import emulation
import pytest
import torch
from emulation import cuda_kernels, emulator  # noqa: F401  fixtures
from vitkernels import _library


def pytest_report_header() -> list[str]:
    return [
        f"vitkernels: {_library.isa()}, {torch.get_num_threads()} threads, {_library.cpu_library_path()}",
        f"CUDA kernels: {emulation.why_not() or f'emulated, {emulation.DIRECTORY}'}",
    ]


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
