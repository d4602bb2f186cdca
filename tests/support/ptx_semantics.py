"""What PTX instructions compute, from the descriptions in the PTX ISA manual. Words in, words out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

from support.ptx_numbers import (
    FORMATS,
    Number,
    add,
    divide,
    is_nan,
    multiply,
    negate,
    negative,
    round_to_integer,
    square_root,
)

ROUNDINGS = ("rn", "rz", "rm", "rp", "rna")
MODIFIERS = {"ftz", "sat", "relu", "NaN", "approx", "full", "lo", "hi", "wide", "wrap", "clamp", "l", "r"}
FLOATS = tuple(FORMATS)


class Undefined(Exception):
    """The manual leaves the result open."""


def width(type: str) -> int:
    return int(re.search(r"\d+", type)[0]) * (2 if type.endswith("x2") else 1)


def signed(word: int, bits: int) -> int:
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


def integer(word: int, type: str) -> int:
    return signed(word, width(type)) if type.startswith("s") else word & ((1 << width(type)) - 1)


def limits(type: str) -> tuple[int, int]:
    bits = width(type)
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if type.startswith("s") else (0, (1 << bits) - 1)


def clamp(value: int, type: str) -> int:
    low, high = limits(type)
    return min(max(value, low), high)


class Instruction:
    """``name`` split into the operation, its types and its modifiers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.op, *parts = name.split(".")
        self.types = [p for p in parts if re.fullmatch(r"(s|u|b|f|bf|tf)\d+(x2)?", p)]
        self.modifiers = {p for p in parts if p not in self.types}
        self.type = self.types[0]
        self.rounding = next((r for r in ROUNDINGS if r in self.modifiers), "rn")
        self.ftz = "ftz" in self.modifiers

    def __call__(self, *words: int) -> int:
        if self.op == "cvt":
            return convert(self, *words)
        if self.op == "setp":
            return compare(self, *words)
        if self.type.endswith("x2"):
            half = Instruction(self.name.replace("x2", ""))
            low, high = (half(*(w >> shift & 0xFFFF for w in words)) for shift in (0, 16))
            return high << 16 | low
        if self.type in FLOATS:
            return float_operation(self, *words)
        return integer_operation(self, *words)

    def decode(self, word: int, type: str | None = None) -> Number:
        format = FORMATS[type or self.type]
        x = format.decode(word & (1 << format.bits) - 1)
        return math.copysign(0.0, -negative(x)) if self.ftz and format.is_subnormal(x) else x

    def encode(self, x: Number, type: str | None = None) -> int:
        format = FORMATS[type or self.type]
        if "sat" in self.modifiers:
            x = 0.0 if is_nan(x) or negative(x) else x if x <= 1 else Fraction(1)
        if "relu" in self.modifiers and negative(x) and not is_nan(x):
            if x == 0:
                raise Undefined  # the manual says no word of -0
            x = 0.0
        word = format.encode(x, self.rounding)
        if self.ftz and format.is_subnormal(format.decode(word)):
            word &= 1 << (format.bits - 1)
        return word


SIGN_ONLY: dict[str, Callable[[int, int], int]] = {"abs": lambda w, sign: w & ~sign, "neg": lambda w, sign: w ^ sign}


def float_operation(i: Instruction, *words: int) -> int:
    format = FORMATS[i.type]
    sign = 1 << (format.bits - 1)
    words = tuple(w & (2 * sign - 1) for w in words)
    if i.op in SIGN_ONLY:
        return SIGN_ONLY[i.op](words[0], sign)
    if i.op == "copysign":
        return (words[0] & sign) | (words[1] & ~sign)
    x, *rest = (i.decode(w) for w in words)
    if i.modifiers & {"approx", "full"}:
        raise Undefined
    match i.op:
        case "add":
            return i.encode(add(x, rest[0], i.rounding))
        case "sub":
            return i.encode(add(x, negate(rest[0]), i.rounding))
        case "mul":
            return i.encode(multiply(x, rest[0]))
        case "fma":
            return i.encode(add(multiply(x, rest[0]), rest[1], i.rounding))
        case "div":
            return i.encode(divide(x, rest[0]))
        case "rcp":
            return i.encode(divide(Fraction(1), x))
        case "sqrt":
            return i.encode(square_root(x))
        case "min" | "max":
            y = rest[0]
            if is_nan(x) or is_nan(y):
                return i.encode(math.nan if "NaN" in i.modifiers else y if is_nan(x) else x)
            smaller = min(x, y, key=lambda v: (v, not negative(v)))
            larger = max(x, y, key=lambda v: (v, not negative(v)))
            return i.encode(smaller if i.op == "min" else larger)
    raise NotImplementedError(i.name)


