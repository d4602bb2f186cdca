// The score of the fast paths: a dense bias, read where the logits of a tile need it, and a mask in the last tile.
#pragma once

#include <cute/tensor.hpp>
#include <limits>

#include "attention/dense.h"
#include "cuda/launch.h"

namespace vitkernels::cuda {

// The rows of a bias that a thread needs, whose elements have a unit stride along the keys, for tiles of keys kStep
// apart. `coordinates` give the (query,key) of each of the thread's logits in a tile.
template <int kRows, int kStep, class Coordinates>
class BiasRows {
 public:
  // `tile` is the bias of the first query and the first tile's first key. Queries past the last one read that.
  __device__ BiasRows(const float* tile, int row_stride, int num_queries, const Coordinates& coordinates)
      : coordinates_(coordinates) {
    const auto row = [&](int r) { return min(int(cute::get<0>(coordinates(r, 0))), num_queries - 1) * row_stride; };
    next_ = tile + row(0) + column(0);
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) offset_[r] = row(r) - row(0);
  }

  // logits = products * scale + bias, two columns a load if kInPairs.
  template <bool kInPairs, class Logits>
  __device__ void add(Logits& logits, float scale) {
    CUTE_UNROLL
    for (int c = 0; c < cute::size<1>(logits); c += 2) {
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float* first = next_ + offset_[r] + (column(c) - column(0));
        const float2 both = kInPairs ? *reinterpret_cast<const float2*>(first) : float2{first[0], first[1]};
        logits(r, c) = fmaf(logits(r, c), scale, both.x);
        logits(r, c + 1) = fmaf(logits(r, c + 1), scale, both.y);
      }
    }
    next_ += kStep;
  }

  // The same for a tile of which only `keys` exist. Those past them read the last one's.
  template <class Logits>
  __device__ void add_some(Logits& logits, float scale, int keys) {
    CUTE_UNROLL
    for (int c = 0; c < cute::size<1>(logits); ++c) {
      const int distance = min(column(c), keys - 1) - column(0);
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) logits(r, c) = fmaf(logits(r, c), scale, next_[offset_[r] + distance]);
    }
    next_ += kStep;
  }

 private:
  __device__ int column(int c) const { return cute::get<1>(coordinates_(0, c)); }

  const Coordinates& coordinates_;
  const float* next_;  // this thread's first logit in the next tile
  int offset_[kRows];  // from there to those of its other rows
};

// A bias as the transposed logits of a block that owns keys need it: each query has a row, and a thread a few keys, of
// which the first kSure surely exist.
template <int kSure, class Coordinates>
class BiasColumns {
 public:
  // `tile` is the bias of the first query of the last tile and the block's first key, of `num_keys`.
  __device__ BiasColumns(const float* tile, int row_stride, int num_keys, const Coordinates& coordinates)
      : coordinates_(coordinates), next_(tile + key(0)), row_stride_(row_stride), num_keys_(num_keys) {}

  // logits = products * scale + bias, both (queries,keys), of keys that exist. Queries past the last of `num_queries`
  // read that.
  template <class Logits>
  __device__ void add(Logits& logits, float scale, int num_queries) {
    scale = computed_here(scale);  // else loaded for each logit
    CUTE_UNROLL
    for (int r = 0; r < cute::size<0>(logits); ++r) {
      const int query = min(int(cute::get<0>(coordinates_(r, 0))), num_queries - 1);
      const float* const row = next_ + query * row_stride_;
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(logits); ++c) {
        if (c < kSure || key(c) < num_keys_) logits(r, c) = fmaf(logits(r, c), scale, row[key(c) - key(0)]);
      }
    }
  }
  // To a tile of `queries` before this one.
  __device__ void advance(int queries) { next_ -= queries * row_stride_; }

 private:
  __device__ int key(int c) const { return cute::get<1>(coordinates_(0, c)); }

  const Coordinates& coordinates_;
  const float* next_;  // the thread's first key
  int row_stride_, num_keys_;
};

// Logits (queries,keys) of keys that do not exist become -inf.
template <class Logits, class Coordinates>
__device__ void mask_tail(Logits& logits, const Coordinates& coordinates, int num_keys) {
  CUTE_UNROLL
  for (int c = 0; c < cute::size<1>(logits); ++c) {
    if (cute::get<1>(coordinates(0, c)) < num_keys) continue;
    CUTE_UNROLL
    for (int r = 0; r < cute::size<0>(logits); ++r) logits(r, c) = -std::numeric_limits<float>::infinity();
  }
}

}  // namespace vitkernels::cuda
