// The keys of a box on their way to shared memory: which tokens they are, and copies of their rows.
#pragma once

#include "attention/cuda/spatial_tile.h"
#include "cuda/copy.h"

namespace vitkernels::cuda {

// Tokens on a walk through a box, in row-major order. Offsets of rows are in vectors of 16 bytes.
struct BoxWalk {
  int4 step;   // on the axes, and of the offset
  int4 carry;  // sizes of the last two axes, and what the offset changes by where each begins anew

  __device__ BoxWalk(const BoxOfTask (&boxes)[kMaxAxes], const int (&stride)[kMaxAxes], int tokens) {
    const int height = boxes[1].keys, width = boxes[2].keys, rows = width > 0 ? tokens / width : 0;
    step.z = width > 0 ? tokens % width : 0;
    step.x = height > 0 ? rows / height : 0;
    step.y = height > 0 ? rows % height : 0;
    step.w = step.x * stride[0] + step.y * stride[1] + step.z * stride[2];
    carry = {height, width, stride[0] - height * stride[1], stride[1] - width * stride[2]};
  }
};

// A thread's place on a walk.
struct BoxCursor {
  int at[kMaxAxes] = {};
  int offset = 0;

  // The token `index` of the box; `first` is the offset of the first one.
  __device__ BoxCursor(const BoxOfTask (&boxes)[kMaxAxes], const int (&stride)[kMaxAxes], int first, int index) {
    const int height = max(boxes[1].keys, 1), width = max(boxes[2].keys, 1), row = index / width;
    at[0] = row / height, at[1] = row % height, at[2] = index % width;
    offset = first + at[0] * stride[0] + at[1] * stride[1] + at[2] * stride[2];
  }

  __device__ void advance(const BoxWalk& walk) {
    const int4 step = walk.step, carry = walk.carry;
    at[0] += step.x, at[1] += step.y, at[2] += step.z, offset += step.w;
    if (at[2] >= carry.y) at[2] -= carry.y, at[1] += 1, offset += carry.w;
    if (at[1] >= carry.x) at[1] -= carry.x, at[0] += 1, offset += carry.z;
  }

  __device__ bool is_on_map(const BoxOfTask (&boxes)[kMaxAxes]) const {
    bool is = true;
    CUTE_UNROLL
    for (int a = 0; a < kMaxAxes; ++a) {
      is = is && unsigned(boxes[a].first_key + at[a]) < unsigned(boxes[a].keys_on_map);
    }
    return is;
  }
};

// Starts the copy of rows to a tile, 16 bytes a thread and step. Rows of negative offsets become zero, as columns past
// the last one.
template <int kThreads, class Shared, class Element>
__device__ __forceinline__ void start_vectors(const Shared& sT, const Element* head, const int* offsets, int columns) {
  constexpr int kVector = 16 / int(sizeof(Element)), kVectors = decltype(cute::size<1>(sT))::value / kVector;
  constexpr int kRowsOfStep = kThreads / kVectors, kSteps = decltype(cute::size<0>(sT))::value / kRowsOfStep;
  static_assert(kSteps * kRowsOfStep == decltype(cute::size<0>(sT))::value);
  const int row = int(threadIdx.x) / kVectors, column = int(threadIdx.x) % kVectors * kVector;
  const char* const from = reinterpret_cast<const char*>(head + column);
  const bool exists = column < columns;
  CUTE_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    const int offset = offsets[row + step * kRowsOfStep];
    copy_16_bytes(&sT(row + step * kRowsOfStep, column), from + int64_t(offset) * 16, exists && offset >= 0 ? 16 : 0);
  }
}

}  // namespace vitkernels::cuda
