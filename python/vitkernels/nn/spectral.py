"""Gates of spectra."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.functional import spectral_gating
from vitkernels.nn.maps import check_stored_input, integers

__all__ = ["SpectralGating"]


class SpectralGating(nn.Module):
    """A learned complex weight for each frequency of a map and each channel; GFNet's and SpectFormer's layer, fused.

    The parameter is that of ``GlobalFilter`` and ``SpectralGatingNetwork``, and their files load: ``complex_weight
    (height, width // 2 + 1, dim, 2)``, initialised with normal values times 0.02.

    Args:
        dim: channels of the map.
        height: rows of the map.
        width: columns of the map.
        device: of the parameter.
        dtype: of the parameter.

    Raises:
        RuntimeError: on sizes out of range, or an input with another map or other channels than the module's.

    Sources: Rao et al., "Global Filter Networks for Image Classification" (2021), section 3.2; Patro et al.,
    "SpectFormer: Frequency and Attention is what you need in a Vision Transformer" (2023), section 3.
    """

    def __init__(
        self,
        dim: int,
        height: int = 14,
        width: int = 14,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, n in {"dim": dim, "height": height, "width": width}.items():
            integers("SpectralGating", name, n, 1)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.height, self.width = dim, height, width
        self.complex_weight = nn.Parameter(torch.empty(height, width // 2 + 1, dim, 2, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameter."""
        nn.init.normal_(self.complex_weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, height, width, dim)``, or ``(B, height * width, dim)``, to the same shape."""
        height, width, dim = self.height, self.width, self.dim
        layout = f"(B, {height}, {width}, {dim}) or (B, {height * width}, {dim})"
        check_stored_input(self, x, layout)
        if x.dim() not in (3, 4) or x.shape[1:] not in ((height, width, dim), (height * width, dim)):
            name = f"vitkernels.nn.{type(self).__name__}"
            raise RuntimeError(
                f"{name}: x has shape {tuple(x.shape)}, takes {layout}: a map of {height} x {width} and {dim} channels"
            )
        weight: Tensor = self.complex_weight
        # Autocast gives the map its dtype, but not the weight. Float32 goes with any of them.
        if weight.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(x.device.type):
            weight = weight.float()
        if x.dim() == 4:
            return spectral_gating(x, weight)
        return spectral_gating(torch.unflatten(x, 1, (height, width)), weight).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, height={self.height}, width={self.width}"
