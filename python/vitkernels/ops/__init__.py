"""What PyTorch must know of every operator besides its kernel: fake, vmap, autograd, autocast and FLOPs."""

from vitkernels.ops import attention, flops, linear_attention, monarch

__all__ = ["attention", "flops", "linear_attention", "monarch"]
