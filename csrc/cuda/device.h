// The device and the stream of an operator's call, through torch's stable ABI. For operators, not for kernels.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/check.h"

namespace vitkernels {

// Makes the device of `t` the current one for the lifetime of this object.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}

  // A stream's id is not its handle, and torch 2.10 hands out the handle here only.
  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// If the library has no code for the GPU, the message names the architectures that it has.
void check_cuda(const Checker& checker, cudaError_t error);

}  // namespace vitkernels
