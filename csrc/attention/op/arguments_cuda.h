// The arguments of attention operators on a GPU: the limits of the kernels, and their Params.
#pragma once

#include "attention/cuda/launches.h"
#include "attention/op/arguments.h"

namespace vitkernels {

DevicePolicy device_policy();

void fill_on_device(const AttentionArguments& args, const Tensor& out, const Tensor& lse, AttentionCudaParams& params);

}  // namespace vitkernels
