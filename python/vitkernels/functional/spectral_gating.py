"""Gates of a map's spectrum."""

from __future__ import annotations

from torch import Tensor

from vitkernels.functional.arguments import check_tensors
from vitkernels.ops.monarch import spectral_gating as _spectral_gating

__all__ = ["spectral_gating"]

_OP = "spectral_gating"


def spectral_gating(x: Tensor, weight: Tensor) -> Tensor:
    r"""Product of each channel's two-dimensional spectrum with a complex weight for each frequency.

    .. math::
        y = \mathcal{F}^{-1}(K \odot \mathcal{F}(x))

    It is the circular convolution of each map with a kernel as large as the map. In PyTorch's words, over the axes of
    ``H`` and ``W``: ``irfft2(rfft2(x, norm="ortho") * torch.view_as_complex(weight), s=(H, W), norm="ortho")``. What a
    weight makes of the frequencies 0 and ``W / 2`` along a row need not be the spectrum of anything real; as there, the
    imaginary part is ignored.

    Rows and columns are transformed and gated in one pass for each map and group of channels, which stays in the cache
    or in shared memory. Any size is fine; the fastest have no prime factor above 7.

    Args:
        x: ``(B, H, W, C)`` of any strides. Two layouts are fast: contiguous, and ``maps.permute(0, 2, 3, 1)`` of
            contiguous maps ``(B, C, H, W)``.
        weight: ``(H, W // 2 + 1, C, 2)``, the real and the imaginary part of each frequency's weight.

    The dtypes of ``x`` are float64, float32, bfloat16 and float16; ``weight`` has the same, or float32 with one of 16
    bits. Everything between the inputs and the rounded result is float32 (float64 for float64). On a GPU there is no
    float64, a channel's map has to fit into the shared memory of a thread block (about ``4 H W`` bytes, and twice as
    many for the gradient of the weight), and the prime factors of ``H`` and ``W`` are at most 1023.

    Returns:
        ``(B, H, W, C)``, contiguous, in the dtype of ``x``, with the same bits in every run, gradients included.

    A NaN or infinity in ``x`` reaches all positions of its channel in its batch, and no other: it has no position in a
    spectrum. Likewise rounding errors are relative to the largest values of the channel, at every position.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, or maps too large for a GPU, naming the argument and what
            it takes.

    Sources: Rao et al., "Global Filter Networks for Image Classification" (2021), section 3.2; Patro et al.,
    "SpectFormer: Frequency and Attention is what you need in a Vision Transformer" (2023), section 3.
    """
    check_tensors(_OP, x=x, weight=weight)
    out: Tensor = _spectral_gating(x, weight)
    return out
