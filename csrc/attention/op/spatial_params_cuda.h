// The Params of the kernels over maps with any pattern on a GPU.
#pragma once

#include "attention/cuda/spatial_launches.h"
#include "attention/op/spatial_arguments.h"

namespace vitkernels {

// Whether rows begin at multiples of 16 bytes and are whole numbers of them.
bool has_aligned_rows(const Tensor& t);

// Of tiles of queries, without results. Raises on what the kernels do not compute.
SpatialCudaParams spatial_cuda_params(const Checker& checker, const SpatialArguments& args, SpatialTile tile);
// The same of the kernel that takes a forward.
SpatialCudaParams spatial_forward_params(const Checker& checker, const SpatialArguments& args);

// Computes the relative logits, if there are any, which the params then point to; the result owns them.
OptionalTensor launch_spatial_relative_logits(const Checker& checker, const SpatialArguments& args,
                                              SpatialCudaParams& params, cudaStream_t stream);

}  // namespace vitkernels
