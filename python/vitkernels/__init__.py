"""Fused attention and token kernels for vision transformers."""

from vitkernels import _library as _library  # loads the operators before anything registers on them
from vitkernels import compat, nn, reference
from vitkernels.functional import attention, attention_transposed, attention_varlen, merge_attentions
from vitkernels.integrations import Report, accelerate, restore

__version__ = "0.1.0"

__all__ = [
    "Report",
    "accelerate",
    "attention",
    "attention_transposed",
    "attention_varlen",
    "compat",
    "merge_attentions",
    "nn",
    "reference",
    "restore",
]
