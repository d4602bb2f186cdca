"""Gates of spectra: as circular convolutions, as products with Fourier matrices, and in the block that uses them."""

import torch
import vitkernels as vk
from support.mechanisms import agree, agree_module, mlp, norm, tokens
from torch import nn


def fourier(length, like):
    """The unitary matrix of a transform."""
    at = torch.arange(length, device=like.device)
    angle = (at[:, None] * at % length).to(like.dtype) * (2 * torch.pi / length)
    return torch.complex(angle.cos(), -angle.sin()) / length**0.5


def gated(x, weight):
    """Of maps ``(B, H, W, C)``, with the spectra of whole rows: their second half mirrors the first one."""
    (height, width), half = x.shape[1:3], weight.shape[1]
    rows, columns = fourier(height, x), fourier(width, x)
    spectrum = torch.einsum("hy,wx,byxc->bhwc", rows, columns, x.to(rows.dtype))[:, :, :half]
    product = torch.einsum("hy,bhwc->bywc", rows.conj(), spectrum * torch.view_as_complex(weight))
    counts = torch.full((half,), 2.0, dtype=x.dtype)
    counts[0] = 1.0
    if width % 2 == 0:
        counts[-1] = 1.0
    return torch.einsum("wx,w,bywc->byxc", columns.conj()[:half], counts.to(rows.dtype), product).real


def test_global_filter_is_a_circular_convolution():
    """GFNet: with a kernel as large as the map, that of the weight's inverse transform."""
    for height, width in ((5, 6), (4, 7)):

        def formula(x, weight, height=height, width=width):
            kernel = torch.fft.irfft2(torch.view_as_complex(weight), s=(height, width), dim=(0, 1))
            down = (torch.arange(height)[:, None] - torch.arange(height)) % height
            across = (torch.arange(width)[:, None] - torch.arange(width)) % width
            shifted = kernel[down[:, None, :, None], across[None, :, None, :]]  # [H, W, H, W, C]
            return torch.einsum("hwyxc,byxc->bhwc", shifted, x)

        agree(vk.spectral_gating, formula, tokens(2, height, width, 6), tokens(height, width // 2 + 1, 6, 2))


def test_gates_between_fourier_matrices():
    for height, width in ((6, 9), (7, 8)):
        agree(vk.spectral_gating, gated, tokens(2, height, width, 5), tokens(height, width // 2 + 1, 5, 2), slack=2)


class SpectralBlock(nn.Module):
    """SpectFormer's: norm, gates, norm, MLP, with one residual connection around all of them."""

    def __init__(self, dim, height, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.filter = vk.nn.SpectralGating(dim, height, width)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        hidden = self.norm2(self.filter(self.norm1(x)))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(hidden)))


def test_spectral_block_of_tokens():
    def formula(parameters, x):
        of_map = norm(parameters, "norm1", x).unflatten(1, (4, 6))
        hidden = gated(of_map, parameters["filter.complex_weight"]).flatten(1, 2)
        return x + mlp(parameters, "mlp", norm(parameters, "norm2", hidden))

    agree_module(SpectralBlock(8, 4, 6), formula, tokens(2, 24, 8), slack=4)
