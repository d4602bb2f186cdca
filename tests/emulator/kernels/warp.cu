// What the lanes of a warp tell one another, and paths that part: out[row][thread].

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

// Paths that part and meet again: a branch, one that sleeps, a loop whose length differs by lane, a switch, a call, an
// early exit.
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
  if (v % 2) asm volatile("nanosleep.u32 0;");
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
