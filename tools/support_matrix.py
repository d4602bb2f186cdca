"""What is supported where: the page docs/support.md, found by making the calls of the sample table.

    python -m tools.support_matrix [--out FILE]

A test compares the page with what this finds.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

import torch
import vitkernels as vk

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.calls import Call, differentiate, learning  # noqa: E402
from support.devices import DTYPES, FUNCTIONS  # noqa: E402
from support.samples import SMALL_SAMPLES, Sample  # noqa: E402

PAGE = ROOT / "docs" / "support.md"
OPERATORS = tuple(dict.fromkeys(s.operator for s in SMALL_SAMPLES))
# The subject of a call, not its options.
DATA = (
    "query", "key", "value", "value_q", "lse", "axes", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
    "outs", "lses", "return_lse",
)  # fmt: skip

HEAD = """# What is supported

`python -m tools.support_matrix` writes this page: it makes the calls that the tests make, so that "yes" means that a
test covers it.

## Devices and dtypes

Forward and gradient. On the CPU every operator takes every dtype on every instruction set. Under `torch.autocast`, data
are cast and nothing else. Kernels for CUDA are tested by an emulator, and on a GPU where there is one. There, head
dimensions are at most 256, and over maps at most 128 for a gradient.

"""
ARGUMENTS = """
## Arguments

"∂": with a gradient. An operator that a row does not name has no such argument.

"""
RAW = """
The operators under `torch.ops.vitkernels` take the same, and an error names what their kernels cannot do.
"""


def parameters(operator: str) -> list[str]:
    return [name for name in inspect.signature(getattr(vk, operator)).parameters if name not in DATA]


def is_given(call: Call, sample: Sample, name: str) -> bool:
    """Whether a call gives an argument a value other than its default."""
    default = inspect.signature(sample.function).parameters[name].default
    return name in call and call[name] is not default


def tried(sample: Sample, dtype: torch.dtype) -> tuple[Call, bool] | None:
    """A call that was made, and whether its leaves got gradients; ``None`` if it was refused."""
    call = sample.call(dtype, sizes=sample.small())
    try:
        outputs, grads = differentiate(sample.function, call)
    except RuntimeError:
        return None
    assert not any(t.isnan().any() for t in outputs + grads), f"{sample} {dtype}"
    return call, len(grads) == len(learning(call))


def arguments() -> dict[str, dict[str, str]]:
    """By argument and operator: ``"∂"``, ``"yes"``, or nothing where no sample gives it."""
    found: dict[str, dict[str, str]] = {name: {} for operator in OPERATORS for name in parameters(operator)}
    for sample in SMALL_SAMPLES:
        result = tried(sample, torch.float32)
        if result is None:
            continue
        call, has_gradients = result
        for name in parameters(sample.operator):
            if is_given(call, sample, name):
                learns = has_gradients and bool(learning(call[name]))
                before = found[name].get(sample.operator)
                found[name][sample.operator] = "∂" if learns or before == "∂" else "yes"
    return found


def dtypes(operator: str) -> str:
    sample = next(s for s in SMALL_SAMPLES if s.operator == operator and learning(s.call(torch.float32)))
    return ", ".join(str(d).removeprefix("torch.") for d in DTYPES if tried(sample, d))


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page() -> str:
    names = [f"`{operator}`" for operator in OPERATORS]
    devices: list[list[Any]] = [
        [
            name,
            dtypes(operator),
            ", ".join(str(d).removeprefix("torch.") for d in FUNCTIONS.get(operator, ())) or "no",
        ]
        for name, operator in zip(names, OPERATORS, strict=True)
    ]
    rows = []
    for argument, by_operator in arguments().items():
        without = [op for op in OPERATORS if argument in parameters(op) and op not in by_operator]
        if without:
            raise SystemExit(f"no sample gives {', '.join(without)} the argument {argument}")
        rows.append([f"`{argument}`", *(by_operator.get(operator, "") for operator in OPERATORS)])
    return HEAD + table(["", "CPU", "CUDA"], devices) + ARGUMENTS + table(["", *names], rows) + RAW


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.parse_args().out.write_text(page())


if __name__ == "__main__":
    main()
