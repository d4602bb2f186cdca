"""A batch norm that replaces a layer norm in the course of training, and then vanishes into a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.nn.maps import check_stored_input, integers

__all__ = ["ProgressiveRepBN", "RepBN"]


class RepBN(nn.Module):
    r"""Re-parameterised batch norm of tokens: :math:`\operatorname{BN}(x) + \eta x` with a learned :math:`\eta`.

    Parameter names and shapes are SLAB's (``alpha``, which is :math:`\eta`, and ``bn``), so its published weights load.
    After training :meth:`folded_into` makes it part of the linear layer behind it.

    Args:
        channels: size of the last dimension.
        eps: added to the variance.
        momentum: of the running statistics.
        device: of the parameters.
        dtype: of the parameters.

    Source: Guo et al., "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
    Re-parameterized Batch Normalization" (2024), section 3.2.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        integers("RepBN", "channels", channels, 1)
        self.alpha = nn.Parameter(torch.ones(1, **factory))
        self.bn = nn.BatchNorm1d(channels, eps, momentum, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """``(*, channels)`` to the same; the statistics are those of all tokens of the batch.

        Raises:
            RuntimeError: if ``x`` has another number of channels, or in training, a single token.
        """
        _check(self, x, self.bn.num_features)
        tokens = x.flatten(0, -2)  # [tokens, channels]
        if tokens.shape[0] == 0:
            return x * self.alpha  # there is nothing to take statistics of
        if self.training and tokens.shape[0] == 1:
            raise RuntimeError(
                f"vitkernels.nn.RepBN: x has shape {tuple(x.shape)}, takes two tokens or more in training"
            )
        out: Tensor = self.bn(tokens) + self.alpha * tokens  # [tokens, channels]
        return out.reshape(x.shape)

    @torch.no_grad()
    def folded_into(self, linear: nn.Linear) -> nn.Linear:
        """A new layer that computes what this norm, in evaluation, and then ``linear`` compute.

        Args:
            linear: a layer of ``channels`` inputs.

        Returns:
            A layer with a bias, in dtype, device and mode as ``linear``. It is computed in float64.

        Raises:
            RuntimeError: if ``linear`` is no linear layer of so many inputs.
        """
        channels = self.bn.num_features
        if not isinstance(linear, nn.Linear) or linear.in_features != channels:
            what = f"of {linear.in_features} inputs" if isinstance(linear, nn.Linear) else type(linear).__name__
            raise RuntimeError(f"vitkernels.nn.RepBN: linear is {what}, takes an nn.Linear of {channels} inputs")
        mean, variance = self.bn.running_mean, self.bn.running_var
        assert mean is not None and variance is not None
        slope = self.bn.weight.double() / (variance.double() + self.bn.eps).sqrt()  # [channels]
        offset = self.bn.bias.double() - mean.double() * slope  # [channels]
        weight = linear.weight.double()  # [out, channels]
        bias = weight @ offset  # [out]
        if linear.bias is not None:
            bias = bias + linear.bias.double()
        factory: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        folded = nn.Linear(channels, linear.out_features, **factory)
        folded.weight.copy_(weight * (slope + self.alpha.double()))
        folded.bias.copy_(bias)
        return folded.train(linear.training)


class ProgressiveRepBN(nn.Module):
    r"""A layer norm that becomes a :class:`RepBN` over the steps of training.

    .. math::
        \lambda \operatorname{LN}(x) + (1 - \lambda) \operatorname{RepBN}(x)

    Every forward in training is a step: after ``warm`` steps of the layer norm alone, :math:`\lambda` falls from
    ``r0`` to 0 over ``step`` steps. The running statistics are taken from the first step on. In evaluation there is the
    :class:`RepBN` alone, also before the end. A forward that is computed again, as checkpointing does, counts again, as
    it does for the running statistics. Parameter and buffer names and shapes are those of SLAB's ``LinearNorm``
    (``norm1``, ``norm2``, ``warm``, ``iter``, ``total_step``).

    Args:
        channels: size of the last dimension.
        step: steps in which the layer norm vanishes, 1 or more.
        warm: steps before.
        r0: what :math:`\lambda` starts from, from 0 to 1.
        eps: of both norms.
        device: of the parameters.
        dtype: of the parameters.

    Source: Guo et al., "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
    Re-parameterized Batch Normalization" (2024), section 3.2.
    """

    warm: Tensor
    iter: Tensor
    total_step: Tensor

    def __init__(
        self,
        channels: int,
        step: int,
        warm: int = 0,
        r0: float = 1.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        integers("ProgressiveRepBN", "channels", channels, 1)
        integers("ProgressiveRepBN", "step", step, 1)
        integers("ProgressiveRepBN", "warm", warm, 1, at_least=0)
        if isinstance(r0, bool) or not isinstance(r0, (int, float)) or not 0 <= r0 <= 1:
            raise RuntimeError(f"vitkernels.nn.ProgressiveRepBN: r0 is {r0!r}, takes a number from 0 to 1")
        self.r0 = r0
        for name, n in (("warm", warm), ("iter", step), ("total_step", step)):
            self.register_buffer(name, torch.tensor(n, device=device))
        self.norm1 = nn.LayerNorm(channels, eps, device=device, dtype=dtype)
        self.norm2 = RepBN(channels, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(*, channels)`` to the same."""
        _check(self, x, self.norm2.bn.num_features)
        if not self.training:
            out: Tensor = self.norm2(x)
            return out
        # Counted on the device: nothing waits for it, and a compiler need not know the count.
        is_warm = self.warm > 0
        fraction = self.iter.to(torch.promote_types(x.dtype, torch.float32)) / self.total_step
        weight = torch.where(is_warm, 1.0, self.r0 * fraction)
        self.warm.sub_(is_warm.to(self.warm.dtype))
        self.iter.sub_((~is_warm & (self.iter > 0)).to(self.iter.dtype))
        blend: Tensor = weight * self.norm1(x) + (1 - weight) * self.norm2(x)
        return blend

    def folded_into(self, linear: nn.Linear) -> nn.Linear:
        """A new layer that computes what this norm, in evaluation, and then ``linear`` compute.

        Raises:
            RuntimeError: if the layer norm has not vanished yet, or as :meth:`RepBN.folded_into` does.
        """
        left = int(self.warm) + int(self.iter)
        if left > 0:
            raise RuntimeError(f"vitkernels.nn.ProgressiveRepBN: iter and warm have {left} steps left, takes 0 to fold")
        return self.norm2.folded_into(linear)

    def extra_repr(self) -> str:
        return f"r0={self.r0}"


def _check(module: nn.Module, x: Tensor, channels: int) -> None:
    layout = f"(*, {channels})"
    check_stored_input(module, x, layout)
    if x.dim() < 2 or x.shape[-1] != channels:
        raise RuntimeError(f"vitkernels.nn.{type(module).__name__}: x has shape {tuple(x.shape)}, takes {layout}")
