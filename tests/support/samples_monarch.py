"""The rows of the Monarch engine: products with Monarch matrices, long convolutions, gates of spectra."""

from __future__ import annotations

from typing import Any

from support.sample import Input, Sample, fraction, statistic


def monarch(
    id: str, first: tuple[int, int, int], second: tuple[int, int, int], *, b: int = 2, q: int = 67, tags: str = "",
    **arguments: Any,
) -> Sample:  # fmt: skip
    """``first`` and ``second`` are (blocks, outputs, inputs)."""
    sizes = (
        {"b": b, "q": q, "c": first[0] * first[2]}
        | dict(zip("fghlms", first + second, strict=True))
        | {"o": second[0] * second[1]}
    )
    data = {"x": Input("bqc"), "w1": Input("fgh"), "w2": Input("lms")}
    return Sample("blockdiag_butterfly_multiply", id, {**data, **arguments}, sizes, frozenset(tags.split()))


def long_conv(
    id: str, *, b: int = 2, c: int = 19, n: int = 131, m: str | int = "n", tags: str = "", **arguments: Any
) -> Sample:
    """``m`` taps: a number, the letter of the length, or X for both directions as far as ``x`` positions reach."""
    taps = {"m": m} if isinstance(m, int) else {}
    sizes = {"b": b, "c": c, **taps, **({"x": n, "p": 0} if m == "X" else {"n": n})}
    length = "x" if m == "X" else "n"
    data = {"x": Input(f"bc{length}"), "filter": Input(f"c{m if isinstance(m, str) else 'm'}", fraction)}
    if m == "X":
        data["is_causal"] = False
    return Sample("long_conv", id, {**data, **arguments}, sizes, frozenset(tags.split()))


def gating(
    id: str, *, b: int = 2, rows: int = 6, columns: int = 7, c: int = 19, tags: str = "", **arguments: Any
) -> Sample:
    """A map of ``y`` x ``x`` positions; its rows have ``X`` frequencies."""
    data = {"x": Input("byxc"), "weight": statistic("yXc2")}
    sizes = {"b": b, "y": rows, "x": columns, "c": c}
    return Sample("spectral_gating", id, {**data, **arguments}, sizes, frozenset(tags.split()))


MONARCH_SAMPLES = [
    monarch("plain", (4, 6, 5), (4, 9, 6), tags="core deploy"),
    monarch("more-blocks", (3, 8, 5), (6, 7, 4), tags="core"),
    monarch("16-blocks", (16, 12, 10), (16, 33, 12)),
    monarch("32-blocks", (8, 24, 17), (32, 3, 6), q=131),
    monarch("odd-blocks", (2, 10, 33), (5, 3, 4)),
    monarch("one-block", (1, 40, 7), (8, 20, 5)),
    monarch("of-one-each", (1, 1, 1), (1, 1, 1), b=1, q=1),
    monarch("wide", (2, 64, 300), (2, 70, 64), q=150),
    monarch("expanded", (4, 6, 5), (4, 9, 6), x=Input("b1c", expand="bqc")),
    monarch("shared-block", (4, 6, 5), (4, 9, 6), w2=Input("1ms", expand="lms")),
    monarch("bias", (4, 6, 5), (4, 9, 6), bias=statistic("o"), tags="core"),
    monarch("bias-odd", (2, 10, 33), (5, 3, 4), bias=statistic("o")),
    monarch("gelu", (4, 6, 5), (4, 9, 6), activation="gelu", tags="core"),
    monarch("gelu-bias", (4, 18, 5), (8, 23, 9), q=150, bias=statistic("o"), activation="gelu", tags="core deploy"),
    monarch("gelu-bias-wide", (2, 6, 5), (3, 130, 4), q=150, bias=statistic("o"), activation="gelu"),
    monarch("no-batch", (4, 6, 5), (4, 9, 6), b=0, bias=statistic("o"), activation="gelu", tags="core"),
    long_conv("plain", tags="core deploy"),
    long_conv("both-directions", m="X", tags="core"),
    long_conv("few-taps", m=3, n=200, tags="core"),
    long_conv("few-taps-in-both-directions", m=5, is_causal=False),
    long_conv("one-position", b=1, c=1, n=1),
    long_conv("one-position-in-both-directions", c=3, n=1, m="X"),
    *[long_conv(f"{c}-channels-of-{n}", c=c, n=n) for c, n in ((16, 128), (1, 129), (33, 256), (2, 300), (7, 513))],
    *[long_conv(f"{c}-channels-of-{n}-in-both-directions", c=c, n=n, m="X") for c, n in ((16, 384), (5, 769))],
    long_conv("long", b=1, c=3, n=5000),
    long_conv("very-long", b=1, c=1, n=20001, m="X"),
    long_conv("many-channels", b=3, c=800, n=40),
    long_conv("expanded", x=Input("1cn", expand="bcn")),
    long_conv("shared-filter", filter=Input("1n", fraction, expand="cn")),
    long_conv("no-batch", b=0, tags="core"),
    long_conv("no-channel", c=0),
    gating("plain", tags="core deploy"),
    gating("even-rows", rows=5, columns=10, tags="core"),
    gating("one-position", b=1, rows=1, columns=1, c=1),
    gating("one-row", rows=1, columns=18),
    gating("one-column", rows=20, columns=1, c=16),
    *[gating(f"{n}-squared", rows=n, columns=n, c=c) for n, c in ((7, 16), (8, 5), (14, 32))],
    gating("16-rows-of-30", rows=16, columns=30, c=3),
    *[gating(f"{y}-rows-of-{x}-by-primes", rows=y, columns=x, c=3) for y, x in ((11, 13), (22, 17), (3, 121))],
    gating("large", b=1, rows=56, columns=48, c=5),
    gating("many-channels", b=3, rows=4, columns=3, c=800),
    gating("expanded", x=Input("1yxc", expand="byxc")),
    gating("shared-weight", weight=statistic("1Xc2", expand="yXc2")),
    gating("no-batch", b=0, tags="core"),
    gating("no-channel", c=0),
]
