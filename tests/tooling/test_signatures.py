"""The public API stays: what every function and every constructor takes, against ``signatures.txt`` beside this file.

To add to the API: python tests/tooling/test_signatures.py > tests/tooling/signatures.txt
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import vitkernels as vk

ROOMS = {"": vk, "nn.": vk.nn, "compat.": vk.compat}


def options(owner, parameter: inspect.Parameter) -> str:
    """What a function takes as ``**options``, by name and type."""
    named = re.fullmatch(r"Unpack\[(\w+)\]", parameter.annotation)
    if named is None:
        return str(parameter)
    fields = getattr(sys.modules[owner.__module__], named[1])
    return "\n    ".join(f"**{name}: {kind.__forward_arg__}" for name, kind in sorted(fields.__annotations__.items()))


def signatures() -> str:
    """A line for each argument."""
    lines = []
    for room, module in ROOMS.items():
        for name in sorted(module.__all__):
            owner = getattr(module, name)
            if not callable(owner):
                continue
            signature = inspect.signature(owner)
            lines.append(f"{room}{name} -> {signature.return_annotation}")
            for parameter in signature.parameters.values():
                star = "*, " if parameter.kind is inspect.Parameter.KEYWORD_ONLY else ""
                is_options = parameter.kind is inspect.Parameter.VAR_KEYWORD
                lines.append(f"    {star}{options(owner, parameter) if is_options else parameter}".replace("'", ""))
    return "\n".join(lines) + "\n"


def test_signatures_are_as_they_were():
    committed = Path(__file__).with_name("signatures.txt").read_text()
    assert signatures().splitlines() == committed.splitlines()


if __name__ == "__main__":
    print(signatures(), end="")
