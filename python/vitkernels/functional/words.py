"""Errors of operators, in the words of the function that was called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

__all__ = ["Words"]

_EMBEDDINGS = ("rel_pos_depth", "rel_pos_height", "rel_pos_width")
_FILLS = {"key_fill": "outside[0]", "value_fill": "outside[1]"}
_NOTHING: Mapping[str, str] = MappingProxyType({})


class Words(NamedTuple):
    """How a function calls what its operator has another name for.

    Args:
        function: its name.
        arguments: its arguments, by the operator's.
        rules: its arguments, by what the operator says of an axis: ``size``, ``key_size``, ``shift``, ``halo``.
    """

    function: str
    arguments: Mapping[str, str] = _NOTHING
    rules: Mapping[str, str] = _NOTHING

    def of(self, error: RuntimeError, operator: str, rel_pos: Sequence[Tensor] | None = None) -> RuntimeError:
        """``error`` as the function would have raised it, if it is one that ``operator`` raised."""
        text, prefix = str(error), f"vitkernels::{operator}: "
        if prefix not in text:
            return error
        embeddings = _EMBEDDINGS[-len(rel_pos) :] if rel_pos else ()
        names = {**_FILLS, **{name: f"rel_pos[{i}]" for i, name in enumerate(embeddings)}, **self.arguments}
        text = re.sub(rf"\b({'|'.join(names)})\b", lambda found: names[found[1]], text)
        if self.rules:
            text = re.sub(r"axes gives axis (\d+) the (\w+) (-?\d+)", self._of_axis, text)
        return RuntimeError(text.replace(prefix, f"vitkernels::{self.function}: "))

    def _of_axis(self, found: re.Match[str]) -> str:
        axis, rule, size = found.groups()
        return f"{self.rules.get(rule, rule)} is {size} on axis {axis}"
