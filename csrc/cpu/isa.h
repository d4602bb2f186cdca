// The instruction sets that kernels are compiled for, and the choice of one at run time.
#pragma once

#include <cstdint>

namespace vitkernels {

// Worst first. Sources of kernels are compiled once for each; the macro VK_ISA is then its name.
enum class Isa { baseline, avx2, avx512, avx512_bf16, amx_bf16 };

// The one in use: the environment variable VITKERNELS_ISA names it, else the best that the CPU supports.
Isa isa();

constexpr int64_t vector_bytes(Isa isa) { return isa >= Isa::avx512 ? 64 : isa == Isa::avx2 ? 32 : 16; }

}  // namespace vitkernels
