"""Linear layers whose weights are Monarch matrices."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkernels.functional.blockdiag_butterfly_multiply import multiply
from vitkernels.nn.maps import check_stored_input, integers
from vitkernels.nn.packed import PackedWeights

__all__ = ["MonarchLinear", "why_not_projected"]


class MonarchLinear(nn.Module):
    r"""A linear layer whose weight is a Monarch matrix: two block-diagonal factors with permutations.

    With ``p = ceil(in_features / nblocks)``, ``s = ceil(out_features / nblocks)`` and ``q = min(p, s)``, parameters are
    those of HazyResearch's layer of the same name, whose files load: ``blkdiag1 (nblocks, q, p)``,
    ``blkdiag2 (nblocks, s, q)`` and ``bias (out_features,)``. Inputs are padded with zeros, and outputs cut, where
    ``nblocks`` does not divide the sizes. Each block of inputs reaches each turn of outputs through ``q / nblocks``
    of the inner features, rounded up or down: with fewer of them than blocks, some pairs are not connected.

    Both factors are initialised like ``nn.Linear``, but for a factor of ``3 ** 0.25``, with which outputs have the
    variance that they have there. (HazyResearch's are smaller by ``3 ** 0.5``.)

    Args:
        in_features: features of the input.
        out_features: features of the output.
        nblocks: blocks of each factor; 1 is a product of two dense matrices.
        bias: whether there is a bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: on sizes out of range, or an input whose last dimension is not ``in_features``.

    Source: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training" (2022),
    sections 3 and 4.
    """

    #: Of a layer made by ``from_linear``: the relative error of its weight in the Frobenius norm.
    projection_error: float | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int = 4,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "out_features": out_features, "nblocks": nblocks}
        for name, n in sizes.items():
            integers("MonarchLinear", name, n, 1)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        p, s = -(-in_features // nblocks), -(-out_features // nblocks)
        self.in_features_extended, self.out_features_extended = nblocks * p, nblocks * s
        self.blkdiag1 = nn.Parameter(torch.empty(nblocks, min(p, s), p, **factory))
        self.blkdiag2 = nn.Parameter(torch.empty(nblocks, s, min(p, s), **factory))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, **factory))
        else:
            self.register_parameter("bias", None)
        self._packed: PackedWeights | None = None
        self.reset_parameters()

    def pack(self) -> MonarchLinear:
        """Have calls without gradients on the CPU keep the factors packed, which takes as much memory again.

        For inference with weights that stay as they are. A change that PyTorch counts has them packed again, but fused
        optimizers, collectives of ``torch.distributed``, ``parameter.data`` and NumPy's views of it change weights
        uncounted: call this again after these. :meth:`train` and :meth:`eval` end it. Compiled and exported graphs, and
        transforms of ``torch.func``, pack in each call.

        Returns:
            The layer.
        """
        self._packed = PackedWeights()
        return self

    def train(self, mode: bool = True) -> MonarchLinear:
        """As ``nn.Module``; ends :meth:`pack`."""
        self._packed = None
        return super().train(mode)

    def reset_parameters(self) -> None:
        """Initialise all parameters."""
        for factor in (self.blkdiag1, self.blkdiag2):
            # The variance of a sum of uniform values up to this bound is 3 ** -0.5 times that of one input.
            bound = 3**0.25 / math.sqrt(factor.size(-1))
            nn.init.uniform_(factor, -bound, bound)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        """Multiply, add the bias and activate in one pass.

        Args:
            x: ``(..., in_features)``.
            activation: that of :func:`vitkernels.blockdiag_butterfly_multiply`.

        Returns:
            ``(..., out_features)``.
        """
        layout = f"(..., {self.in_features})"
        check_stored_input(self, x, layout)
        if x.dim() == 0 or x.size(-1) != self.in_features:
            raise RuntimeError(f"vitkernels.nn.{type(self).__name__}: x has shape {tuple(x.shape)}, takes {layout}")
        if padding := self.in_features_extended - self.in_features:
            x = F.pad(x, (0, padding))
        packed = None if self._packed is None else self._packed.of(self.blkdiag1, self.blkdiag2)
        out = multiply(x, self.blkdiag1, self.blkdiag2, self._stored_bias(x), activation, packed)
        return out[..., : self.out_features] if self.out_features < self.out_features_extended else out

    def _stored_bias(self, x: Tensor) -> Tensor | None:
        """The bias as the product takes it: for all outputs, and in a dtype that goes with that of the product."""
        bias: Tensor | None = self.bias
        if bias is None:
            return None
        if padding := self.out_features_extended - self.out_features:
            bias = F.pad(bias, (0, padding))
        # Autocast gives the factors its dtype, but not the bias. Float32 goes with any of them.
        is_narrow = bias.dtype in (torch.bfloat16, torch.float16)
        return bias.float() if is_narrow and torch.is_autocast_enabled(x.device.type) else bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, nblocks={self.nblocks}, "
            f"bias={self.bias is not None}"
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, nblocks: int = 4) -> MonarchLinear:
        """The layer whose weight is nearest to that of ``linear`` in the Frobenius norm.

        Between a block of inputs and a turn of outputs a Monarch matrix may be any matrix of a certain rank, so the
        nearest one is a truncated singular value decomposition for each pair; the roots of the singular values go to
        both factors. They are computed in float64 and rounded to the dtype of ``linear`` once.

        Args:
            linear: a dense layer, whose bias, dtypes, device, mode and ``requires_grad`` are kept.
            nblocks: blocks of each factor.

        Returns:
            The layer. Its ``projection_error`` is its weight's relative error.

        Raises:
            RuntimeError: if ``linear`` is not an ``nn.Linear`` with finite floating-point values, or on a bad number of
                blocks.

        Source: Dao et al. (2022), section 3.3 and its appendix on rectangular matrices.
        """
        if why := why_not_projected(linear):
            raise RuntimeError(f"vitkernels.nn.MonarchLinear.from_linear: linear {why}")
        # On the meta device nothing is drawn from the random generator.
        made = cls(linear.in_features, linear.out_features, nblocks, linear.bias is not None, device="meta")
        weight = linear.weight.detach()
        for name, factor in zip(("blkdiag1", "blkdiag2"), _nearest(weight.double(), nblocks), strict=True):
            setattr(made, name, nn.Parameter(factor.to(weight.dtype), linear.weight.requires_grad))
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        norm = torch.linalg.vector_norm(weight.double()).item()
        distance = torch.linalg.vector_norm(weight.double() - made._dense()).item()
        made.projection_error = distance / norm if norm else 0.0
        return made.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The same layer with a dense weight, which is exact but for the rounding to its dtype.

        Bias, dtypes, device, mode and ``requires_grad`` are kept.
        """
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        needs_grad = self.blkdiag1.requires_grad or self.blkdiag2.requires_grad
        linear.weight = nn.Parameter(self._dense().to(self.blkdiag1.dtype), needs_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    def _dense(self) -> Tensor:
        """The weight in float64: ``(out_features, in_features)``."""
        w1, w2 = self.blkdiag1.detach().double(), self.blkdiag2.detach().double()
        first = torch.block_diag(*w1)  # type: ignore[no-untyped-call]  # [k * q, k * p]
        in_turn = torch.unflatten(first, 0, (-1, self.nblocks))  # [r, l, k * p]
        dense = torch.einsum("lsr,rlc->slc", w2, in_turn).flatten(0, 1)  # [s * l, k * p]
        return dense[: self.out_features, : self.in_features]


def _nearest(weight: Tensor, nblocks: int) -> tuple[Tensor, Tensor]:
    """The factors nearest to ``weight (out_features, in_features)``."""
    p, s = -(-weight.size(1) // nblocks), -(-weight.size(0) // nblocks)
    q = min(p, s)
    padded = F.pad(weight, (0, nblocks * p - weight.size(1), 0, nblocks * s - weight.size(0)))  # [s * l, k * p]
    pairs = padded.view(s, nblocks, nblocks, p).permute(2, 1, 0, 3)  # [k, l, s, p]
    u, sigma, vh = torch.linalg.svd(pairs, full_matrices=False)
    root = sigma.sqrt().unsqueeze(-1)  # [k, l, q, 1]
    # Inner feature n is written by block n // q and read in turn n % l: among those of its pair, it is this one.
    n = torch.arange(nblocks * q, device=weight.device)  # [k * q]
    pair = n // q, n % nblocks, n % q // nblocks
    w1 = (root * vh)[pair].view(nblocks, q, p)
    w2 = (root * u.mT)[pair].view(q, nblocks, s).permute(1, 2, 0).contiguous()  # [l, s, r]
    return w1, w2


def why_not_projected(linear: object) -> str:
    """Why there is no Monarch matrix next to the weight of ``linear``, or nothing."""
    if not isinstance(linear, nn.Linear):
        return f"is a {type(linear).__name__}, takes a torch.nn.Linear"
    weight = linear.weight
    if not weight.is_floating_point() or weight.is_meta:
        return f"has a weight of {weight.dtype} on {weight.device}, takes floating-point values in memory"
    return "" if weight.isfinite().all() else "has a weight with NaN or infinity, takes finite values"
