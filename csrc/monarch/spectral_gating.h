// Params of spectral gating: the product of maps' two-dimensional spectra with a weight for each frequency and channel.
// Plain data, no torch.
#pragma once

#include <algorithm>

#include "common/dtype.h"
#include "common/range.h"
#include "monarch/mixed_radix.h"

namespace vitkernels {

// A tensor [batch, rows, columns, channels] of any strides, in elements.
struct Maps {
  void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0, column_stride = 0, channel_stride = 0;
};

// A tensor [rows, columns / 2 + 1, channels, 2] of any strides, in elements.
struct SpectralWeight {
  void* data = nullptr;
  int64_t row_stride = 0, column_stride = 0, channel_stride = 0, part_stride = 0;
};

struct SpectralGatingProblem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, rows = 0, columns = 0, channels = 0;
  Maps x;
  SpectralWeight weight;
  bool is_weight_wide = false;             // in the type of the arithmetic; else in that of x
  MixedRadix of_columns{1}, of_rows{1};    // transforms of a column, and of a row
  const void* roots = nullptr;             // of a column's, then of a row's transform, in the type of the arithmetic
  const int64_t* column_places = nullptr;  // where a column's transform leaves each frequency
  const int64_t* row_places = nullptr;
  int64_t channel_group = 0;  // channels of a task: the lanes of a vector
  int64_t shares = 1;         // of the batch, each a task

  int64_t frequencies() const { return columns / 2 + 1; }
  int64_t groups() const { return (channels + channel_group - 1) / channel_group; }
  int64_t tasks() const { return groups() * shares; }
};

struct SpectralGatingParams {
  SpectralGatingProblem problem;
  Maps out;

  DType element_type() const { return problem.dtype; }
};

struct SpectralGatingGradParams {
  SpectralGatingProblem problem;
  Maps grad_out, grad_x;
  SpectralWeight grad_weight;  // null: not requested
  void* partial = nullptr;     // of each task, in the layout of its spectra, if there are shares

  DType element_type() const { return problem.dtype; }
};

}  // namespace vitkernels
