"""The typed functions: what ``import vitkernels as vk`` offers as ``vk.*``."""

from vitkernels.functional.attention import attention, merge_attentions

__all__ = ["attention", "merge_attentions"]
