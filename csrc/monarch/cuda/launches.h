// Launches of the Monarch kernels on a GPU. Plain data, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include "common/divisor.h"
#include "monarch/monarch.h"

namespace vitkernels {

// Where the intermediate's column n lies: the first weight has it as an output (block, i), the second as an input
// (block, j).
enum class MonarchOrder {
  kForward,   // n = block outputs + i = j blocks + block
  kBackward,  // n = i blocks + block = block inputs + j, of transposed weights
};

enum class MonarchEpilogue {
  kNone,      // plus the bias
  kGelu,      // GELU of that
  kGradGelu,  // the gradient of GELU there, times that of the output
};

// out = second (first x), both weights block-diagonal; rows of x and of the intermediate hold block behind block.
struct MonarchCudaParams {
  MonarchProblem problem{};
  MonarchOrder order = MonarchOrder::kForward;
  Matrix inner{};               // [rows, inner()] by the second weight's blocks; may be null
  bool needs_inner = false;     // `inner` is a result
  const float* bias = nullptr;  // [outputs()] or null
  MonarchEpilogue epilogue = MonarchEpilogue::kNone;
  Matrix grad_out{};           // [rows, outputs()], blocks taking turns: for kGradGelu
  Matrix out{};                // [rows, outputs()], or null: the intermediate alone
  bool is_interleaved = true;  // blocks of `out` take turns; or they lie one behind the other

  // How blocks of threads share the work: a group of the second weight's blocks has the columns of the intermediate
  // that it needs in shared memory, or in `inner`. Set by plan().
  int group = 0, num_groups = 0;
  bool is_inner_shared = true;
  Divisor divisor{};  // by the group, or by the second weight's inputs
  bool is_x_aligned = false, is_first_aligned = false, is_second_aligned = false, is_inner_aligned = false;
};

// Of blocks of the second weight, whose outputs a thread block has side by side.
inline constexpr int kMaxMonarchGroup = 8;

// The gradients of a weight: parts [splits, blocks, left, right] = left^T right of a share of the rows, for each block
// of columns.
struct MonarchGradWeightCudaParams {
  int64_t rows = 0, blocks = 0, left_columns = 0, right_columns = 0, splits = 0;
  Matrix left{}, right{};  // [rows, blocks columns]
  float* parts = nullptr;

  int64_t num_elements() const { return blocks * left_columns * right_columns; }
};

// The gradient of the bias, whose blocks take turns: parts [splits, blocks columns] are sums over a share of the rows.
struct MonarchColumnsCudaParams {
  int64_t rows = 0, blocks = 0, columns = 0, splits = 0;
  bool is_interleaved = true;  // blocks of `in` take turns; or they lie one behind the other
  Matrix in{};                 // [rows, blocks columns]
  Matrix out{};                // the same, one behind the other, or null
  float* parts = nullptr;      // or null
};

// out [elements] = the sum of the parts [splits, elements], in order.
struct MonarchSumCudaParams {
  int64_t splits = 0, elements = 0;
  const float* parts = nullptr;
  void* out = nullptr;
};

template <DType kDType>
struct MonarchLaunches {
  // Chooses the groups for the current device; the results do not depend on them. Without `is_inner_shared`, multiply()
  // needs `inner`.
  static cudaError_t plan(MonarchCudaParams& params);
  static cudaError_t multiply(const MonarchCudaParams& params, bool allow_tf32, cudaStream_t stream);

  // How many blocks of threads share the rows, by shapes alone: their sums are added in order.
  static int64_t grad_weight_splits(const MonarchGradWeightCudaParams& params);
  static int64_t column_splits(const MonarchColumnsCudaParams& params);
  static cudaError_t grad_weight(const MonarchGradWeightCudaParams& params, bool allow_tf32, cudaStream_t stream);
  static cudaError_t columns(const MonarchColumnsCudaParams& params, cudaStream_t stream);
  static cudaError_t sum(const MonarchSumCudaParams& params, cudaStream_t stream);
};

}  // namespace vitkernels
