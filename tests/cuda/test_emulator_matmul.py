"""Tensor cores in the stand-in CUDA runtime, and a matrix product on the CUDA library's tiles with its mutants."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.emulation import KERNELS, LANES, needs_emulator

pytestmark = needs_emulator


# The fragments of the PTX manual, chapter "Matrix Fragments for mma". g: the group, t: the thread in it.
def fragments_k16(g, t):
    a = [(g + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)) for i in range(8)]
    b = [(2 * t + i % 2 + 8 * (i // 2), g) for i in range(4)]
    return a, b


def fragments_k8(g, t):
    return [(g + 8 * (i // 2), 2 * t + i % 2) for i in range(4)], [(2 * t + i, g) for i in range(2)]


def fragments_tf32_k8(g, t):
    return [(g + 8 * (i % 2), t + 4 * (i // 2)) for i in range(4)], [(t + 4 * i, g) for i in range(2)]


def fragments_tf32_k4(g, t):
    return [(g + 8 * i, t) for i in range(2)], [(t, g)]


def sums_fragment(g, t):
    return [(g + 8 * (i // 2), 2 * t + i % 2) for i in range(4)]


# In the order of kernels/tensor_core.cu: fragments, depth, operands' and sums' type.
MMA = [
    (fragments_k16, 16, torch.bfloat16, torch.float32),
    (fragments_k16, 16, torch.float16, torch.float32),
    (fragments_k16, 16, torch.float16, torch.float16),
    (fragments_k8, 8, torch.bfloat16, torch.float32),
    (fragments_k8, 8, torch.float16, torch.float32),
    (fragments_tf32_k8, 8, torch.float32, torch.float32),
    (fragments_tf32_k4, 4, torch.float32, torch.float32),
]


def packed(matrix, places):
    """The entries of ``matrix`` at each lane's places, as 32-bit words."""
    entries = torch.stack([torch.stack([matrix[at] for at in lane]) for lane in places])
    return entries.contiguous().view(torch.int32)


