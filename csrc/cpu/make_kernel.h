// From the class of a kernel's body, a template over the element type, to its Kernel.
#pragma once

#include "common/dtype.h"
#include "cpu/kernel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace vitkernels::VK_ISA {

// Compiler flags that ask for wider vectors than the instruction set's would have kernels write beyond padded rows.
static_assert(kVectorBytes == vector_bytes(Isa::VK_ISA));

// Body<S>(params, memory) for params.element_type() does its work in run(begin, end). It may have scratch_size(),
// parts_size(), and finish(begin, end).
template <template <class> class Body, class Params>
constexpr Kernel<Params> make_kernel() {
  using AnyBody = Body<float>;
  Kernel<Params> kernel{};
  kernel.run = [](const Params& params, int64_t begin, int64_t end, void* scratch) {
    dispatch_dtype(params.element_type(), [&]<class S>(S) { Body<S>(params, scratch).run(begin, end); });
  };
  if constexpr (requires(AnyBody body) { body.scratch_size(); }) {
    kernel.scratch = [](const Params& params) {
      return dispatch_dtype(params.element_type(), [&]<class S>(S) { return Body<S>(params, nullptr).scratch_size(); });
    };
  }
  if constexpr (requires(AnyBody body) { body.parts_size(); }) {
    kernel.parts = [](const Params& params) {
      return dispatch_dtype(params.element_type(), [&]<class S>(S) { return Body<S>(params, nullptr).parts_size(); });
    };
  }
  if constexpr (requires(AnyBody body) { body.finish(0, 0); }) {
    kernel.finish = [](const Params& params, int64_t begin, int64_t end) {
      dispatch_dtype(params.element_type(), [&]<class S>(S) { Body<S>(params, nullptr).finish(begin, end); });
    };
  }
  return kernel;
}

}  // namespace vitkernels::VK_ISA

// Behind the namespaces of a kernel's source: the kernel that has these Params.
#define VK_KERNEL(Body, Params)                                                   \
  template <>                                                                     \
  constinit const vitkernels::Kernel<vitkernels::Params>                          \
      vitkernels::KernelOf<vitkernels::Params, vitkernels::Isa::VK_ISA>::kernel = \
          vitkernels::VK_ISA::make_kernel<vitkernels::VK_ISA::Body, vitkernels::Params>()
