// From a launch call to a kernel that runs, with the errors a real runtime would give.
#pragma once

#include <cuda_runtime_api.h>

#include "image.h"

namespace emulator {

cudaError_t launch(Kernel& kernel, dim3 grid, dim3 block, void** arguments, size_t dynamic_shared);

// Bytes of shared memory a kernel declares, or an error to return.
cudaError_t static_shared_bytes(Kernel& kernel, int64_t& bytes);

// The error that cudaGetLastError returns next.
cudaError_t& last_error();

}  // namespace emulator
