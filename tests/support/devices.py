"""The device that the gates compute on, and what has kernels there.

``VITKERNELS_TEST_DEVICE=cuda`` runs the tests of the sample table on a GPU: samples are made on the CPU, from the same
seeds, and moved. Samples without kernels there are skipped. (test_emulator_gates runs CUDA kernels on CPU tensors.)
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

DEVICE = torch.device(os.environ.get("VITKERNELS_TEST_DEVICE", "cpu"))
ON_CPU = DEVICE.type == "cpu"

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
ON_TENSOR_CORES = (torch.float32, *HALF)
# The functions of the sample table that have CUDA kernels, and the dtypes that these take.
FUNCTIONS = {
    "merge_attentions": DTYPES,
    "attention": ON_TENSOR_CORES,
    "attention_varlen": ON_TENSOR_CORES,
    "attention_transposed": ON_TENSOR_CORES,
    "spatial_attention": ON_TENSOR_CORES,
    "linear_attention": ON_TENSOR_CORES,
    "linear_attention_varlen": ON_TENSOR_CORES,
    "channel_attention": ON_TENSOR_CORES,
    "decayed_linear_attention": ON_TENSOR_CORES,
    "blockdiag_butterfly_multiply": ON_TENSOR_CORES,
    "long_conv": ON_TENSOR_CORES,
    "spectral_gating": ON_TENSOR_CORES,
}
# Those of them whose float32 is never rounded to TF32.
WITHOUT_TF32 = ("long_conv", "spectral_gating")


def is_taken(sample: Any) -> bool:
    """Whether CUDA kernels compute a sample in some dtype, forward and backward."""
    narrow = (
        "spatial_attention", "linear_attention", "linear_attention_varlen", "channel_attention",
        "decayed_linear_attention",
    )  # fmt: skip
    return sample.operator in FUNCTIONS and not (
        sample.operator in narrow and max(sample.sizes["d"], sample.sizes["v"]) > 128
    )


def why_not(sample: Any, dtype: torch.dtype | None = None) -> str | None:
    """Why a sample, in a dtype if one is given, has no kernels on the device of the tests, or ``None``."""
    if ON_CPU:
        return None
    if not is_taken(sample):
        return f"no CUDA kernels for {sample}"
    if dtype is not None and dtype not in FUNCTIONS[sample.operator]:
        return f"no CUDA kernels for {sample.operator} in {dtype}"
    return None


def need(sample: Any, dtype: torch.dtype) -> None:
    """Skip the test where the device has no kernels for it."""
    if reason := why_not(sample, dtype):
        pytest.skip(reason)


def dtype_of(sample: Any, wanted: torch.dtype) -> torch.dtype:
    """``wanted``, or if the kernels do not take it, the most precise dtype that they take."""
    return wanted if why_not(sample, wanted) is None else next(d for d in DTYPES if why_not(sample, d) is None)