def compare(i: Instruction, a: int, b: int) -> int:
    relation = i.name.split(".")[1]
    if i.type not in FLOATS:
        x, y = integer(a, i.type), integer(b, i.type)
        relation = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(relation, relation)
    else:
        x, y = i.decode(a), i.decode(b)
        if is_nan(x) or is_nan(y):
            return int(relation == "nan" or relation.endswith("u"))
        if relation in ("num", "nan"):
            return int(relation == "num")
        relation = relation.removesuffix("u")
    return int({"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}[relation])


def convert(i: Instruction, *words: int) -> int:
    to, source = i.types
    if to.endswith("x2"):  # two numbers: the first becomes the upper half
        high, low = (i.encode(i.decode(w, source), to.removesuffix("x2")) for w in words)
        return high << 16 | low
    rounding = next((m.removesuffix("i") for m in i.modifiers if re.fullmatch(r"r[nzmp]i", m)), None)
    if source not in FLOATS:
        value = integer(words[0], source)
        if to in FLOATS:
            return i.encode(Fraction(value) if value else 0.0, to)
        return (clamp(value, to) if "sat" in i.modifiers else integer(value, to)) & (1 << max(width(to), 16)) - 1
    x = i.decode(words[0], source)
    if to in FLOATS:
        if rounding and isinstance(x, Fraction):
            x = Fraction(round_to_integer(x, rounding)) or math.copysign(0.0, x)
        word = i.encode(x, to)
        return word << 13 if to == "tf32" else word
    if is_nan(x):
        return 0 if source != "f64" and width(to) < 64 else 1 << (width(to) - 1)
    if not isinstance(x, Fraction):
        value = 0 if x == 0 else limits(to)[x > 0]
    else:
        value = clamp(round_to_integer(x, rounding), to)
    return value & (1 << max(width(to), 16)) - 1


def shift(i: Instruction, a: int, amount: int) -> int:
    amount = min(amount & 0xFFFFFFFF, width(i.type))
    return integer(a, i.type) << amount if i.op == "shl" else integer(a, i.type) >> amount


def extract(i: Instruction, a: int, position: int, length: int) -> int:
    bits, position, length = width(i.type), position & 0xFF, length & 0xFF
    top = min(position + length - 1, bits - 1)
    sign = a >> top & 1 if i.type.startswith("s") and length else 0
    return sum((a >> position + n & 1 if n < length and position + n < bits else sign) << n for n in range(bits))


def permute(a: int, b: int, selector: int) -> int:
    source = (b & 0xFFFFFFFF) << 32 | a & 0xFFFFFFFF
    result = 0
    for n in range(4):
        choice = selector >> 4 * n & 0xF
        byte = source >> 8 * (choice & 7) & 0xFF
        result |= (0xFF * (byte >> 7) if choice & 8 else byte) << 8 * n
    return result


def funnel(i: Instruction, low: int, high: int, amount: int) -> int:
    amount = min(amount & 0xFFFFFFFF, 32) if "clamp" in i.modifiers else amount & 31
    both = (high & 0xFFFFFFFF) << 32 | low & 0xFFFFFFFF
    return both << amount >> 32 if "l" in i.modifiers else both >> amount


def dot_of_bytes(i: Instruction, a: int, b: int, c: int) -> int:
    a_type, b_type = (t.replace("32", "8") for t in i.types)
    return integer(c, i.type) + sum(integer(a >> n, a_type) * integer(b >> n, b_type) for n in (0, 8, 16, 24))


def quotient(i: Instruction, x: int, y: int) -> int:
    if y == 0 or (y == -1 and x == limits(i.type)[0]):
        raise Undefined
    q = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
    return q if i.op == "div" else x - q * y


def product(i: Instruction, x: int, y: int) -> int:
    return x * y >> width(i.type) if "hi" in i.modifiers else x * y


def highest_bit(i: Instruction, x: int) -> int:
    return (~x if x < 0 else x).bit_length() - 1 & 0xFFFFFFFF


OPERATIONS: dict[str, Callable[..., int]] = {
    "add": lambda i, x, y: x + y,
    "sub": lambda i, x, y: x - y,
    "mul": product,
    "mad": lambda i, x, y, z: product(i, x, y) + z,
    "div": quotient,
    "rem": quotient,
    "min": lambda i, x, y: min(x, y),
    "max": lambda i, x, y: max(x, y),
    "and": lambda i, x, y: x & y,
    "or": lambda i, x, y: x | y,
    "xor": lambda i, x, y: x ^ y,
    "not": lambda i, x: ~x,
    "cnot": lambda i, x: int(x == 0),
    "abs": lambda i, x: abs(x),
    "neg": lambda i, x: -x,
    "popc": lambda i, x: x.bit_count(),
    "clz": lambda i, x: width(i.type) - x.bit_length(),
    "brev": lambda i, x: int(f"{x:0{width(i.type)}b}"[::-1], 2),
    "bfind": highest_bit,
    "sad": lambda i, x, y, z: abs(x - y) + z,
}
ON_WORDS: dict[str, Callable[..., int]] = {
    "shl": shift,
    "shr": shift,
    "bfe": extract,
    "shf": funnel,
    "prmt": lambda i, *words: permute(*words),
    "dp4a": dot_of_bytes,
}


def integer_operation(i: Instruction, *words: int) -> int:
    if i.op in ON_WORDS:
        return ON_WORDS[i.op](i, *words)
    operands = [integer(w, i.type) for w in words]
    if "wide" in i.modifiers and len(words) == 3:
        operands[2] = words[2]
    return OPERATIONS[i.op](i, *operands)


def word32(w: int) -> int:
    return w & 0xFFFFFFFF


def table_of_three(a: int, b: int, c: int, table: int) -> int:
    """Each bit of the result is the bit of ``table`` whose index is made of the bits of a, b and c."""
    return sum((table >> ((a >> n & 1) << 2 | (b >> n & 1) << 1 | c >> n & 1) & 1) << n for n in range(32))


def insert(a: int, b: int, position: int, length: int) -> int:
    mask = ((1 << length) - 1) << (position & 0xFF)
    return word32(b & ~mask | a << (position & 0xFF) & mask)


def predicates(a: int, b: int, c: int) -> int:
    greater, less = word32(a) > word32(b), signed(a, 32) < signed(c, 32)
    either = greater != less
    return 1 if (either and not less) or either else 6


def holds(name: str, a: int, b: int) -> bool:
    return bool(Instruction(name)(a, b))


# Operations that take more than one instruction to test, by their names in kernels/arithmetic.cu: on 64-bit words.
SEVERAL: dict[str, Callable[[int, int, int], int]] = {
    "lop3.b32": lambda a, b, c: table_of_three(a, b, c, 0x6A),
    "bfi.b32": lambda a, b, c: insert(a, b, c, 11),
    "slct.u32.s32": lambda a, b, c: word32(a if signed(c, 32) >= 0 else b),
    "testp.finite.f32": lambda a, b, c: math.isfinite(FORMATS["f32"].decode(word32(a))),
    "testp.subnormal.f32": lambda a, b, c: FORMATS["f32"].is_subnormal(FORMATS["f32"].decode(word32(a))),
    "selp.b32": lambda a, b, c: word32(b if word32(a) < word32(b) else c),
    "setp.lt.and.s32": lambda a, b, c: holds("setp.lt.s32", a, b) and holds("setp.ge.s32", b, c),
    "setp.lt.or.f32": lambda a, b, c: holds("setp.lt.f32", a, b) or not holds("setp.ge.f32", b, c),
    "setp.gt.u32.both": lambda a, b, c: 1 if word32(a) > word32(b) else 2,
    "pred": predicates,
    "add.cc": lambda a, b, c: a + b,
    "sub.cc": lambda a, b, c: a - b,
    "mov.b64.halves": lambda a, b, c: word32(a) << 32 | a >> 32,
    "mov.b32.halves": lambda a, b, c: (a & 0xFFFF) << 16 | a >> 16 & 0xFFFF,
}
