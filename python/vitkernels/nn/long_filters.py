"""Filters of long convolutions: of an MLP of the position, or of a parameter for each tap."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkernels.ops.attention import statistics_dtype

__all__ = ["ExplicitFilter", "ImplicitFilter"]

# M2's decays: the slowest channel falls to a hundredth in 1.5 times the longest sequence, the fastest in 0.3 times.
_TARGET, _SLOW, _FAST = 1e-2, 1.5, 0.3


class _Wide(nn.Module):
    """Its tensors stay float32 in modules of 16 bits.

    Neighbouring positions would be rounded to one, and sines of sines make a tenth of what is rounded off a frequency.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Wide:
        def wide(t: Tensor) -> Tensor:
            out = fn(t)
            return out if out.dtype == statistics_dtype(out.dtype) else t.to(out.device, statistics_dtype(out.dtype))

        super()._apply(wide, recurse)  # type: ignore[no-untyped-call]
        return self


class _Positions(_Wide):
    """Time from 0 to 1 over the longest sequence, and waves of it."""

    def __init__(self, max_length: int, emb_dim: int, **factory: Any) -> None:
        super().__init__()
        self.z: Tensor
        self.t: Tensor
        self.register_buffer("z", torch.empty(1, max_length, emb_dim, **factory))
        self.register_buffer("t", torch.empty(1, max_length, 1, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        length, emb_dim = self.z.shape[1:]
        options: dict[str, Any] = {"dtype": torch.float64, "device": self.z.device}
        bands = (emb_dim - 1) // 2
        frequency = torch.linspace(1e-4, bands - 1, bands, **options)  # [bands]
        angle = torch.arange(length, **options)[:, None] * (2 * math.pi / length) * frequency  # [max_length, bands]
        time = torch.linspace(0, 1, length, **options)[:, None]  # [max_length, 1]
        self.t.copy_(time)
        self.z.copy_(torch.cat((time, angle.cos(), -angle.sin()), -1))

    def forward(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.z[:, :length].to(dtype), self.t[:, :length].to(dtype)


class _Decay(_Wide):
    """An exponential for each channel."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.deltas: Tensor
        self.register_buffer("deltas", torch.empty(1, 1, dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.deltas.copy_(_rates(self.deltas.shape[-1]))

    def forward(self, t: Tensor) -> Tensor:
        return torch.exp(-t * self.deltas.abs().to(t.dtype))  # [1, N, dim]


class _Linear(_Wide, nn.Linear):
    """In the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class _Sine(_Wide):
    """Each channel has a frequency, which is learned."""

    def __init__(self, dim: int, frequency: float, **factory: Any) -> None:
        super().__init__()
        self.initial = frequency
        self.freq = nn.Parameter(torch.empty(1, dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.freq, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq.to(x.dtype) * x)


class ImplicitFilter(nn.Module):
    """M2's filter: a small MLP of the position with sines between its layers, times a decay; and a skip connection.

    The MLP stays float32 where the module is converted to 16 bits.

    Args:
        dim: channels.
        max_length: positions of the longest sequence.
        is_causal: whether there is no filter for what is ahead.
        emb_dim: features of a position, an odd number from 3 on.
        order: width of the MLP, which has four layers.
        freq: initial frequency of the sines.
        factory: device and dtype of the parameters.
    """

    def __init__(
        self, dim: int, max_length: int, is_causal: bool, emb_dim: int, order: int, freq: float, **factory: Any
    ) -> None:
        super().__init__()
        wide = factory | {"dtype": statistics_dtype(factory.get("dtype") or torch.get_default_dtype())}
        self.bias = nn.Parameter(torch.empty(dim, **factory))
        self.pos_emb = _Positions(max_length, emb_dim, **wide)

        def mlp() -> nn.Sequential:
            layers: list[nn.Module] = []
            for width in (emb_dim, order, order):
                layers += [_Linear(width, order, **wide), _Sine(order, freq, **wide)]
            return nn.Sequential(*layers, _Linear(order, dim, bias=False, **wide))

        self.implicit_filter = mlp()
        self.implicit_filter_rev = None if is_causal else mlp()
        self.modulation = _Decay(dim, **wide)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the skip connection; what else there is has a method of its own."""
        nn.init.normal_(self.bias)

    def forward(self, length: int) -> Tensor:
        """Taps ``(dim, M)`` of :func:`vitkernels.long_conv`, in float32 or float64, also under autocast."""
        dtype = statistics_dtype(self.bias.dtype)
        with _without_autocast(self.bias.device.type):
            z, t = self.pos_emb(length, dtype)  # [1, N, emb_dim], [1, N, 1]
            decay = self.modulation(t)  # [1, N, dim]
            ahead: Tensor = (self.implicit_filter(z) * decay)[0].mT  # [dim, N]
            # The skip connection is one more term of the tap of lag 0.
            ahead = ahead + F.pad(self.bias.to(dtype)[:, None], (0, length - 1))  # [dim, N]
            if self.implicit_filter_rev is None:
                return ahead
            behind = (self.implicit_filter_rev(z) * decay)[0].mT  # [dim, N], lags from -1 down
            # No tensor of N - 1 positions: an exported program would not take two.
            return torch.cat((behind.flip(-1), ahead), -1)[:, 1:]  # [dim, 2 N - 1]


class ExplicitFilter(nn.Module):
    """A parameter for each tap of each channel; of shorter sequences, the taps of the smallest lags.

    Args:
        dim: channels.
        max_length: positions of the longest sequence.
        is_causal: whether there are no taps for what is ahead.
        factory: device and dtype of the parameter.
    """

    def __init__(self, dim: int, max_length: int, is_causal: bool, **factory: Any) -> None:
        super().__init__()
        self.max_length, self.is_causal = max_length, is_causal
        self.weight = nn.Parameter(torch.empty(dim, max_length if is_causal else 2 * max_length - 1, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random taps that decay as those of :class:`ImplicitFilter` do, whose variances have a sum of 1."""
        dim, count = self.weight.shape
        tap = torch.arange(count, device="cpu")  # [M]
        lag = tap if self.is_causal else (tap - self.max_length + 1).abs()  # [M]
        decay = torch.exp(_rates(dim)[:, None] * lag / max(self.max_length - 1, 1))  # [dim, M]
        nn.init.normal_(self.weight)
        with torch.no_grad():
            self.weight.mul_((decay / decay.norm(dim=1, keepdim=True)).to(self.weight))

    def forward(self, length: int) -> Tensor:
        """Taps ``(dim, M)`` of :func:`vitkernels.long_conv`."""
        # One more column, so that no taps are all of them: an exported program would not take max_length otherwise.
        weight = F.pad(self.weight, (0, 1))  # [dim, taps + 1]
        if self.is_causal:
            return weight[:, :length]
        return weight[:, self.max_length - length : self.max_length + length - 1]


def _rates(dim: int) -> Tensor:
    """Negative exponents of the decays over the longest sequence: ``(dim,)``, float64."""
    return torch.linspace(math.log(_TARGET) / _SLOW, math.log(_TARGET) / _FAST, dim, dtype=torch.float64, device="cpu")


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
