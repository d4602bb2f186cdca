// The arguments of attention operators on a GPU: the limits of the kernels, and their Params.
#pragma once

#include "attention/cuda/launches.h"
#include "attention/op/arguments.h"

namespace vitkernels {

// Values of integer tensors stay on the device, where kernels read and check them. With VITKERNELS_CHECK=1 in the
// environment, they are also copied to the host, which waits for them, and checked as on the CPU.
DevicePolicy device_policy();

void fill_on_device(const AttentionArguments& args, const Tensor& out, const Tensor& lse, AttentionCudaParams& params);

}  // namespace vitkernels
