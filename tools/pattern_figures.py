"""Which keys a query sees, a picture for each pattern: docs/figures/pattern-*.svg, drawn from pattern.h itself.

    python -m tools.pattern_figures [--out FOLDER]

Every picture shows a map twice, each time with one query (orange) and the keys that it sees (blue).
"""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path

import vitkernels as vk
from vitkernels.axes import Axis

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support import pattern  # noqa: E402  (of the tests: pattern.h itself, compiled on demand)

SIDE, CELL, GAP = 16, 10, 2
QUERIES = ((5, 6), (1, 14))
PATTERNS: dict[str, list[tuple[Axis, Axis]]] = {
    "window": [(vk.Block(4), vk.Block(4))],
    "window-shifted": [(vk.Block(4, 2), vk.Block(4, 2))],
    "grid": [(vk.Full(SIDE // 4), vk.Full(SIDE // 4))],
    "halo": [(vk.Halo(4, 2), vk.Halo(4, 2))],
    "neighborhood": [(vk.Neighborhood(5), vk.Neighborhood(5))],
    "neighborhood-dilated": [(vk.Neighborhood(5, dilation=3), vk.Neighborhood(5, dilation=3))],
    "neighborhood-strided": [(vk.Neighborhood(5, stride=4), vk.Neighborhood(5, stride=4))],
    "neighborhood-causal": [(vk.Neighborhood(5, is_causal=True), vk.Neighborhood(5))],
    "sliding": [(vk.Sliding(5), vk.Sliding(5))],
    "stripes": [(vk.Full(), vk.Block(2))],
    "criss-cross": [(vk.Block(1), vk.Full()), (vk.Full(), vk.Block(1))],
}
"""Of criss-cross attention two patterns, whose results are merged."""


def seen(parts: list[tuple[Axis, Axis]], y: int, x: int) -> set[tuple[int, int]]:
    """The keys ``(row, column)`` of the query ``(y, x)``, in all ``parts`` together."""
    axes = [[pattern.visible(axis, SIDE, SIDE) for axis in axes] for axes in parts]
    return {(i, j) for rows, columns in axes for i in rows[y] for j in columns[x]}


def picture(parts: list[tuple[Axis, Axis]]) -> str:
    """An SVG whose unit is a cell: a path for the keys of each row, a line for each edge of a cell."""
    width = len(QUERIES) * (SIDE + GAP) - GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * CELL}" height="{SIDE * CELL}" '
        f'viewBox="-0.1 -0.1 {width}.2 {SIDE}.2">'
    ]
    edges = "".join(f"M0 {i}h{SIDE}M{i} 0v{SIDE}" for i in range(SIDE + 1))
    for n, (y, x) in enumerate(QUERIES):
        lines.append(f'<g transform="translate({n * (SIDE + GAP)})">')
        for i, keys in groupby(sorted(seen(parts, y, x)), key=lambda key: key[0]):
            lines.append(f'<path fill="#4a90d9" d="{"".join(f"M{j} {i}h1v1h-1z" for _, j in keys)}"/>')
        lines.append(f'<path fill="#e8710a" d="M{x} {y}h1v1h-1z"/>')
        lines.append(f'<path stroke="#999" stroke-width="0.1" d="{edges}"/>')
        lines.append("</g>")
    return "\n".join([*lines, "</svg>\n"])


def pictures() -> dict[str, str]:
    """The name of each file, and what it holds."""
    return {f"pattern-{name}.svg": picture(parts) for name, parts in PATTERNS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    folder = parser.parse_args().out
    for name, content in pictures().items():
        (folder / name).write_text(content)
        print(folder / name)


if __name__ == "__main__":
    main()
