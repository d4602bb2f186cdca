// Kernels with one mistake each, in the line that ends with its name (or in either of two); and the same deed done properly, which is none.
// They run with two warps on `data`, n words of which the test filled all but the last.

#include <cstdint>

namespace {

using Kernel = void (*)(uint32_t* data, int n);

constexpr int kThreads = 64;

__global__ void read_beyond(uint32_t* data, int n) {
  data[threadIdx.x] = data[n + threadIdx.x % 2];  // read_beyond
}

__global__ void write_before(uint32_t* data, int n) {
  if (threadIdx.x == 5) data[-1] = 0;  // write_before
}

__global__ void vector_across_end(uint32_t* data, int n) {
  const uint4 last = *reinterpret_cast<uint4*>(data + (n - 1) / 4 * 4);  // vector_across_end
  data[0] = last.x + last.y;
}

__global__ void null_pointer(uint32_t* data, int n) {
  uint32_t* none;
  asm volatile("mov.u64 %0, 0;" : "=l"(none));  // what C++ knows to be null, the compiler takes for unreachable
  *none = 1;                                    // null_pointer
}

__global__ void shared_beyond(uint32_t* data, int n) {
  __shared__ uint32_t tile[kThreads];
  tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  data[threadIdx.x] = tile[threadIdx.x + n % 2 + 1];  // shared_beyond
}

__global__ void misaligned_load(uint32_t* data, int n) {
  const uint2 pair = *reinterpret_cast<uint2*>(data + 1 + n % 2);  // misaligned_load
  data[threadIdx.x] = pair.x + pair.y;
}

__global__ void uninitialised_global(uint32_t* data, int n) {
  if (data[n - 1] > 7) data[0] = 1;  // uninitialised_global
}

__global__ void uninitialised_shared(uint32_t* data, int n) {
  __shared__ uint32_t tile[kThreads];
  if (int(threadIdx.x) < kThreads - 1) tile[threadIdx.x] = n;
  __syncthreads();
  data[threadIdx.x] = tile[threadIdx.x] + 1;  // uninitialised_shared
}

__global__ void copy_without_wait(uint32_t* data, int n) {
  __shared__ uint32_t tile[kThreads];
  const uint32_t address = uint32_t(__cvta_generic_to_shared(tile + threadIdx.x));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(data + threadIdx.x) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  data[threadIdx.x] = tile[threadIdx.x] + n;  // copy_without_wait
}

__global__ void race_of_writes(uint32_t* data, int n) {
  __shared__ uint32_t last;
  if (threadIdx.x % 32 == 0) last = threadIdx.x + n;  // race_of_writes
  __syncthreads();
  data[threadIdx.x] = last;
}

__global__ void race_of_read_and_write(uint32_t* data, int n) {
  __shared__ uint32_t tile[kThreads];
  tile[threadIdx.x] = n;
  __syncthreads();
  const uint32_t other = tile[kThreads - 1 - threadIdx.x];  // race_of_read_and_write
  tile[threadIdx.x] = other + 1;                            // race_of_read_and_write
  __syncthreads();
  data[threadIdx.x] = tile[threadIdx.x];
}

__global__ void barrier_in_branch(uint32_t* data, int n) {
  if (threadIdx.x % 32 < 16) __syncthreads();  // barrier_in_branch
  data[threadIdx.x] = n;
}

__global__ void barriers_that_differ(uint32_t* data, int n) {
  if (threadIdx.x < 32) {
    asm volatile("bar.sync 1, 64;" ::: "memory");  // barriers_that_differ
  } else {
    asm volatile("bar.sync 2, 64;" ::: "memory");  // barriers_that_differ
  }
  data[threadIdx.x] = n;
}

__global__ void unknown_instruction(uint32_t* data, int n) {
  uint32_t sum;
  asm volatile("vadd2.u32.u32.u32 %0, %1, %2, %1;" : "=r"(sum) : "r"(n), "r"(n));  // unknown_instruction
  data[threadIdx.x] = sum;
}

__global__ void no_mistake(uint32_t* data, int n) {
  __shared__ uint32_t tile[kThreads];
  __shared__ uint32_t copied[kThreads];
  const uint32_t address = uint32_t(__cvta_generic_to_shared(copied + threadIdx.x));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(data + threadIdx.x) : "memory");
  tile[threadIdx.x] = threadIdx.x;
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  const uint32_t other = tile[kThreads - 1 - threadIdx.x] + copied[kThreads - 1 - threadIdx.x];
  __syncthreads();
  tile[threadIdx.x] = other;
  data[threadIdx.x] = tile[threadIdx.x] + (threadIdx.x < 32 ? n : 0);
}

// Where a mistake shows only in some orders of the warps.
__global__ void write_then_read(uint32_t* data, int n) {
  __shared__ uint32_t tile[kThreads];
  tile[threadIdx.x] = n + threadIdx.x;                   // write_then_read
  data[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];  // write_then_read
}

__global__ void large_shared(uint32_t* data, int n) {
  extern __shared__ uint32_t tile[];
  tile[threadIdx.x] = n;
  data[threadIdx.x] = tile[threadIdx.x];
}

constexpr Kernel kKernels[] = {no_mistake,           read_beyond,          write_before,        vector_across_end,
                               null_pointer,         shared_beyond,        misaligned_load,     uninitialised_global,
                               uninitialised_shared, copy_without_wait,    race_of_writes,      race_of_read_and_write,
                               barrier_in_branch,    barriers_that_differ, unknown_instruction, write_then_read};

}  // namespace

// `kind` is the place in the list above.
extern "C" int fault(int kind, uint32_t* data, int n) {
  kKernels[kind]<<<1, kThreads>>>(data, n);
  return cudaGetLastError();
}

// `allowed`: bytes of dynamic shared memory that the kernel is allowed first, if not zero.
extern "C" int launch(unsigned grid, unsigned block, unsigned shared_bytes, int allowed, uint32_t* data, int n) {
  if (allowed) {
    const cudaError_t error = cudaFuncSetAttribute(large_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
    if (error != cudaSuccess) return cudaGetLastError();
  }
  large_shared<<<grid, block, shared_bytes>>>(data, n);
  return cudaGetLastError();
}
