"""Running the CUDA library's kernels on CPU tensors, without a GPU (docs/how_it_works.md, "CUDA without a GPU")."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.calls import NAMESPACE, defined_operators
from support.paths import ROOT, TESTS
from torch import Tensor
from vitkernels.ops.registration import refusals

#: What ``make emulator`` builds.
DIRECTORY = Path(os.environ.get("VITKERNELS_EMULATOR", ROOT / "build" / "Release" / "tests" / "emulator"))

KERNELS = TESTS / "emulator" / "kernels"
LANES = range(32)
# The function has its module's name.
LINEAR_ATTENTION = importlib.import_module("vitkernels.functional.linear_attention")


def why_not() -> str | None:
    """The reason why there is no emulator, or ``None``."""
    if torch.version.cuda is not None:
        return f"torch {torch.__version__} has CUDA itself, whose runtime the emulator stands in for"
    if not (DIRECTORY / "libvitkernels_cuda_emulated.so").exists():
        return f"no CUDA emulator in {DIRECTORY}: make emulator, which needs nvcc"
    return None


needs_emulator = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


class Emulator:
    """The emulator's CUDA runtime in this process, and the test kernels that are linked against it."""

    def __init__(self) -> None:
        path = next(DIRECTORY.glob("_emulator*.so"))
        spec = importlib.util.spec_from_file_location("_emulator", path)
        assert spec is not None and spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.kernels = ctypes.CDLL(str(DIRECTORY / "libemulator_kernels.so"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def run(self, name: str, *args: Any, **options: Any) -> int:
        """Call a test kernel's host function; a tensor is passed as its address. Returns the CUDA error."""
        self.reset()
        self.configure(**options)
        passed = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in args]
        error: int = getattr(self.kernels, name)(*passed)
        return error

    def compute(self, name: str, *args: Any, **options: Any) -> None:
        """:meth:`run`, which must succeed."""
        assert self.run(name, *args, **options) == 0, self.errors()
        assert self.errors() == []

    @contextmanager
    def on_cpu_tensors(self) -> Iterator[None]:
        """Operators that have CUDA kernels run them on CPU tensors, in all gates of a sample."""
        library = torch.library.Library(NAMESPACE, "IMPL")
        for op in self.operators:
            library.impl(op, _redispatch(op), "CPU")
        try:
            # A form that is chosen for CPU tensors has no CUDA kernels.
            with self.fresh_allocations(), mock.patch.object(LINEAR_ATTENTION, "_is_quadratic", lambda *_: False):
                yield
        finally:
            library._destroy()

    @cached_property
    def operators(self) -> list[str]:
        """Those with CUDA kernels, which this loads."""
        for refusal in refusals.values():
            refusal._destroy()
        torch.ops.load_library(str(DIRECTORY / "libvitkernels_cuda_emulated.so"))
        names = [schema.name for schema in defined_operators()]
        return [n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA")]


def _redispatch(op: str) -> Callable[..., Any]:
    overload = getattr(torch.ops.vitkernels, op.removeprefix(f"{NAMESPACE}::")).default
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return lambda *args: overload.redispatch(cuda, *args)


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def conflicts(counters: Any) -> dict[str, int]:
    """By line, the wavefronts beyond what the width of each access needs."""
    found = {f"{Path(c.file).name}:{c.line} {c.instruction}": c.conflicts for c in counters.conflicts.values()}
    assert found
    return {site: count for site, count in found.items() if count}


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    return Emulator()


@pytest.fixture
def cuda_kernels(emulator: Emulator) -> Iterator[Emulator]:
    """Operators run their CUDA kernels; an error in one fails the test, whatever the results."""
    emulator.reset()
    with emulator.on_cpu_tensors():
        yield emulator
    assert emulator.errors() == []
