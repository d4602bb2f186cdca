"""Operators by the names in csrc/schema.cpp.

A backward operator takes gradients of the results (``grad_out``, ``grad_lse``), arguments and results of the forward
by their names there, and a ``need_*`` for each gradient that not every call asks for. What it returns as ``grad_x`` is
the gradient of ``x``; a list is that of all tensors in the forward's lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vitkernels._torch_private import schema_of

__all__ = ["GRAD", "NEED", "Arguments", "Operator"]

Arguments = dict[str, Any]

GRAD, NEED = "grad_", "need_"


class Operator:
    """``vitkernels::<name>`` and what its schema says of it."""

    def __init__(self, name: str) -> None:
        self.name, self.overload = name, getattr(torch.ops.vitkernels, name).default
        schema = schema_of(self.overload)
        types = [str(a.type) for a in schema.arguments]
        self.arguments: list[str] = [a.name for a in schema.arguments]
        self.results: list[str] = [r.name or "out" for r in schema.returns]
        self.tensors = [i for i, t in enumerate(types) if "Tensor" in t]  # where one, or a list of them, may stand
        self.others = [i for i, t in enumerate(types) if "Tensor" not in t]
        self.optional = {name for name, t in zip(self.arguments, types, strict=True) if t.startswith("Optional")}
        self.is_list = [t == "List[Tensor]" for t in types]
        self.has_lists = any(self.is_list)

    def named(self, values: Sequence[Any]) -> Arguments:
        return dict(zip(self.arguments, values, strict=True))

    def leaves(self, args: Sequence[Any]) -> list[Any]:
        """The names of ``args``, in place of a list of tensors those of its members."""
        return [
            [f"{name}[{i}]" for i in range(len(a))] if is_one else name
            for name, a, is_one in zip(self.arguments, args, self.is_list, strict=True)
        ]

    def flat(self, args: Sequence[Any]) -> list[Any]:
        """``args``, in place of a list of tensors its length and its members."""
        flat: list[Any] = []
        for a, is_one in zip(args, self.is_list, strict=True):
            flat += [len(a), *a] if is_one else [a]
        return flat

    def grouped(self, flat: Sequence[Any]) -> list[Any]:
        """What :meth:`flat` made its result of."""
        rest = iter(flat)
        return [[next(rest) for _ in range(next(rest))] if is_one else next(rest) for is_one in self.is_list]
