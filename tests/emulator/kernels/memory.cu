// State spaces, widths of access, atomics and asynchronous copies.

#include <cstdint>

namespace {

// Loads and stores of every width and state space; `out` begins with a copy of `in`, `n` words.
__constant__ uint32_t table[8] = {3, 1, 4, 1, 5, 9, 2, 6};
__device__ uint32_t counter = 100;

__global__ void memory_kernel(const uint32_t* in, uint32_t* out, int n) {
  extern __shared__ __align__(16) uint32_t shared[];
  __shared__ uint32_t reversed[128];
  const int i = threadIdx.x, threads = blockDim.x;
  if (i % 2) {  // 16 bytes, as four numbers or two
    __stcg(reinterpret_cast<uint4*>(out) + i, reinterpret_cast<const uint4*>(in)[i]);
  } else {
    double a, b;
    asm volatile("ld.global.v2.f64 {%0, %1}, [%2];" : "=d"(a), "=d"(b) : "l"(in + 4 * i));
    asm volatile("st.global.v2.f64 [%0], {%1, %2};" ::"l"(out + 4 * i), "d"(a), "d"(b) : "memory");
  }
  reinterpret_cast<uint2*>(shared)[i] = reinterpret_cast<const uint2*>(in)[i];
  reversed[threads - 1 - i] = in[i];
  __syncthreads();
  uint32_t* row = out + n + i;
  const auto put = [&](uint32_t value) {
    *row = value;
    row += threads;
  };
  put(shared[2 * i + 1] + reversed[i]);
  put(reinterpret_cast<const uint8_t*>(in)[i]);
  put(reinterpret_cast<const int8_t*>(in)[i]);
  put(reinterpret_cast<const uint16_t*>(shared)[i]);
  put(reinterpret_cast<const int16_t*>(in)[i]);
  put(table[in[i] % 8]);
  uint32_t local[8];
  for (int j = 0; j < 8; ++j) local[j] = in[(i + j) % threads];
  put(local[in[i] % 8]);                             // an index that only the run knows: local memory
  const uint32_t* either = in[i] % 2 ? in : shared;  // a generic address
  put(either[i]);
  __syncthreads();
  reinterpret_cast<uint8_t*>(reversed)[i] = uint8_t(in[i]);
  __syncthreads();
  put(reversed[i / 4]);
  __syncthreads();
  put(__ldg(in + i));
  put(__syncthreads_count(in[i] % 2));
  put(__syncthreads_and(in[i] % 2) * 2 + __syncthreads_or(in[i] % 2));
  *reinterpret_cast<uint16_t*>(row) = uint16_t(in[i]);
}

// One warp reads every `stride`-th word, of global and then of shared memory.
__global__ void strided_kernel(const uint32_t* in, uint32_t* out, int stride) {
  __shared__ uint32_t shared[32 * 33];
  for (int i = threadIdx.x; i < 32 * 33; i += 32) shared[i] = i;
  __syncwarp();
  const uint32_t word = in[threadIdx.x * stride];
  out[threadIdx.x] = word + shared[threadIdx.x * stride];  // strided
}

// Sums that do not depend on the order.
__global__ void atomics_kernel(const uint32_t* in, uint32_t* out, int n) {
  __shared__ uint32_t block_sum;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x == 0) block_sum = 0;
  __syncthreads();
  if (i < n) {
    atomicAdd(&block_sum, in[i]);
    atomicAdd(out, in[i]);
    atomicMax(out + 1, in[i]);
    atomicMin(out + 2, in[i]);
    atomicAnd(out + 3, in[i]);
    atomicOr(out + 4, in[i]);
    atomicXor(out + 5, in[i]);
    atomicAdd(reinterpret_cast<float*>(out + 6), float(in[i] % 1024));
    uint32_t seen = out[7];
    for (uint32_t expected = ~seen; expected != seen;) {  // a sum by compare-and-swap
      expected = seen;
      seen = atomicCAS(out + 7, expected, expected + in[i]);
    }
    atomicAdd(&counter, 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(out + 8, block_sum);
}

__global__ void counter_kernel(uint32_t* out) { *out = counter; }

// cp.async of 4, 8 and 16 bytes, in two groups; `valid` bytes of each of the second exist, the others become zero.
__global__ void async_copy_kernel(const uint32_t* in, uint32_t* out, int valid) {
  __shared__ __align__(16) uint32_t shared[32 * 11];
  const int i = threadIdx.x;
  const auto address = [&](int word) { return uint32_t(__cvta_generic_to_shared(shared + word)); };
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address(i)), "l"(in + i));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address(32 + 2 * i)), "l"(in + 2 * i));
  asm volatile("cp.async.commit_group;");
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(96 + 4 * i)), "l"(in + 4 * i));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(224 + 4 * i)), "l"(in + 4 * i),
               "r"(valid));
  asm volatile("cp.async.commit_group;");
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  out[i] = shared[i];
  out[32 + 2 * i] = shared[32 + 2 * i];
  out[33 + 2 * i] = shared[33 + 2 * i];
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  for (int j = 96 + i; j < 352; j += 32) out[j] = shared[j];
}

}  // namespace

extern "C" int memory(const uint32_t* in, uint32_t* out, int threads) {
  memory_kernel<<<1, threads, threads * 2 * sizeof(uint32_t)>>>(in, out, 4 * threads);
  return cudaGetLastError();
}

extern "C" int strided(const uint32_t* in, uint32_t* out, int stride) {
  strided_kernel<<<1, 32>>>(in, out, stride);
  return cudaGetLastError();
}

extern "C" int atomics(const uint32_t* in, uint32_t* out, int n) {
  if (n > 0) atomics_kernel<<<(n + 63) / 64, 64>>>(in, out, n);
  counter_kernel<<<1, 1>>>(out + 9);
  return cudaGetLastError();
}

extern "C" int async_copy(const uint32_t* in, uint32_t* out, int valid) {
  async_copy_kernel<<<1, 32>>>(in, out, valid);
  return cudaGetLastError();
}
