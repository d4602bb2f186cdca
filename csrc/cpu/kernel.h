// A kernel by the type of its Params, in the instruction set in use.
#pragma once

#include "cpu/isa.h"

namespace vitkernels {

// Kernels work through the tasks [begin, end) on one thread; `scratch` is theirs alone, 64-byte aligned.
template <class Params>
struct Kernel {
  int64_t (*scratch)(const Params&);  // bytes per thread
  int64_t (*parts)(const Params&);    // bytes of the partial sums that all splits leave together; null: there are none
  void (*run)(const Params&, int64_t begin, int64_t end, void* scratch);
  void (*finish)(const Params&, int64_t begin, int64_t end);  // adds those of some (batch, head) pairs; or null
};

// Defined beside each kernel (make_kernel.h), once per instruction set.
template <class Params, Isa>
struct KernelOf {
  static const Kernel<Params> kernel;
};

template <class Params>
const Kernel<Params>& kernel() {
  switch (isa()) {
#if defined(VITKERNELS_HAS_AVX512)
    case Isa::amx_bf16: return KernelOf<Params, Isa::amx_bf16>::kernel;
    case Isa::avx512_bf16: return KernelOf<Params, Isa::avx512_bf16>::kernel;
    case Isa::avx512: return KernelOf<Params, Isa::avx512>::kernel;
#endif
#if defined(VITKERNELS_HAS_AVX2)
    case Isa::avx2: return KernelOf<Params, Isa::avx2>::kernel;
#endif
    default: return KernelOf<Params, Isa::baseline>::kernel;
  }
}

}  // namespace vitkernels
