#include "cpu/isa.h"

#if defined(VITKERNELS_HAS_AVX512)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <ranges>
#include <span>
#include <stdexcept>
#include <string>

// Only a test's emulator defines it, for CPUs without AMX.
extern "C" __attribute__((weak)) void vitkernels_emulates_amx();

namespace vitkernels {
namespace {

struct Candidate {
  Isa isa;
  const char* name;
  bool supported;
};

#if defined(VITKERNELS_HAS_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

// The tiles' registers are large: Linux saves them only for processes that ask.
bool has_amx_bf16() {
#if defined(__linux__)
  if (vitkernels_emulates_amx) return true;
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & kBFloat16) == 0 || (edx & kTiles) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Best first. The compiler's check includes the operating system's part (saved registers).
std::span<const Candidate> candidates() {
  static const Candidate list[] = {
#if defined(VITKERNELS_HAS_AVX512)
      {Isa::amx_bf16, "amx_bf16", has_avx512() && __builtin_cpu_supports("avx512bf16") && has_amx_bf16()},
      {Isa::avx512_bf16, "avx512_bf16", has_avx512() && __builtin_cpu_supports("avx512bf16")},
      {Isa::avx512, "avx512", has_avx512()},
#endif
#if defined(VITKERNELS_HAS_AVX2)
      {Isa::avx2, "avx2",
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
      {Isa::baseline, "baseline", true},
  };
  return list;
}

std::string names(bool supported_only) {
  std::string joined;
  for (const Candidate& candidate : candidates() | std::views::reverse) {
    if (supported_only && !candidate.supported) continue;
    joined += (joined.empty() ? "" : " ") + std::string(candidate.name);
  }
  return joined;
}

const Candidate& choose() {
  const char* option = std::getenv("VITKERNELS_ISA");
  const std::string wanted = option ? option : "";
  for (const Candidate& candidate : candidates()) {
    if (candidate.supported && (wanted.empty() || wanted == candidate.name)) return candidate;
  }
  throw std::runtime_error("vitkernels: VITKERNELS_ISA is '" + wanted + "', this CPU takes " + names(true));
}

const Candidate& chosen() {
  static const Candidate& candidate = choose();
  return candidate;
}

}  // namespace

Isa isa() { return chosen().isa; }

}  // namespace vitkernels

// For the Python side, which has no binding but torch's operators.
extern "C" {

__attribute__((visibility("default"))) const char* vitkernels_isa() {
  try {
    return vitkernels::chosen().name;
  } catch (const std::exception&) {
    return "none";
  }
}

__attribute__((visibility("default"))) const char* vitkernels_isas_built() {
  static const std::string joined = vitkernels::names(false);
  return joined.c_str();
}

__attribute__((visibility("default"))) const char* vitkernels_isas_supported() {
  static const std::string joined = vitkernels::names(true);
  return joined.c_str();
}
}
