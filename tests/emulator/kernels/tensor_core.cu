// Tensor-core instructions on raw fragments: each lane's registers in, each lane's registers out.

#include <cstdint>

namespace {

constexpr int kLanes = 32;

// out[lane][0..4) = a b + c for a[lane][0..4), b[lane][0..2), c[lane][0..4).
template <class Instruction>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out) {
  constexpr int kA = Instruction::kA, kB = Instruction::kB, kC = Instruction::kC;
  const int lane = threadIdx.x;
  uint32_t d[kC];
  Instruction::run(d, a + lane * kA, b + lane * kB, c + lane * kC);
  for (int i = 0; i < kC; ++i) out[lane * kC + i] = d[i];
}

// With four registers of a, two of b and four of c.
#define MMA_4_2_4(name, instruction)                                                                            \
  struct name {                                                                                                 \
    static constexpr int kA = 4, kB = 2, kC = 4;                                                                \
    static __device__ void run(uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c) {          \
      asm volatile("mma.sync.aligned." instruction " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};" \
                   : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]),    \
                     "r"(c[2]), "r"(c[3]));                                                                     \
    }                                                                                                           \
  }
#define MMA_2_1_4(name, instruction)                                                                   \
  struct name {                                                                                        \
    static constexpr int kA = 2, kB = 1, kC = 4;                                                       \
    static __device__ void run(uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c) { \
      asm volatile("mma.sync.aligned." instruction " {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"    \
                   : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));     \
    }                                                                                                  \
  }
#define MMA_4_2_2(name, instruction)                                                                          \
  struct name {                                                                                               \
    static constexpr int kA = 4, kB = 2, kC = 2;                                                              \
    static __device__ void run(uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c) {        \
      asm volatile("mma.sync.aligned." instruction " {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%8,%9};"               \
                   : "=r"(d[0]), "=r"(d[1])                                                                   \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1])); \
    }                                                                                                         \
  }

MMA_4_2_4(Bf16K16, "m16n8k16.row.col.f32.bf16.bf16.f32");
MMA_4_2_4(F16K16, "m16n8k16.row.col.f32.f16.f16.f32");
MMA_4_2_2(F16K16ToF16, "m16n8k16.row.col.f16.f16.f16.f16");
MMA_2_1_4(Bf16K8, "m16n8k8.row.col.f32.bf16.bf16.f32");
MMA_2_1_4(F16K8, "m16n8k8.row.col.f32.f16.f16.f32");
MMA_4_2_4(Tf32K8, "m16n8k8.row.col.f32.tf32.tf32.f32");
MMA_2_1_4(Tf32K4, "m16n8k4.row.col.f32.tf32.tf32.f32");

// out[lane][i]: register i that ldmatrix gives the lane, from rows of 16 bytes at byte offset `rows[lane]` of `data`.
template <int kCount, bool kTransposed>
__global__ void ldmatrix_kernel(const uint32_t* data, int words, const uint32_t* rows, uint32_t* out) {
  extern __shared__ __align__(16) uint32_t tile[];
  for (int i = threadIdx.x; i < words; i += kLanes) tile[i] = data[i];
  __syncwarp();
  const uint32_t row = uint32_t(__cvta_generic_to_shared(tile)) + rows[threadIdx.x];
  uint32_t d[4] = {};
  if constexpr (kCount == 1 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(d[0]) : "r"(row));
  } else if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(d[0]) : "r"(row));
  } else if constexpr (kCount == 2 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(row));
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(row));
  } else if constexpr (!kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(row));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(row));
  }
  for (int i = 0; i < kCount; ++i) out[threadIdx.x * kCount + i] = d[i];
}

template <class Instruction>
int run_mma(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out) {
  mma_kernel<Instruction><<<1, kLanes>>>(a, b, c, out);
  return cudaGetLastError();
}

template <int kCount>
int run_ldmatrix(const uint32_t* data, int words, const uint32_t* rows, uint32_t* out, bool transposed) {
  if (transposed) {
    ldmatrix_kernel<kCount, true><<<1, kLanes, words * sizeof(uint32_t)>>>(data, words, rows, out);
  } else {
    ldmatrix_kernel<kCount, false><<<1, kLanes, words * sizeof(uint32_t)>>>(data, words, rows, out);
  }
  return cudaGetLastError();
}

}  // namespace

// `kind` is the place in this list.
extern "C" int mma(int kind, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out) {
  switch (kind) {
    case 0: return run_mma<Bf16K16>(a, b, c, out);
    case 1: return run_mma<F16K16>(a, b, c, out);
    case 2: return run_mma<F16K16ToF16>(a, b, c, out);
    case 3: return run_mma<Bf16K8>(a, b, c, out);
    case 4: return run_mma<F16K8>(a, b, c, out);
    case 5: return run_mma<Tf32K8>(a, b, c, out);
    case 6: return run_mma<Tf32K4>(a, b, c, out);
  }
  return cudaErrorInvalidValue;
}

extern "C" int ldmatrix(int count, bool transposed, const uint32_t* data, int words, const uint32_t* rows,
                        uint32_t* out) {
  switch (count) {
    case 1: return run_ldmatrix<1>(data, words, rows, out, transposed);
    case 2: return run_ldmatrix<2>(data, words, rows, out, transposed);
    case 4: return run_ldmatrix<4>(data, words, rows, out, transposed);
  }
  return cudaErrorInvalidValue;
}