@pytest.mark.parametrize("kind", range(len(MMA)))
def test_mma(emulator, kind):
    """On small integers, whose sums are exact in every type and order."""
    fragments, depth, operand_type, sum_type = MMA[kind]
    generator = torch.Generator().manual_seed(kind)
    a, b, c = (torch.randint(-7, 8, s, generator=generator).float() for s in [(16, depth), (depth, 8), (16, 8)])
    places = [fragments(lane // 4, lane % 4) for lane in LANES]
    sums = [sums_fragment(lane // 4, lane % 4) for lane in LANES]
    out = torch.zeros_like(packed(c.to(sum_type), sums))
    operands = [
        packed(a.to(operand_type), [p[0] for p in places]),
        packed(b.to(operand_type), [p[1] for p in places]),
        packed(c.to(sum_type), sums),
    ]
    emulator.compute("mma", kind, *operands, out)
    assert torch.equal(out, packed((a @ b + c).to(sum_type), sums))


@pytest.mark.parametrize("kind", [k for k, row in enumerate(MMA) if row[3] == torch.float32])
def test_mma_rounds_little(emulator, kind):
    """On real numbers: products are exact, so that only the rounding of float32 sums is left."""
    fragments, depth, operand_type, _ = MMA[kind]
    generator = torch.Generator().manual_seed(kind)
    a, b, c = (torch.randn(s, generator=generator) for s in [(16, depth), (depth, 8), (16, 8)])
    if operand_type == torch.float32:  # what TF32 drops is not there
        a, b = (m.half().float() for m in (a, b))
    a, b = a.to(operand_type), b.to(operand_type)
    places = [fragments(lane // 4, lane % 4) for lane in LANES]
    sums = [sums_fragment(lane // 4, lane % 4) for lane in LANES]
    operands = [packed(a, [p[0] for p in places]), packed(b, [p[1] for p in places]), packed(c, sums)]
    out = torch.zeros_like(operands[2])
    emulator.compute("mma", kind, *operands, out)
    exact = packed((a.double() @ b.double() + c.double()).float(), sums).view(torch.float32)
    torch.testing.assert_close(out.view(torch.float32), exact, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(emulator, count, transposed):
    matrices = torch.arange(4 * 64, dtype=torch.int16).view(4, 8, 8) + 1000
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))  # where in the data each row lies
    data = torch.empty(32, 8, dtype=torch.int16)
    data[order] = matrices.view(32, 8)
    out = torch.zeros(32, count, dtype=torch.int32)
    emulator.compute("ldmatrix", count, transposed, data.view(torch.int32), 128, (order * 16).int(), out)
    for lane in LANES:
        row, column = lane // 4, lane % 4 * 2
        for i, matrix in enumerate(matrices[:count]):
            read = matrix.T if transposed else matrix
            assert out[lane, i : i + 1].view(torch.int16).tolist() == read[row, column : column + 2].tolist()


def matmul(emulator, m, n, k, mistake="kNone", seed=0):
    """The result and the exact one."""
    source = (KERNELS / "matmul.cu").read_text()
    mistakes = re.findall(r"^  (k\w+),", source, re.MULTILINE)
    generator = torch.Generator().manual_seed(m * n * k)
    with emulator.fresh_allocations():
        a, b = (torch.randn(rows, k, generator=generator).bfloat16() for rows in (m, n))
        c = torch.empty(m, n)
        emulator.run("matmul", a, b, c, m, n, k, mistakes.index(mistake), seed=seed)
    return c, a.double() @ b.double().T


@pytest.mark.parametrize("seed", range(10))
def test_matmul(emulator, seed):
    c, exact = matmul(emulator, 128, 64, 192, seed=seed)
    assert emulator.errors() == []
    torch.testing.assert_close(c.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("m,n,k", [(64, 64, 64), (1, 1, 8), (70, 50, 72), (65, 129, 200), (256, 256, 256)])
def test_matmul_of_any_size(emulator, m, n, k):
    c, exact = matmul(emulator, m, n, k)
    assert emulator.errors() == []
    torch.testing.assert_close(c.double(), exact, rtol=1e-5, atol=1e-4)


# The kinds of error that may come first: the order of the warps decides where a missing barrier shows.
MUTANTS = {
    "kNoBarrier": {"race", "uninitialised"},
    "kNoSecondBarrier": {"race"},
    "kNoWait": {"uninitialised"},
    "kRowTooMany": {"out_of_bounds"},
    "kCopiedByHalf": {"uninitialised"},
    "kDivergentBarrier": {"divergent_barrier"},
    "kStoreUnchecked": {"out_of_bounds"},
    "kMisaligned": {"misaligned"},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mistake", MUTANTS)
def test_mutants_are_caught(emulator, mistake, seed):
    matmul(emulator, 72, 56, 200, mistake, seed)
    assert emulator.errors(), "the mutant survived"
    error = emulator.errors()[0]
    assert error.kind in MUTANTS[mistake], error.message
    assert error.kernel.endswith("matmul")
    assert Path(error.file).name in ("matmul.cu", "mma.h", "copy.h"), "the line is not one of ours"


def test_counters(emulator):
    """What the tiles need, and no more: each operand is read once per block, and no access meets a bank conflict."""
    m, n, k = 128, 192, 256
    matmul(emulator, m, n, k)
    (counters,) = emulator.counters().values()
    blocks, steps = (m // 64) * (n // 64), k // 64
    by_kind = Counter()
    for name, count in counters.instructions.items():
        by_kind[name.split(".")[0]] += count
    warps = blocks * 4
    assert by_kind["mma"] == warps * steps * 32  # 16 x 64 x 64 a warp, of 16 x 8 x 16
    assert by_kind["ldmatrix"] == warps * steps * (4 + 16)
    assert by_kind["cp"] >= warps * steps * 2 * 4
    assert (counters.read.distinct, counters.read.total) == (2 * (m + n) * k, 2 * 64 * 2 * k * blocks)
    assert (counters.written.distinct, counters.written.total) == (4 * m * n, 2 * 4 * m * n)  # two stores to a sector
    sites = counters.conflicts.values()
    assert sites and not [site for site in sites if site.conflicts]
