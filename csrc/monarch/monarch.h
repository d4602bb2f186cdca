// Params of the Monarch kernels. Plain data, no torch.
//
// A product with two block-diagonal weights, row by row. Blocks of the first read neighbors and write neighbors; blocks
// of the second take turns, both where they read and where they write:
//   t[i q + a] = sum_b first[i, a, b] x[i p + b],   y[s l + j] = sum_r second[j, s, r] t[r l + j].
#pragma once

#include <algorithm>

#include "common/dtype.h"
#include "common/range.h"

namespace vitkernels {

// Dense blocks [blocks, outputs, inputs], contiguous.
struct BlockWeight {
  const void* data = nullptr;
  int64_t blocks = 0, outputs = 0, inputs = 0;

  template <class S>
  const S* block(int64_t i) const {
    return static_cast<const S*>(data) + i * outputs * inputs;
  }
};

// A matrix whose rows have a unit stride.
struct Matrix {
  void* data = nullptr;
  int64_t row_stride = 0;

  template <class S>
  VK_HOST_DEVICE S* row(int64_t r) const {
    return static_cast<S*>(data) + r * row_stride;
  }
};

// Of the outputs, once the bias is added.
enum class Activation : int64_t { kNone, kGelu };
inline constexpr int64_t kNumActivations = 2;

struct MonarchProblem {
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  BlockWeight first, second;
  Matrix x;  // [rows, inputs()]

  int64_t inputs() const { return first.blocks * first.inputs; }
  int64_t inner() const { return first.blocks * first.outputs; }
  int64_t outputs() const { return second.blocks * second.outputs; }
  int64_t num_blocks() const { return first.blocks + second.blocks; }
  DType element_type() const { return dtype; }
};

// Rows of a task. All weights pass through the second-level cache once for each of them.
inline constexpr int64_t kMonarchRows = 112;

inline int64_t monarch_tasks(const MonarchProblem& p) {
  constexpr int64_t kTasks = 16, kFewest = 28;
  const int64_t rows = std::clamp(p.rows / kTasks, kFewest, kMonarchRows);
  return (p.rows + rows - 1) / rows;
}

inline Range monarch_rows(const MonarchProblem& p, int64_t task) {
  return share_of({0, p.rows}, task, monarch_tasks(p));
}

// What the first product gave, in the order of its outputs: a forward may keep it for the backward, which reads it
// then.
struct Inner {
  enum class Use { kNone, kWrite, kRead } use = Use::kNone;
  Matrix rows;  // [rows, inner()]

  bool is_read() const { return use == Use::kRead; }
};

// The weights as operands of the products, in the instruction set's own layout. A task is a block.
struct MonarchPackParams {
  MonarchProblem problem;
  bool is_transposed = false;  // for the backward: inputs from outputs
  void* packed = nullptr;      // the first's blocks, then the second's

  DType element_type() const { return problem.dtype; }
};

struct MonarchParams {
  MonarchProblem problem;
  const void* packed = nullptr;
  Inner inner;
  const void* bias = nullptr;  // [outputs()] in the type of sums, or null
  Activation activation = Activation::kNone;
  Matrix out;  // [rows, outputs()]

  DType element_type() const { return problem.dtype; }
};

// The first of two passes of the backward: the gradient of x, and what the weights' gradients are sums of.
struct MonarchGradInputParams {
  MonarchProblem problem;
  Matrix grad_out, grad_x;
  const void* packed = nullptr;             // the first's blocks, as in the forward, where t is computed again
  const void* packed_transposed = nullptr;  // the way back
  bool needs_inner = false;                 // t, of which the second weight's gradients are sums
  Inner kept;
  void* shared = nullptr;  // operands: t shared out between the second's blocks, and the gradient of t

  DType element_type() const { return problem.dtype; }
};

// The second: each task owns rows of the weights' gradients, and goes through all rows of x.
struct MonarchGradWeightParams {
  MonarchProblem problem;
  Matrix grad_out;
  const void* shared = nullptr;  // of the first pass
  void* grad_first = nullptr;    // contiguous, as the weights
  void* grad_second = nullptr;

  DType element_type() const { return problem.dtype; }
};

// Before both passes: the gradient before the activation, and that of the bias, which is its sum over the rows. A task
// is kEpilogueColumns columns.
struct MonarchGradEpilogueParams {
  DType dtype = DType::kFloat32;
  int64_t rows = 0, columns = 0;
  Activation activation = Activation::kNone;
  Matrix grad_out;
  Matrix before, grad_before;  // where there is an activation: its argument, and the gradient of that
  void* grad_bias = nullptr;   // [columns] in the type of sums, or null

  DType element_type() const { return dtype; }
};

inline constexpr int64_t kEpilogueColumns = 64;

}  // namespace vitkernels
