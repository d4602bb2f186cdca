"""The stand-in runtime's arithmetic, instruction by instruction, against the PTX manual's definitions in Python."""

import math
import random
import re
from fractions import Fraction

import pytest
import torch
from support.emulation import DIRECTORY, KERNELS, needs_emulator
from support.ptx_numbers import FORMATS, is_nan
from support.ptx_semantics import SEVERAL, Instruction, Undefined, width

pytestmark = needs_emulator

TABLE = re.findall(
    r'^  (ROW\d|COMPARE|SEVERAL\d*)\("([^"]+)",\s+([^;]+)', (KERNELS / "arithmetic.cu").read_text(), re.MULTILINE
)
ROWS = {
    name: [64] * 4 if kind.startswith("SEVERAL") else list(map(int, re.findall(r"\d+", bits)))
    for kind, name, bits in TABLE
}
assert len(ROWS) == len(TABLE), "an instruction twice"

# By instruction: the exact function, the largest relative and absolute error that the manual allows.
APPROXIMATE = {
    "ex2.approx": (lambda x: 2.0**x, 2**-22, 0),
    "lg2.approx": (math.log2, 2**-22, 2**-22),
    "rcp.approx": (lambda x: 1 / x, 2**-23, 0),
    "rcp.approx.ftz.f64": (lambda x: 1 / x, 2**-19, 0),  # of the upper words
    "rsqrt.approx": (lambda x: x**-0.5, 2**-22.9, 0),
    "sqrt.approx": (math.sqrt, 2**-23, 0),
    "sin.approx": (math.sin, 0, 2**-20.5),
    "cos.approx": (math.cos, 0, 2**-20.5),
    "tanh.approx": (math.tanh, 2**-10.9, 0),
    "div.approx": (lambda x, y: x / y, 2**-22, 0),
    "div.full": (lambda x, y: x / y, 2**-22, 0),
}


def words():
    """Hostile integers, and numbers of every format: limits, ties, infinities, NaN, subnormals, random bits."""
    generator = random.Random(0)
    found = [
        0,
        1,
        2,
        3,
        7,
        8,
        31,
        32,
        33,
        63,
        64,
        255,
        0x5410,
        0x7FFFFFFF,
        0x80000000,
        0xFFFFFFFF,
        1 << 63,
        (1 << 64) - 1,
    ]
    for name in ("f16", "bf16", "f32", "f64"):
        format = FORMATS[name]
        values = (0.5, 1, -1, 1.5, 2.5, -3.5, 0.1, 3, -17.75, 300, 1e4, 7e4, 3e9, -1e10, 1e19, 1e-5, 1e-40)
        found += [format.encode(Fraction(v)) for v in values]
        top = format.encode(math.inf)
        found += [top, top | 1 << format.bits - 1, format.encode(math.nan), top - 1, 1, 1 << format.bits - 1]
        if format.bits == 16:  # pairs for the packed types
            found += [generator.getrandbits(32) for _ in range(8)]
    found += [generator.getrandbits(bits) for bits in (8, 16, 32, 64) for _ in range(6)]
    found += [FORMATS[name].encode(Fraction(generator.uniform(-8, 8))) for name in ("f32", "f64") for _ in range(24)]
    return found


@pytest.fixture(scope="module")
def results(emulator):
    """The inputs, and by instruction the result on each."""
    xs = words()
    generator = random.Random(1)
    ys, zs = (generator.sample(xs, len(xs)) for _ in range(2))
    ys[::5] = xs[::5]
    columns = [torch.tensor([w - (w >> 63 << 64) for w in column]) for column in (xs, ys, zs)]
    out = torch.full((len(ROWS), len(xs)), -1)
    emulator.compute("arithmetic", *columns, out, len(xs))
    found = [[w & (1 << 64) - 1 for w in row] for row in out.tolist()]
    return list(zip(xs, ys, zs, strict=True)), dict(zip(ROWS, found, strict=True))


@pytest.mark.parametrize("name", ROWS)
def test_instruction(name, results):
    inputs, found = results
    instruction = SEVERAL.get(name) or Instruction(name)
    to, *operands = ROWS[name] if len(ROWS[name]) > 1 else [1, ROWS[name][0], ROWS[name][0]]
    defined = 0
    for triple, word in zip(inputs, found[name], strict=True):
        args = [w & (1 << bits) - 1 for w, bits in zip(triple, operands, strict=False)]
        shown = f"{name} of {[hex(a) for a in args]} is {word:#x}"
        try:
            expected = instruction(*args) & (1 << to) - 1
        except Undefined:
            defined += check_approximation(instruction, args, word, shown)
            continue
        defined += 1
        if name == "cvt.rna.tf32.f32":
            word &= ~0x1FFF
        assert word == expected or both_nan(instruction, word, expected), f"{shown}, expected {expected:#x}"
    assert defined > 20, "hardly a result was compared"


def both_nan(instruction, word, expected):
    """A NaN may be any: in every number that the word holds."""
    if not isinstance(instruction, Instruction) or instruction.op == "setp":
        return False
    type = instruction.types[0].removesuffix("x2")
    if type not in FORMATS or type == "tf32":
        return False
    bits = FORMATS[type].bits
    parts = range(0, width(instruction.types[0]), bits)
    numbers = [[w >> part & (1 << bits) - 1 for part in parts] for w in (word, expected)]
    return all(a == b or all(is_nan(FORMATS[type].decode(n)) for n in (a, b)) for a, b in zip(*numbers, strict=True))


def check_approximation(instruction, args, word, shown):
    """Whether the manual bounds the error here; the result is then within it."""
    name = instruction.name if instruction.name in APPROXIMATE else ".".join(instruction.name.split(".")[:2])
    if name not in APPROXIMATE:
        return False
    function, relative, absolute = APPROXIMATE[name]
    numbers = [float(instruction.decode(a)) for a in args]
    periodic = instruction.op in ("sin", "cos")
    if any(math.isnan(x) or math.isinf(x) or not 2**-100 < abs(x) < 2**100 for x in numbers) or (
        periodic and abs(numbers[0]) > 2 * math.pi
    ):
        return False
    try:
        exact = function(*numbers)
    except (OverflowError, ValueError):
        return False
    if isinstance(exact, complex) or not 2**-120 < abs(exact) < 2**120:
        return False
    found = float(FORMATS[instruction.type].decode(word))
    assert abs(found - exact) <= relative * abs(exact) + absolute, f"{shown}: {found}, expected {exact}"
    return True


MOVES = ("ld", "st", "mov", "selp")


def instructions_in(library):
    """The PTX instructions of a library; modifiers in any order, and a move is the same for every type and width."""
    text = b"\n".join(re.findall(rb"\.version [^\0]+", (DIRECTORY / library).read_bytes())).decode()
    names = re.findall(
        r"^\s*(?:[{]\s*)?(?:@!?%?\w+\s+)?([a-z][a-z0-9]*(?:[.:][\w:]+)+)\s", re.sub(";", "\n", text), re.M
    )
    found = set()
    for name in names:
        op, *modifiers = name.split(".")
        if op in MOVES:
            modifiers = [m for m in modifiers if not re.fullmatch(r"v[24]|[bfsu]\d+", m)]
        found.add((op, *sorted(modifiers)))
    return found


def test_the_library_uses_instructions_that_are_tested():
    used = instructions_in("libvitkernels_cuda_emulated.so")
    assert len(used) > 50
    assert used <= instructions_in("libemulator_kernels.so")
