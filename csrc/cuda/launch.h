// Launch grids and launches.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace vitkernels::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;

template <class T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Blocks for `tasks`, `tasks_per_block` each. Kernels loop in strides of the launch grid, whose size is limited. An
// empty grid cannot be launched.
inline unsigned blocks_for(int64_t tasks, int64_t tasks_per_block) {
  return unsigned(std::clamp<int64_t>(ceil_div(tasks, tasks_per_block), 1, kMaxBlocks));
}

inline constexpr int kSharedBytesOfAnyLaunch = 48 << 10;  // more dynamic shared memory needs an attribute

// One thread block for each task.
template <class... Params>
cudaError_t launch_tasks(void (*kernel)(Params...), int64_t tasks, int threads, int shared_bytes, cudaStream_t stream,
                         const std::type_identity_t<Params>&... params) {
  if (tasks == 0) return cudaSuccess;
  if (tasks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  if (shared_bytes > kSharedBytesOfAnyLaunch) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<unsigned(tasks), threads, shared_bytes, stream>>>(params...);
  return cudaGetLastError();
}

// Values derived from the result are computed where they are used, instead of living in registers across a loop.
template <class T>
__device__ T computed_here(T x) {
  if constexpr (std::is_same_v<T, float>) {
    asm volatile("add.f32 %0, %0, 0f00000000;" : "+f"(x));  // the compiler sees through less
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
  return x;
}

// Read again by each call, so that values derived from them need not stay in registers across a loop.
__device__ inline unsigned block_index() {
  unsigned index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

__device__ inline int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

__device__ inline int lane_index() { return int(threadIdx.x) % kWarpSize; }

// In a one-dimensional launch grid whose blocks are whole warps.
__device__ inline int64_t warp_of_grid() { return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize; }
__device__ inline int64_t warps_in_grid() { return int64_t(gridDim.x) * blockDim.x / kWarpSize; }

// The same bits in every lane, since each addition is commutative.
template <class T>
__device__ inline T warp_sum(T value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

}  // namespace vitkernels::cuda
