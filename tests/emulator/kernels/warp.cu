// Instructions of a warp. Each kernel runs with one warp, or as many as the test says; out[row][thread].

#include <cstdint>

namespace {

// The rows of out are in the order of the calls.
__global__ void shuffle_kernel(const uint32_t* values, const uint32_t* lanes, uint32_t* out) {
  const int i = threadIdx.x;
  const uint32_t mask = 0xffffffffu;
  int row = 0;
  const auto put = [&](uint32_t value) { out[row++ * 32 + i] = value; };
  const uint32_t v = values[i];
  put(__shfl_sync(mask, v, lanes[i]));
  put(__shfl_sync(mask, v, lanes[i], 8));
  put(__shfl_up_sync(mask, v, 3));
  put(__shfl_up_sync(mask, v, 3, 16));
  put(__shfl_down_sync(mask, v, 5));
  put(__shfl_down_sync(mask, v, 5, 8));
  put(__shfl_xor_sync(mask, v, 6));
  put(__shfl_xor_sync(mask, v, 9, 8));
}

__global__ void vote_kernel(const uint32_t* values, uint32_t mask, uint32_t* out) {
  const int i = threadIdx.x;
  if (!(mask >> i & 1)) return;
  int row = 0;
  const auto put = [&](uint32_t value) { out[row++ * 32 + i] = value; };
  const uint32_t v = values[i];
  put(__ballot_sync(mask, v & 1));
  put(__all_sync(mask, v & 1));
  put(__any_sync(mask, v & 1));
  put(__match_any_sync(mask, v & 7));
  int same = 0;
  put(__match_all_sync(mask, v & 8, &same));
  put(same);
  put(__reduce_add_sync(mask, v));
  put(__reduce_min_sync(mask, v));
  put(__reduce_max_sync(mask, int32_t(v)));
  put(__reduce_and_sync(mask, v));
  put(__reduce_or_sync(mask, v));
  put(__reduce_xor_sync(mask, v));
  put(__activemask());
  __syncwarp(mask);
  uint32_t special;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(special));
  put(special);
  asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(special));
  put(special);
  asm volatile("mov.u32 %0, %%lanemask_ge;" : "=r"(special));
  put(special);
}

// Paths that part and meet again: a branch, a loop whose length differs by lane, a switch, a call, an early exit.
__device__ __noinline__ int collatz_steps(int x) {
  int steps = 0;
  while (x != 1) {
    x = x % 2 ? 3 * x + 1 : x / 2;
    ++steps;
  }
  return steps;
}

__device__ __noinline__ int fibonacci(int x) { return x < 2 ? x : fibonacci(x - 1) + fibonacci(x - 2); }

__global__ void control_kernel(const int* values, int* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int row = 0;
  const auto put = [&](int value) { out[row++ * n + i] = value; };
  const int v = values[i];
  put(v % 3 == 0 ? v * 5 : v - 7);
  put(collatz_steps(v));
  put(fibonacci(v % 7));
  switch (v % 9) {
    case 0: put(v ^ 0x55); break;
    case 1: put(v + 11); break;
    case 2: put(v * v); break;
    case 3: put(-v); break;
    case 4: put(v << 3); break;
    case 5: put(collatz_steps(v + 1)); break;
    case 6: put(v / 3); break;
    default: put(~v);
  }
  int sum = 0;
  for (int a = 0; a < v % 11; ++a) {
    for (int b = 0; b <= a; ++b) {
      if ((a ^ b) % 5 == 2) continue;
      if (a * b > 40) break;
      sum += a * 10 + b;
    }
  }
  put(sum);
}

// Loads and stores of every width and state space; `out` begins with a copy of `in`, `n` words.
__constant__ uint32_t table[8] = {3, 1, 4, 1, 5, 9, 2, 6};
__device__ uint32_t counter = 100;

__global__ void memory_kernel(const uint32_t* in, uint32_t* out, int n) {
  extern __shared__ __align__(16) uint32_t shared[];
  __shared__ uint32_t reversed[128];
  const int i = threadIdx.x, threads = blockDim.x;
  reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(in)[i];  // 16 bytes
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
  reinterpret_cast<uint8_t*>(reversed)[i] = uint8_t(in[i]);
  __syncthreads();
  put(reversed[i / 4]);
  __syncthreads();
  put(__ldg(in + i));
  put(__syncthreads_count(in[i] % 2));
  put(__syncthreads_and(in[i] % 2) * 2 + __syncthreads_or(in[i] % 2));
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

extern "C" int shuffle(const uint32_t* values, const uint32_t* lanes, uint32_t* out) {
  shuffle_kernel<<<1, 32>>>(values, lanes, out);
  return cudaGetLastError();
}

extern "C" int vote(const uint32_t* values, uint32_t mask, uint32_t* out) {
  vote_kernel<<<1, 32>>>(values, mask, out);
  return cudaGetLastError();
}

extern "C" int control(const int* values, int* out, int n) {
  control_kernel<<<(n + 47) / 48, 48>>>(values, out, n);
  return cudaGetLastError();
}

extern "C" int memory(const uint32_t* in, uint32_t* out, int threads) {
  memory_kernel<<<1, threads, threads * 2 * sizeof(uint32_t)>>>(in, out, 4 * threads);
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
