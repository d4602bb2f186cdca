"""timm: modules whose class is swapped for one that computes softmax attention with the kernels."""

from vitkernels.integrations.timm.families import SWAPS

__all__ = ["replace", "restore", "suspend"]

replace, restore, suspend = SWAPS.replace, SWAPS.restore, SWAPS.suspend
