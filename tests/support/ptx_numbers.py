"""PTX's floating-point numbers in exact rational arithmetic: decoding, operations and every rounding mode.

A number is a ``Fraction`` other than zero, or one of the floats 0.0, -0.0, inf, -inf and nan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

Number = Fraction | float


@dataclass(frozen=True)
class Format:
    bits: int
    precision: int  # the leading bit included
    largest_exponent: int

    @property
    def smallest_exponent(self) -> int:
        return 1 - self.largest_exponent

    def decode(self, word: int) -> Number:
        fraction_bits = self.precision - 1
        sign = -1 if word >> (self.bits - 1) & 1 else 1
        exponent = word >> fraction_bits & ((1 << self.bits - self.precision) - 1)
        fraction = word & ((1 << fraction_bits) - 1)
        if exponent == 2 * self.largest_exponent + 1:
            return math.nan if fraction else sign * math.inf
        significand = fraction + (1 << fraction_bits if exponent else 0)
        if significand == 0:
            return sign * 0.0
        return sign * significand * Fraction(2) ** (max(exponent, 1) - self.largest_exponent - fraction_bits)

    def encode(self, x: Number, rounding: str = "rn") -> int:
        """The bits of the number rounded as ``rounding`` says. For a NaN, any NaN's bits."""
        fraction_bits = self.precision - 1
        top = (2 * self.largest_exponent + 1) << fraction_bits
        if is_nan(x):
            return top | ((1 << fraction_bits) - 1)
        sign = int(negative(x)) << (self.bits - 1)
        if not isinstance(x, Fraction):
            return sign | (top if math.isinf(x) else 0)
        exponent = max(floor_log2(abs(x)), self.smallest_exponent)
        quantum = Fraction(2) ** (exponent - fraction_bits)
        significand = abs(round_to_integer(x / quantum, rounding))
        word = ((exponent - self.smallest_exponent) << fraction_bits) + significand  # carries into the exponent
        if word >= top:
            away = rounding in ("rn", "rna") or rounding == ("rm" if sign else "rp")
            word = top if away else top - 1
        return sign | word

    def is_subnormal(self, x: Number) -> bool:
        return isinstance(x, Fraction) and abs(x) < Fraction(2) ** self.smallest_exponent


FORMATS = {
    "f16": Format(16, 11, 15),
    "bf16": Format(16, 8, 127),
    "tf32": Format(19, 11, 127),
    "f32": Format(32, 24, 127),
    "f64": Format(64, 53, 1023),
}


def is_nan(x: Number) -> bool:
    return isinstance(x, float) and math.isnan(x)


def negative(x: Number) -> bool:
    return x < 0 if isinstance(x, Fraction) else math.copysign(1.0, x) < 0


def floor_log2(x: Fraction) -> int:
    estimate = x.numerator.bit_length() - x.denominator.bit_length()
    return estimate if Fraction(2) ** estimate <= x else estimate - 1


def round_to_integer(x: Fraction, rounding: str) -> int:
    match rounding:
        case "rn":
            return round(x)
        case "rna":
            return math.floor(abs(x) + Fraction(1, 2)) * (-1 if x < 0 else 1)
        case "rz":
            return math.trunc(x)
        case "rm":
            return math.floor(x)
        case "rp":
            return math.ceil(x)
    raise ValueError(rounding)


def negate(x: Number) -> Number:
    return -x


def add(x: Number, y: Number, rounding: str = "rn") -> Number:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x + y or (-0.0 if rounding == "rm" else 0.0)
    if isinstance(x, Fraction) or isinstance(y, Fraction):
        other, finite = (y, x) if isinstance(x, Fraction) else (x, y)
        return finite if other == 0 else other
    if x == 0 and y == 0 and negative(x) != negative(y):
        return -0.0 if rounding == "rm" else 0.0
    return x + y


def multiply(x: Number, y: Number) -> Number:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x * y
    return _stand_in(x) * _stand_in(y)


def divide(x: Number, y: Number) -> Number:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x / y
    if is_nan(x) or is_nan(y) or (x == 0 and y == 0) or abs(x) == abs(y) == math.inf:
        return math.nan
    sign = -1.0 if negative(x) != negative(y) else 1.0
    return sign * (math.inf if y == 0 or abs(x) == math.inf else 0.0)


def square_root(x: Number) -> Number:
    if is_nan(x) or x == 0 or x == math.inf:
        return x
    if negative(x):
        return math.nan
    scale = 1280  # more bits than any format keeps; the last one is sticky, for all bits that follow
    root = math.isqrt((x.numerator << 2 * scale) // x.denominator)
    if root * root * x.denominator == x.numerator << 2 * scale:
        return Fraction(root, 1 << scale)
    return Fraction(2 * root + 1, 2 << scale)


def _stand_in(x: Number) -> float:
    """A float with the sign of ``x``: next to a zero, an infinity or a NaN its size does not matter."""
    return math.copysign(1.0, x) if isinstance(x, Fraction) else x
