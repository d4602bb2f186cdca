// The values of integer tensors on a GPU, for operators. They stay there, where kernels read and do not trust them. With
// VITKERNELS_CHECK=1 in the environment they are also copied to the host, which waits for them, and checked as on the CPU.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "common/integer_argument.h"
#include "cuda/device.h"

namespace vitkernels {

inline bool values_are_checked() {
  static const bool checked = [] {
    const char* option = std::getenv("VITKERNELS_CHECK");
    const std::string wanted = option ? option : "";
    if (wanted.empty() || wanted == "0" || wanted == "1") return wanted == "1";
    throw std::runtime_error("vitkernels: VITKERNELS_CHECK is '" + wanted + "', takes 0 or 1");
  }();
  return checked;
}

inline std::vector<int64_t> read_device_integers(const Checker& checker, const Tensor& t) {
  const Tensor values = as_contiguous(t);
  const OnDevice device(t);
  const auto read = [&]<class T>(T) {
    std::vector<T> copy(t.numel());
    check_cuda(checker, cudaMemcpyAsync(copy.data(), values.const_data_ptr(), copy.size() * sizeof(T),
                                        cudaMemcpyDeviceToHost, device.stream()));
    check_cuda(checker, cudaStreamSynchronize(device.stream()));
    return std::vector<int64_t>(copy.begin(), copy.end());
  };
  return t.scalar_type() == ScalarType::Long ? read(int64_t{}) : read(int32_t{});
}

inline ReadIntegers device_integers_reader() { return values_are_checked() ? read_device_integers : nullptr; }

}  // namespace vitkernels
