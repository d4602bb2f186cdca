// From products to logits, in the registers of a warp: scale, score terms, mask.
#pragma once

#include <cute/tensor.hpp>
#include <limits>

#include "attention/cuda/keys.h"
#include "cuda/online_softmax.h"

namespace vitkernels::cuda {

// The tokens of a logit tile. Rows and columns past the last token read the terms of the last one.
struct LogitTile {
  int64_t batch, head;
  Range queries, keys;

  __device__ int row(int r) const { return min(r, int(queries.end - queries.begin) - 1); }
  __device__ int column(int c) const { return min(c, int(keys.end - keys.begin) - 1); }

  __device__ LogitTile here() const {
    return {computed_here(batch),
            computed_here(head),
            {computed_here(queries.begin), computed_here(queries.end)},
            {computed_here(keys.begin), computed_here(keys.end)}};
  }

  // Counted from the first token on the offset grid: negative for prefix tokens.
  __device__ int grid_query(int r, const DeviceOffsetGrid& grid) const {
    return int(queries.begin) + row(r) - grid.num_prefix;
  }
  __device__ int grid_key(int c, const DeviceOffsetGrid& grid) const {
    return int(keys.begin) + column(c) - grid.num_prefix;
  }
};

// Calls f(r, c, of_query(row), of_key(column)) for the elements of a tile (queries,keys). Values that depend on the
// query or the key alone are computed once; those of the shorter side stay in registers.
template <class Tile, class Coordinates, class OfQuery, class OfKey, class Function>
__device__ void for_each_pair(const Tile& tile, const Coordinates& coordinates, OfQuery&& of_query, OfKey&& of_key,
                              Function&& f) {
  constexpr int kRows = decltype(cute::size<0>(tile))::value, kColumns = decltype(cute::size<1>(tile))::value;
  const auto of_row = [&](int r) { return of_query(int(cute::get<0>(coordinates(r, 0)))); };
  const auto of_column = [&](int c) { return of_key(int(cute::get<1>(coordinates(0, c)))); };
  if constexpr (kRows <= kColumns) {
    decltype(of_row(0)) rows[kRows];
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) rows[r] = of_row(r);
    CUTE_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const auto column = of_column(c);
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) f(r, c, rows[r], column);
    }
  } else {
    decltype(of_column(0)) columns[kColumns];
    CUTE_UNROLL
    for (int c = 0; c < kColumns; ++c) columns[c] = of_column(c);
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const auto row = of_row(r);
      CUTE_UNROLL
      for (int c = 0; c < kColumns; ++c) f(r, c, row, columns[c]);
    }
  }
}

struct Times {
  __device__ float operator()(float a, float b) const { return a * b; }
};
struct Plus {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// Combines each element with `data`, rows `stride` apart, with loads of two neighbours. Returns false without any
// effect if a thread has no neighbours in a row, if the tile has a tail, or if rows are not aligned to 8 bytes.
template <class Tile, class Coordinates, class Combine>
__device__ bool combine_whole_rows(Tile& tile, const Coordinates& coordinates, const float* data, int64_t stride,
                                   const LogitTile& at, Combine combine) {
  constexpr int kRows = decltype(cute::size<0>(tile))::value, kColumns = decltype(cute::size<1>(tile))::value;
  if constexpr (kRows > kColumns) {
    return false;
  } else {
    constexpr int kKeys = 4 * kColumns;  // four threads share a row
    const bool are_neighbours = cute::get<1>(coordinates(0, 1)) == cute::get<1>(coordinates(0, 0)) + 1;
    const bool is_aligned = reinterpret_cast<uintptr_t>(data) % sizeof(float2) == 0 && stride % 2 == 0;
    if (!are_neighbours || at.keys.end - at.keys.begin < kKeys || !is_aligned) return false;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float* row = data + at.row(cute::get<0>(coordinates(r, 0))) * stride;
      CUTE_UNROLL
      for (int c = 0; c < kColumns; c += 2) {
        const float2 both = *reinterpret_cast<const float2*>(row + cute::get<1>(coordinates(r, c)));
        tile(r, c) = combine(tile(r, c), both.x);
        tile(r, c + 1) = combine(tile(r, c + 1), both.y);
      }
    }
    return true;
  }
}

// Combines each element with that of a term.
template <class Tile, class Coordinates, class Combine>
__device__ void combine_term(Tile& tile, const Coordinates& coordinates, const ScoreTerm& term, LogitTile at,
                             Combine combine) {
  if (!term.data) return;
  at = at.here();
  const float* data =
      static_cast<const float*>(term.data) + term.strides.offset(at.batch, at.head, at.queries.begin, at.keys.begin);
  const bool by_key = term.strides.key != 0;  // with a stride of 1
  if (by_key && combine_whole_rows(tile, coordinates, data, term.strides.query, at, combine)) return;
  for_each_pair(
      tile, coordinates, [&](int r) { return data + at.row(r) * term.strides.query; },
      [&](int c) { return by_key ? at.column(c) : 0; },
      [&](int r, int c, const float* row, int column) { tile(r, c) = combine(tile(r, c), row[column]); });
}

