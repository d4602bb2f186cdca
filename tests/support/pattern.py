"""csrc/attention/pattern.h itself, called from Python: compiled on demand, without torch."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from support.paths import ROOT
from torch import Tensor
from vitkernels.axes import Axis


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pattern.so"
        command = [compiler() or "g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, str(Path(__file__).with_name("pattern_library.cpp")), "-o", str(path)], check=True)
        return ctypes.CDLL(str(path))


def _ask(name: str, axis: Axis, num_queries: int, num_keys: int, has_outside: bool, rows: int, columns: int) -> Tensor:
    integers = torch.tensor(axis.encoded(), dtype=torch.int64)
    out = torch.empty(rows, columns, dtype=torch.int64)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (integers, out)]
    counts = ctypes.c_int64(num_queries), ctypes.c_int64(num_keys), ctypes.c_int(has_outside)
    getattr(_library(), name)(pointers[0], *counts, pointers[1])
    return out


def keys_of_queries(axis: Axis, num_queries: int, num_keys: int, has_outside: bool = False) -> Tensor:
    """``(num_queries, 3)``: first key, end of the keys, coordinate, each in tokens of the query's residue class."""
    return _ask("keys_of_queries", axis, num_queries, num_keys, has_outside, num_queries, 3)


def queries_of_keys(axis: Axis, num_queries: int, num_keys: int, has_outside: bool = False) -> Tensor:
    """``(num_keys, 2)``: first query, end of the queries that see a key, in tokens of the key's residue class."""
    return _ask("queries_of_keys", axis, num_queries, num_keys, has_outside, num_keys, 2)


def visible(axis: Axis, num_queries: int, num_keys: int, has_outside: bool = False) -> list[range]:
    """The keys of each query, in tokens of the map; negative ones and those from ``num_keys`` on lie outside it."""
    step = axis.encoded()[1]
    rows = keys_of_queries(axis, num_queries, num_keys, has_outside).tolist()
    return [range(a * step + u % step, b * step + u % step, step) for u, (a, b, _) in enumerate(rows)]
