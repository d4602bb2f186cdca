"""What PyTorch must know of every operator besides its kernel: fake, autograd and autocast."""

from vitkernels.ops import attention, merge_attentions

__all__ = ["attention", "merge_attentions"]
