"""The stand-in CUDA runtime: what its warps, memory and tensor cores compute, and which mistakes it names."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from emulation import needs_emulator

pytestmark = needs_emulator

KERNELS = Path(__file__).parent / "emulator" / "kernels"
LANES = range(32)
SEEDS = range(10)
each_seed = pytest.mark.parametrize("seed", SEEDS[:3])


def random_words(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).int()


def unsigned(words):
    return [w & 0xFFFFFFFF for w in words]


def signed(word, bits=32):
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> bits - 1 else word


def run(emulator, name, *args, seed=0):
    assert emulator.run(name, *args, seed=seed) == 0
    assert emulator.errors() == []


@each_seed
def test_shuffles(emulator, seed):
    values, lanes = random_words(32), random_words(32, seed=1) & 31
    out = torch.zeros(8, 32, dtype=torch.int32)
    run(emulator, "shuffle", values, lanes, out, seed=seed)

    def segment(lane, width):
        return lane // width * width, lane // width * width + width - 1

    def up(lane, distance, width):
        return lane - distance if lane - distance >= segment(lane, width)[0] else lane

    def down(lane, distance, width):
        return lane + distance if lane + distance <= segment(lane, width)[1] else lane

    def xor(lane, distance, width):
        return lane ^ distance if lane ^ distance <= segment(lane, width)[1] else lane

    sources = [
        [lanes[i] for i in LANES],
        [segment(i, 8)[0] + lanes[i] % 8 for i in LANES],
        *([function(i, *args) for i in LANES] for function, *args in [
            (up, 3, 32), (up, 3, 16), (down, 5, 32), (down, 5, 8), (xor, 6, 32), (xor, 9, 8)
        ]),
    ]  # fmt: skip
    assert out.tolist() == [[values[s].item() for s in row] for row in sources]


@each_seed
@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x80000001, 0x0F0FF0F0])
def test_votes(emulator, mask, seed):
    values = random_words(32)
    out = torch.zeros(16, 32, dtype=torch.int32)
    run(emulator, "vote", values, mask, out, seed=seed)
    members = [i for i in LANES if mask >> i & 1]
    v = unsigned(values.tolist())

    def lanes_where(condition):
        return sum(1 << i for i in members if condition(i))

    same = len({v[i] & 8 for i in members}) == 1
    reduced = {"and": mask and 0xFFFFFFFF, "or": 0, "xor": 0}
    for i in members:
        reduced = {"and": reduced["and"] & v[i], "or": reduced["or"] | v[i], "xor": reduced["xor"] ^ v[i]}
    for i in members:
        expected = [
            lanes_where(lambda j: v[j] & 1),
            all(v[j] & 1 for j in members),
            any(v[j] & 1 for j in members),
            lanes_where(lambda j: v[j] & 7 == v[i] & 7),  # noqa: B023
            mask if same else 0,
            same,
            sum(v[j] for j in members),
            min(v[j] for j in members),
            max(signed(v[j]) for j in members),
            *reduced.values(),
            mask,
            i,
            (1 << i) - 1,
            0xFFFFFFFF ^ (1 << i) - 1,
        ]
        assert unsigned(out[:, i].tolist()) == unsigned(expected)


def collatz_steps(x):
    steps = 0
    while x != 1:
        x, steps = 3 * x + 1 if x % 2 else x // 2, steps + 1
    return steps


def fibonacci(x):
    return x if x < 2 else fibonacci(x - 1) + fibonacci(x - 2)


def nested_loops(v):
    total = 0
    for a in range(v % 11):
        for b in range(a + 1):
            if (a ^ b) % 5 == 2:
                continue
            if a * b > 40:
                break
            total += a * 10 + b
    return total


@each_seed
def test_control_flow(emulator, seed):
    values = torch.arange(1, 131, dtype=torch.int32)
    out = torch.zeros(5, len(values), dtype=torch.int32)
    run(emulator, "control", values, out, len(values), seed=seed)
    cases = [
        lambda v: v ^ 0x55, lambda v: v + 11, lambda v: v * v, lambda v: -v, lambda v: v << 3,
        lambda v: collatz_steps(v + 1), lambda v: v // 3, lambda v: ~v, lambda v: ~v,
    ]  # fmt: skip
    for i, v in enumerate(values.tolist()):
        expected = [
            v * 5 if v % 3 == 0 else v - 7,
            collatz_steps(v),
            fibonacci(v % 7),
            cases[v % 9](v),
            nested_loops(v),
        ]
        assert out[:, i].tolist() == expected


@each_seed
def test_memory(emulator, seed):
    threads = 96
    words = random_words(4 * threads)
    out = torch.zeros(4 * threads + 12 * threads, dtype=torch.int32)
    run(emulator, "memory", words, out, threads, seed=seed)
    copied, rows = out[: 4 * threads], out[4 * threads :].view(12, threads)
    assert torch.equal(copied, words)
    w = unsigned(words.tolist())
    memory = b"".join(word.to_bytes(4, "little") for word in w)
    bytes_of_words = [word & 0xFF for word in w[:threads]]
    odd = [word % 2 for word in w[:threads]]

    def read(i, size):
        return int.from_bytes(memory[i * size : (i + 1) * size], "little")

    reversed_bytes = bytearray(b"".join(word.to_bytes(4, "little") for word in w[:threads][::-1]))
    reversed_bytes[:threads] = bytes(bytes_of_words)
    for i in range(threads):
        expected = [
            w[2 * i + 1] + w[threads - 1 - i],
            read(i, 1),
            signed(read(i, 1), 8),
            read(i, 2),
            signed(read(i, 2), 16),
            [3, 1, 4, 1, 5, 9, 2, 6][w[i] % 8],
            w[(i + w[i] % 8) % threads],
            w[i],
            int.from_bytes(reversed_bytes[i // 4 * 4 : i // 4 * 4 + 4], "little"),
            w[i],
            sum(odd),
            all(odd) * 2 + any(odd),
        ]
        assert unsigned(rows[:, i].tolist()) == unsigned(expected)


@each_seed
def test_atomics(emulator, seed):
    words = random_words(200)
    out = torch.zeros(10, dtype=torch.int32)
    out[2:4] = -1
    counted = out.clone()
    run(emulator, "atomics", words, counted, 0, seed=seed)  # where the counter of all launches stands
    run(emulator, "atomics", words, out, len(words), seed=seed)
    w = unsigned(words.tolist())
    reduced = [0xFFFFFFFF, 0, 0]
    for word in w:
        reduced = [reduced[0] & word, reduced[1] | word, reduced[2] ^ word]
    floats = torch.tensor(float(sum(word % 1024 for word in w))).view(torch.int32).item()
    expected = [sum(w), max(w), min(w), *reduced, floats, sum(w), sum(w), counted[9].item() + len(w)]
    assert unsigned(out.tolist()) == unsigned(expected)


@pytest.mark.parametrize("valid", [0, 4, 12, 16])
def test_async_copies(emulator, valid):
    words = random_words(128)
    out = torch.full((352,), -1, dtype=torch.int32)
    run(emulator, "async_copy", words, out, valid)
    filled = torch.where(torch.arange(128) % 4 < valid // 4, words, 0)
    assert torch.equal(out, torch.cat([words[:32], words[:64], words, filled]))


# --- Tensor cores: the fragments of the PTX manual, section "Matrix Fragments for mma". g: group, t: thread in group.

PAIRS = (torch.bfloat16, torch.float16)


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
    run(emulator, "mma", kind, *operands, out)
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
    run(emulator, "mma", kind, *operands, out)
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
    run(emulator, "ldmatrix", count, transposed, data.view(torch.int32), 128, (order * 16).int(), out)
    for lane in LANES:
        row, column = lane // 4, lane % 4 * 2
        for i, matrix in enumerate(matrices[:count]):
            read = matrix.T if transposed else matrix
            assert out[lane, i : i + 1].view(torch.int16).tolist() == read[row, column : column + 2].tolist()


# --- Mistakes

FAULTS = {
    "read_beyond": "out_of_bounds",
    "write_before": "out_of_bounds",
    "vector_across_end": "out_of_bounds",
    "null_pointer": "out_of_bounds",
    "shared_beyond": "out_of_bounds",
    "misaligned_load": "misaligned",
    "uninitialised_global": "uninitialised",
    "uninitialised_shared": "uninitialised",
    "copy_without_wait": "uninitialised",
    "race_of_writes": "race",
    "race_of_read_and_write": "race",
    "barrier_in_branch": "divergent_barrier",
    "barriers_that_differ": "deadlock",
    "unknown_instruction": "unknown_instruction",
    "write_then_read": "race",
}
NUM_WORDS = 65


def fault(emulator, name, seed=0):
    source = (KERNELS / "faults.cu").read_text()
    kernels = re.findall(r"\w+", re.search(r"kKernels\[\] = \{(.+?)\};", source, re.DOTALL)[1])
    with emulator.fresh_allocations():
        data = torch.empty(NUM_WORDS, dtype=torch.int32)
        data[:-1] = torch.arange(NUM_WORDS - 1)
        emulator.run("fault", kernels.index(name), data, NUM_WORDS, seed=seed)
    return data


def lines_of(name):
    lines = (KERNELS / "faults.cu").read_text().splitlines()
    return [number for number, line in enumerate(lines, 1) if line.endswith(f"// {name}")]


@each_seed
@pytest.mark.parametrize("name", FAULTS)
def test_mistakes_are_named(emulator, name, seed):
    """The kind, the kernel, our source line and the instruction, whatever the order of the warps."""
    fault(emulator, name, seed)
    assert emulator.errors(), "nothing was noticed"
    error = emulator.errors()[0]
    assert error.kind == FAULTS[name], error.message
    assert error.kernel.endswith(name)
    assert Path(error.file).name == "faults.cu" and error.line in lines_of(name), f"{error.file}:{error.line}"
    assert error.instruction
    for part in (error.kind.replace("_", " ").split()[0], name, "faults.cu"):
        assert part in str(error) or part in error.message


@pytest.mark.parametrize("seed", SEEDS)
def test_no_mistake_is_none(emulator, seed):
    data = fault(emulator, "no_mistake", seed)
    assert emulator.errors() == []
    n = NUM_WORDS
    assert data.tolist()[:-1] == [2 * (63 - i) + (n if i < 32 else 0) for i in range(64)]


def test_order_of_warps_comes_from_the_seed(emulator):
    """With a race, results differ between seeds, and are the same for the same one."""
    results = [tuple(fault(emulator, "race_of_writes", seed).tolist()[:-1]) for seed in [*SEEDS, *SEEDS]]
    assert results[:10] == results[10:]
    assert len(set(results)) > 1


# A launch: grid, block, bytes of dynamic shared memory, bytes allowed by the function's attribute; the CUDA error.
LAUNCHES = {
    "fits": ((1, 64, 48 * 1024, 0), 0),
    "no-block": ((0, 64, 256, 0), 9),  # cudaErrorInvalidConfiguration
    "no-thread": ((1, 0, 256, 0), 9),
    "threads": ((1, 1025, 48 * 1024, 0), 9),
    "shared": ((1, 64, 48 * 1024 + 1, 0), 1),  # cudaErrorInvalidValue
    "shared-allowed": ((1, 64, 99 * 1024, 99 * 1024), 0),
    "shared-beyond-allowed": ((1, 64, 99 * 1024 + 1, 99 * 1024), 1),
    "allowed-beyond-device": ((1, 64, 256, 1 << 20), 1),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launch_errors(emulator, name):
    (grid, block, shared, allowed), error = LAUNCHES[name]
    data = torch.zeros(64, dtype=torch.int32)
    assert emulator.run("launch", grid, block, shared, allowed, data, 7) == error
    assert {error.kind for error in emulator.errors()} == ({"launch"} if error else set())
    assert data.tolist() == [0 if error else 7] * 64


# --- The matrix product on CuTe, and its mutants


def matmul(emulator, m, n, k, mistake="kNone", seed=0):
    """The result and the exact one."""
    source = (KERNELS / "matmul.cu").read_text()
    mistakes = re.findall(r"^  (k\w+),", source, re.MULTILINE)
    generator = torch.Generator().manual_seed(m * n * k)
    with emulator.fresh_allocations():
        a, b = (torch.randn(rows, k, generator=generator).bfloat16() for rows in (m, n))
        c = torch.empty(m, n)
        assert emulator.run("matmul", a, b, c, m, n, k, mistakes.index(mistake), seed=seed) == 0
    return c, a.double() @ b.double().T


@pytest.mark.parametrize("seed", SEEDS)
def test_matmul(emulator, seed):
    c, exact = matmul(emulator, 128, 64, 192, seed=seed)
    assert emulator.errors() == []
    torch.testing.assert_close(c.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("m,n,k", [(64, 64, 64), (1, 1, 8), (70, 50, 72), (65, 129, 200)])
def test_matmul_of_odd_sizes(emulator, m, n, k):
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


@each_seed
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
    assert counters.read.distinct == 2 * (m + n) * k
    assert counters.read.total == 2 * 64 * 2 * k * blocks
    assert counters.written.distinct == 4 * m * n
    assert all(site.conflicts == 0 for site in counters.conflicts.values())
