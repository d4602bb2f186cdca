"""The stand-in CUDA runtime: what its warps and its memory do, what it counts, and which mistakes it names."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.emulation import KERNELS, LANES, needs_emulator

pytestmark = needs_emulator

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


@each_seed
def test_shuffles(emulator, seed):
    values, lanes = random_words(32), random_words(32, seed=1) & 31
    out = torch.zeros(8, 32, dtype=torch.int32)
    emulator.compute("shuffle", values, lanes, out, seed=seed)

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
    emulator.compute("vote", values, mask, out, seed=seed)
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
    emulator.compute("control", values, out, len(values), seed=seed)
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
    out = torch.zeros(4 * threads + 13 * threads, dtype=torch.int32)
    emulator.compute("memory", words, out, threads, seed=seed)
    copied, rows = out[: 4 * threads], out[4 * threads :].view(13, threads)
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
            w[i] & 0xFFFF,
        ]
        assert unsigned(rows[:, i].tolist()) == unsigned(expected)


@each_seed
def test_atomics(emulator, seed):
    words = random_words(200)
    out = torch.zeros(10, dtype=torch.int32)
    out[2:4] = -1
    counted = out.clone()
    emulator.compute("atomics", words, counted, 0, seed=seed)  # where the counter of all launches stands
    emulator.compute("atomics", words, out, len(words), seed=seed)
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
    emulator.compute("async_copy", words, out, valid)
    filled = torch.where(torch.arange(128) % 4 < valid // 4, words, 0)
    assert torch.equal(out, torch.cat([words[:32], words[:64], words, filled]))


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
    "barriers_that_differ": "divergent_barrier",
    "spin": "deadlock",
    "unknown_instruction": "unknown_instruction",
    "write_then_read": "uninitialised",
}
NUM_WORDS = 65


def fault(emulator, name, seed=0):
    source = (KERNELS / "faults.cu").read_text()
    kernels = re.findall(r"\w+", re.search(r"kKernels\[\] = \{(.+?)\};", source, re.DOTALL)[1])
    with emulator.fresh_allocations():
        data = torch.empty(NUM_WORDS, dtype=torch.int32)
        data[:-1] = torch.arange(NUM_WORDS - 1)
        emulator.run("fault", kernels.index(name), data, NUM_WORDS, seed=seed, instruction_limit=10000)
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
    def order(seed):
        tickets = torch.zeros(9, dtype=torch.int32)
        emulator.compute("tickets", tickets, 8, seed=seed)
        assert sorted(tickets[1:].tolist()) == list(range(8))
        return tuple(tickets.tolist())

    orders = [order(seed) for seed in SEEDS]
    assert orders == [order(seed) for seed in SEEDS]
    assert len(set(orders)) > 5


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


@pytest.mark.parametrize("stride", [0, 1, 2, 3, 4, 8, 16, 32, 33])
def test_counters_of_strided_reads(emulator, stride):
    """Sectors of 32 bytes in global memory; in shared memory, words of the same bank take turns."""
    words = random_words(32 * 33)
    out = torch.zeros(32, dtype=torch.int32)
    emulator.compute("strided", words, out, stride)
    assert out.tolist() == [words[i * stride].item() + i * stride for i in LANES]
    (counters,) = emulator.counters().values()
    sectors = {(words.data_ptr() + 4 * i * stride) // 32 for i in LANES}
    assert counters.read.distinct == counters.read.total == 32 * len(sectors)
    assert counters.written.distinct == counters.written.total == 4 * 32
    source = (KERNELS / "memory.cu").read_text().splitlines()
    (line,) = [number for number, text in enumerate(source, 1) if text.endswith("// strided")]
    (site,) = [site for site in counters.conflicts.values() if site.line == line]
    banks = Counter(word % 32 for word in {i * stride for i in LANES})
    assert (site.accesses, site.wavefronts, site.conflicts) == (1, max(banks.values()), max(banks.values()) - 1)
