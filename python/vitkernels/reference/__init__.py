"""Plain PyTorch definitions of every operator: slow, float64-capable, the ground truth of the tests."""

from vitkernels.reference.attention import attention
from vitkernels.reference.attention_transposed import attention_transposed
from vitkernels.reference.attention_varlen import attention_varlen
from vitkernels.reference.merge_attentions import merge_attentions
from vitkernels.reference.spatial_attention import spatial_attention

__all__ = ["attention", "attention_transposed", "attention_varlen", "merge_attentions", "spatial_attention"]
