"""Every entry and target. A new operator adds its module to the imports, which register what they hold."""

from benchmarks import (
    attention,
    attention_table,
    attention_transposed,
    gpu,
    gpu_sequences,
    indexed_attention,
    linear_attention,
    long_conv,
    merge_attentions,
    models,
    monarch,
    monarch_mixer,
    neighborhood_attention,
    regional_routing_attention,
    spectral_gating,
    window_attention,
)
from benchmarks.registry import entries, find, targets

__all__ = [
    "attention",
    "attention_table",
    "attention_transposed",
    "entries",
    "find",
    "gpu",
    "gpu_sequences",
    "indexed_attention",
    "linear_attention",
    "long_conv",
    "merge_attentions",
    "models",
    "monarch",
    "monarch_mixer",
    "neighborhood_attention",
    "regional_routing_attention",
    "spectral_gating",
    "targets",
    "window_attention",
]
