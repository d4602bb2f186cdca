"""What PyTorch must know of every operator besides its kernel: fake, vmap, autograd and autocast."""

from vitkernels.ops import attention

__all__ = ["attention"]