// Combines each element with that of a table, where both tokens are on the offset grid.
template <class Tile, class Coordinates, class Combine>
__device__ void combine_table(Tile& tile, const Coordinates& coordinates, const DeviceOffsetGrid& grid,
                              const TableTerm& term, LogitTile at, Combine combine) {
  if (!term.data) return;
  at = at.here();
  const float* data = static_cast<const float*>(term.data) + at.head * term.head_stride + grid.center();
  const auto of_query = [&](int r) -> const float* {
    const int token = at.grid_query(r, grid);
    return token < 0 ? nullptr : data + grid.entry(grid.coord(token));
  };
  const auto of_key = [&](int c) {
    const int token = at.grid_key(c, grid);
    return token < 0 ? -1 : grid.entry(grid.coord(token));
  };
  for_each_pair(tile, coordinates, of_query, of_key, [&](int r, int c, const float* row, int key) {
    if (row && key >= 0) tile(r, c) = combine(tile(r, c), row[-key]);
  });
}

// Adds the relative logits, where both tokens are on the offset grid.
template <class Tile, class Coordinates>
__device__ void add_relative_logits(Tile& tile, const Coordinates& coordinates, const OffsetTerms& terms,
                                    LogitTile at) {
  const DeviceRelativeLogits& logits = terms.relative;
  if (!logits.data) return;
  at = at.here();
  const DeviceOffsetGrid& grid = terms.small;
  CUTE_UNROLL
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    if (!terms.rel_pos[axis].data) continue;
    const float* data =
        logits.data + at.batch * logits.batch_stride + at.head * logits.head_stride + logits.first[axis];
    const auto of_query = [&](int r) -> const float* {
      const int token = at.grid_query(r, grid);
      return token < 0 ? nullptr : data + int64_t(token) * logits.width;
    };
    const auto of_key = [&](int c) {
      const int token = at.grid_key(c, grid);
      return token < 0 ? -1 : grid.coordinate(axis, token);
    };
    for_each_pair(tile, coordinates, of_query, of_key, [&](int r, int c, const float* row, int key) {
      if (row && key >= 0) tile(r, c) += row[key];
    });
  }
}

template <class Tile, class Coordinates>
__device__ void multiply_by_terms(Tile& tile, const Coordinates& coordinates, const Score& score, const LogitTile& at) {
  combine_term(tile, coordinates, score.multiplier, at, Times{});
  combine_table(tile, coordinates, score.by_offset.small, score.by_offset.multiplier, at, Times{});
}

template <class Tile, class Coordinates>
__device__ void add_terms(Tile& tile, const Coordinates& coordinates, const Score& score, const LogitTile& at) {
  combine_term(tile, coordinates, score.bias, at, Plus{});
  combine_term(tile, coordinates, score.key_bias, at, Plus{});
  combine_table(tile, coordinates, score.by_offset.small, score.by_offset.bias, at, Plus{});
  add_relative_logits(tile, coordinates, score.by_offset, at);
}

// Logits of keys that do not exist, or that the query does not see, become -inf.
template <class Tile, class Coordinates, class Keys>
__device__ void mask_unseen(Tile& tile, const Coordinates& coordinates, const Keys& keys, const LogitTile& at) {
  struct Columns {
    int begin, end;
  };
  const auto of_query = [&](int row) {
    const int64_t query = at.queries.begin + row;
    if (query >= at.queries.end) return Columns{0, 0};
    const Range seen = relative_to(intersect(keys.seen(query), at.keys), at.keys.begin);
    return Columns{int(seen.begin), int(seen.end)};
  };
  for_each_pair(
      tile, coordinates, of_query, [](int column) { return column; },
      [&](int r, int c, const Columns& seen, int column) {
        if (column < seen.begin || column >= seen.end) tile(r, c) = -std::numeric_limits<float>::infinity();
      });
}

// `products` (queries,keys) become logits. `coordinates` gives the (query,key) of each in the tile, which has room for
// kKeys keys.
template <int kKeys, class Products, class Coordinates, class Keys>
__device__ void apply_score(Products& products, const Coordinates& coordinates, const Score& score, const Keys& keys,
                            const LogitTile& at) {
  const float scale = score.scale_of<float>(at.head);
  CUTE_UNROLL
  for (int i = 0; i < cute::size(products); ++i) products(i) *= scale;
  if (score.has_terms()) {
    multiply_by_terms(products, coordinates, score, at);
    add_terms(products, coordinates, score, at);
  }
  const bool is_whole = at.keys.end - at.keys.begin == kKeys && keys.is_whole(at.queries, at.keys);
  if (!is_whole) mask_unseen(products, coordinates, keys, at);
}

}  // namespace vitkernels::cuda
