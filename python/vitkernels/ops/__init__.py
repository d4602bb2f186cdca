"""What PyTorch must know of every operator besides its kernel: fake, autograd and autocast."""

from vitkernels.ops import attention, attention_transposed, merge_attentions

__all__ = ["attention", "attention_transposed", "merge_attentions"]
