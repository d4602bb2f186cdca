"""What a loop's instructions ask of an H100, and so how fast it can be: a model, for want of measurements.

A pipe takes each of a warp's instructions for some cycles. The loop takes at least as long as its busiest pipe ("max":
perfect overlap), and about as long as its products and then the rest ("serial": what one warp does on its own).

Cycles are those of one of an SM's four sub-partitions. All but the tensor core's follow from the throughput of
arithmetic instructions in the CUDA C++ Programming Guide, compute capability 9.0 (results a clock and SM: 128 of
float32 add, multiply and FMA; 64 of integer and logic operations, comparisons, min, max and conversions to 16 bits; 16
of special functions and of other conversions; 32 of shuffles), and from a shared memory of 128 bytes a clock.
"""

from __future__ import annotations

from collections import defaultdict

from tools.sass import Loop

SUB_PARTITIONS, CLOCK_GHZ = 132 * 4, 1.755  # H100 SXM
# Of HMMA.16816, as on an A100 (312 TF/s). With it, the model gives about what FlashAttention-2 publishes for an H100
# (heads of 64 and 128 columns: 313 and 380 TF/s against 282 and 370). Microbenchmarks of others find mma.sync at up to
# 62% of the peak that wgmma reaches, which are 6.4 cycles (arXiv 2402.13499). The first thing to measure on a GPU: all
# of the model's TF/s depend on it.
HMMA_CYCLES = 8

# The first prefix of an opcode that fits: pipe and cycles.
_PIPES: tuple[tuple[tuple[str, ...], str, float], ...] = (
    (("HMMA",), "tensor", HMMA_CYCLES),
    (("MUFU", "F2F.", "I2F", "F2I"), "special", 8),
    (("IMAD.MOV", "FFMA", "FADD", "FMUL"), "fma", 1),
    (("IMAD",), "fma", 2),
    # A fragment of 512 bytes takes 4 cycles of a shared memory that the four sub-partitions take turns at.
    (("LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS"), "shared", 16),
    (("LDSM",), "shared", 8),
    (("LDS", "STS", "SHFL"), "shared", 4),
    # Of pipes that are never the busiest here: uniform, branches, barriers, global and constant memory.
    (("U", "R2UR", "BAR", "BRA", "BSSY", "BSYNC", "WARPSYNC", "EXIT", "NOP", "DEPBAR"), "issue", 0),
    (("LDGDEPBAR", "LDG", "STG", "LDL", "STL", "LDC"), "issue", 0),
    (("",), "alu", 2),
)

# By loop, the figures that FlashAttention-2 has: instructions for each HMMA, and for each score of a thread; LDSM for
# each HMMA; registers; blocks an SM and their warps; serial and max TF/s. Counted in the code that nvcc makes of it for
# sm_90, bfloat16.
FLASH_ATTENTION_2: dict[str, tuple[float, float, float, int, tuple[int, int], tuple[int, int]]] = {
    "forward, 64, even lengths": (4.4, 8.9, 0.28, 255, (2, 4), (313, 474)),
    "forward, 64, uneven lengths": (5.0, 10.1, 0.28, 255, (2, 4), (313, 474)),
    "forward, 32": (6.6, 6.6, 0.28, 255, (2, 4), (234, 460)),
    "backward, 64": (3.4, 17.1, 0.45, 255, (1, 8), (364, 448)),
}


def cycles(loop: Loop) -> dict[str, float]:
    """By pipe, for one warp and one pass."""
    busy = defaultdict[str, float](float, issue=len(loop.opcodes))
    for opcode in loop.opcodes:
        pipe, needed = next((pipe, needed) for prefixes, pipe, needed in _PIPES if opcode.startswith(prefixes))
        busy[pipe] += needed
    return busy


def teraflops(loop: Loop) -> tuple[float, float]:
    """Of its matrix instructions: serial, max."""
    busy = cycles(loop)
    flops = 4096 * loop.count("HMMA.16816") + 2048 * loop.count("HMMA.1688.")
    busiest = max(busy.values())
    serial = max(busy["tensor"] + max(busy["special"], busy["issue"] - loop.count("HMMA")), busiest)
    rate = flops * SUB_PARTITIONS * CLOCK_GHZ / 1000
    return rate / serial, rate / busiest


def blocks_per_sm(registers: int, shared_bytes: int, threads: int) -> int:
    """How many an H100 holds at a time, by its 64K registers, 228 KB of shared memory, and 2048 threads."""
    warps = -(-threads // 32)
    # A sub-partition has a quarter of the registers, which a thread takes by eights. A block costs a KB by itself.
    warps_by_registers = 4 * (16384 // (-(-registers // 8) * 8 * 32))
    return min(warps_by_registers // warps, 228 * 1024 // (shared_bytes + 1024), 64 // warps, 32)
