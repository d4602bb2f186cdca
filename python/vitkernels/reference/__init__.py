"""Plain PyTorch definitions of every operator: slow, float64-capable, the ground truth of the tests."""

from vitkernels.reference.attention import attention, merge_attentions

__all__ = ["attention", "merge_attentions"]
