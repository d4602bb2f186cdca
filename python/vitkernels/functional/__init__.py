"""The typed functions: what ``import vitkernels as vk`` offers as ``vk.*``."""

from vitkernels.functional.attention import attention
from vitkernels.functional.attention_transposed import attention_transposed
from vitkernels.functional.attention_varlen import attention_varlen
from vitkernels.functional.merge_attentions import merge_attentions

__all__ = ["attention", "attention_transposed", "attention_varlen", "merge_attentions"]
