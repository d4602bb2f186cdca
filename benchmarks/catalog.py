"""Every entry and target. A new operator adds its module to the imports, which register what they hold."""

from benchmarks import attention, attention_transposed, merge_attentions, models
from benchmarks.registry import entries, find, targets

__all__ = ["attention", "attention_transposed", "entries", "find", "merge_attentions", "models", "targets"]
