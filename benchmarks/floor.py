"""The time that nobody can beat: operations over the machine's matmul rate, bytes over its copy rate."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import Effort, batch, matmul_precision
from benchmarks.registry import torch_dtype

__all__ = ["COPY", "MATMUL", "calls", "matmul_rates", "seconds"]

MATMUL, COPY = "floor: matmul", "floor: copy"

_TRIAL_SIZE = {"cpu": 512, "cuda": 4096}


def _is_taken_by_onednn(dtype: str) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == "float32" or (dtype == "bfloat16" and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _candidates(dtype: str, device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Ways to multiply two matrices; the second may be taken as transposed."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    # Some CPUs have no arithmetic in a 16-bit type and are faster after a conversion to float32.
    for name in dict.fromkeys(("float32", dtype)) if device.type == "cpu" else (dtype,):
        found[f"torch.mm {name}"] = lambda a, b: a @ b
        # What torch.mm calls may not use all of a CPU; PyTorch holds a second library that may.
        if device.type == "cpu" and _is_taken_by_onednn(name):
            linear = torch.ops.mkldnn._linear_pointwise
            found[f"oneDNN {name}"] = lambda a, b, linear=linear: linear(a, b, None, "none", [], "")
    return found


def _operands(name: str, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    dtype = torch_dtype(name.split()[-1])
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return a, b


@functools.cache
def matmul_rates(dtype: str, device: torch.device) -> dict[str, float]:
    """GFLOP/s of every way to multiply matrices, the best of a few trials."""
    rates, size = {}, _TRIAL_SIZE[device.type]
    with matmul_precision(dtype):
        for name, multiply in _candidates(dtype, device).items():
            a, b = _operands(name, size, device)
            best = min(batch(lambda m=multiply, a=a, b=b: m(a, b), 1, device) for _ in range(5))
            rates[name] = 2.0 * size**3 / best / 1e9
    return rates


def calls(dtype: str, effort: Effort, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """The fastest matmul for values of ``dtype`` and a copy beyond the caches, timed beside the peers."""
    rates = matmul_rates(dtype, device)
    name = max(rates, key=rates.__getitem__)
    multiply = _candidates(dtype, device)[name]
    a, b = _operands(name, effort.matmul_size, device)
    source = torch.zeros(effort.copy_bytes // 4, device=device)
    target = torch.zeros_like(source)
    return {MATMUL: lambda: multiply(a, b), COPY: lambda: target.copy_(source)}


def seconds(times: dict[str, list[float]], effort: Effort, flops: float, num_bytes: float) -> list[float]:
    """The floor of each round, at the rates measured in that round."""
    matmul_flops = 2.0 * effort.matmul_size**3
    return [
        max(flops * matmul / matmul_flops, num_bytes * copy / (2.0 * effort.copy_bytes))
        for matmul, copy in zip(times[MATMUL], times[COPY], strict=True)
    ]
