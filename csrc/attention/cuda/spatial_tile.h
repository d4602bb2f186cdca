// Tiles of attention over maps: which tokens their rows are, how they are copied, and which keys a query sees.
#pragma once

#include <cute/tensor.hpp>
#include <limits>

#include "attention/cuda/spatial_launches.h"
#include "attention/cuda/tokens.h"
#include "cuda/copy.h"
#include "cuda/scheduler.h"

namespace vitkernels::cuda {

// In place of a row's distance from the first token of its head.
inline constexpr int64_t kNoRow = -1, kRowOutside = -2;

// A tile and its box on one axis, in 32 bits.
struct BoxOfTask {
  int first_query, queries, first_key, keys;  // of the class
  int residue, step, keys_on_map, window;     // window: of a shared query, else 0

  __device__ int token(int of_class) const { return of_class * step + residue; }
};

// Rows of queries.
template <int kRows>
struct QueryRows {
  unsigned before_first[kRows], last[kRows];  // packed: the first key less the guards, and the last with them
  int entry[kRows];                           // in tables by offset
  int token[kRows];                           // on the map, -1 if none
  int coord[kMaxAxes][kRows];                 // among the keys, from the box's first one on
  int64_t query[kRows];                       // of the row, from the head's first token
};

// Rows of keys.
template <int kRows>
struct KeyRows {
  unsigned packed[kRows];
  int entry[kRows];
  float bias[kRows];
  int64_t key[kRows], value[kRows];
};

// The tile of a block, for each batch and head.
struct SpatialTask {
  int64_t batch, head;
  int tile[kMaxAxes];

  __device__ SpatialTask(const SpatialCut& cut, int64_t heads, unsigned block) {
    TaskIndex<unsigned> index(block);
    head = index.take(heads);
    CUTE_UNROLL
    for (int a = kMaxAxes - 1; a >= 0; --a) tile[a] = int(index.take(cut.axis[a].num_tiles()));
    batch = index.rest();
  }
};

__device__ inline int64_t offset_of(const MapTensor& t, const int (&token)[kMaxAxes]) {
  return token[0] * t.axis_stride[0] + token[1] * t.axis_stride[1] + token[2] * t.axis_stride[2];
}

__device__ inline BoxOfTask box_of_task(const SpatialCudaParams& p, const AxisCut& axis, int tile) {
  const AxisBox box = axis.box(tile);
  const Range queries = axis.owns_keys ? box.streamed : box.owned, keys = axis.owns_keys ? box.owned : box.streamed;
  return {.first_query = int(queries.begin),
          .queries = queries.empty() ? 0 : int(queries.end - queries.begin),
          .first_key = int(keys.begin),
          .keys = keys.empty() ? 0 : int(keys.end - keys.begin),
          .residue = int(box.residue),
          .step = int(axis.rule.step),
          .keys_on_map = int(box.rule.num_keys),
          .window = p.is_shared_query ? int(axis.rule.size) : 0};
}

// One thread for each axis.
__device__ inline void find_boxes(const SpatialCudaParams& p, const SpatialCut& cut, const SpatialTask& task,
                                  BoxOfTask (&boxes)[kMaxAxes]) {
  CUTE_UNROLL
  for (int a = 0; a < kMaxAxes; ++a) {
    if (int(threadIdx.x) == a * kWarpSize % int(blockDim.x)) boxes[a] = box_of_task(p, cut.axis[a], task.tile[a]);
  }
  __syncthreads();
}

enum class Rows { kOwned, kStreamed };

// The coordinates of a token in the tile, or in the box. Returns whether they are within the largest one.
template <Rows kRows>
__device__ bool find_coordinates(const SpatialCut& cut, int index, int (&at)[kMaxAxes]) {
  CUTE_UNROLL
  for (int a = kMaxAxes - 1; a >= 0; --a) {
    const AxisCut& axis = cut.axis[a];
    const int next = (kRows == Rows::kOwned ? axis.by_extent : axis.by_streamed).divide(index);
    at[a] = index - next * (kRows == Rows::kOwned ? axis.extent : axis.streamed);
    index = next;
  }
  return index == 0;
}

// Finds query `index` of the tile or the box, as row i. Returns whether it sees all keys, or does not exist.
template <Rows kAre, int kRows>
__device__ bool find_query(const SpatialCudaParams& p, const SpatialCut& cut, const BoxOfTask (&boxes)[kMaxAxes],
                           int index, int i, QueryRows<kRows>& rows) {
  int at[kMaxAxes];
  bool exists = find_coordinates<kAre>(cut, index, at), sees_all = p.radius_squared < 0;
  CUTE_UNROLL
  for (int a = 0; a < kMaxAxes; ++a) exists = exists && at[a] < boxes[a].queries;
  unsigned first = 0, last = cut.packed.guards;
  int token = 0, own[kMaxAxes];
  CUTE_UNROLL
  for (int a = 0; a < kMaxAxes; ++a) {
    const BoxOfTask& box = boxes[a];
    const AxisRule rule = cut.axis[a].rule.of_class(box.residue);
    const int u = box.first_query + (exists ? at[a] : 0);
    Range keys{0, 0};
    if (exists) keys = intersect(relative_to(rule.keys(u), box.first_key), {0, box.keys});
    const bool is_empty = keys.empty();
    const int most = cut.axis[a].owns_keys ? cut.axis[a].extent : cut.axis[a].streamed;
    first += cut.packed.field(a, is_empty ? most : int(keys.begin));
    last += cut.packed.field(a, is_empty ? 0 : int(keys.end) - 1);
    sees_all = sees_all && keys.begin == 0 && keys.end == box.keys;
    const int of_map = box.token(u);
    token = token * int(cut.axis[a].rule.num_queries) + of_map;
    // Of a row that does not exist, those of the first: a tile that needs no mask reads its terms.
    rows.coord[a][i] = int(rule.num_queries > 0 && rule.num_keys > 0 ? rule.coord(u) : 0) - box.first_key;
    own[a] = box.window > 0 ? of_map % box.window : of_map;
  }
  rows.before_first[i] = first - cut.packed.guards, rows.last[i] = last;
  rows.entry[i] = p.score.by_offset.small.entry({{rows.coord[0][i], rows.coord[1][i], rows.coord[2][i]}});
  rows.token[i] = exists ? token : -1;
  rows.query[i] = exists ? offset_of(p.query, own) : kNoRow;
  return sees_all || !exists;
}

// Finds key `index` of the tile or the box, as row i. Returns its token on the map, -1 if it has none.
template <Rows kAre, int kRows>
__device__ int find_key(const SpatialCudaParams& p, const SpatialCut& cut, const BoxOfTask (&boxes)[kMaxAxes],
                        int64_t batch, int64_t head, int index, int i, KeyRows<kRows>& rows) {
  int at[kMaxAxes], token[kMaxAxes], of_map = 0;
  bool exists = find_coordinates<kAre>(cut, index, at), is_on_map = true;
  unsigned packed = 0;
  CUTE_UNROLL
  for (int a = 0; a < kMaxAxes; ++a) {
    const BoxOfTask& box = boxes[a];
    const int v = box.first_key + at[a];
    exists = exists && at[a] < box.keys;
    is_on_map = is_on_map && v >= 0 && v < box.keys_on_map;
    packed += cut.packed.field(a, at[a]);
    token[a] = box.token(v);
    of_map = of_map * int(cut.axis[a].rule.num_keys) + token[a];
  }
  const int64_t missing = exists ? kRowOutside : kNoRow;
  const bool is_row = exists && is_on_map;
  rows.packed[i] = exists ? packed : cut.packed.nowhere();
  rows.entry[i] = exists ? p.score.by_offset.small.entry({{at[0], at[1], at[2]}}) : 0;
  rows.bias[i] = is_row && p.key_bias.data
                     ? p.key_bias.at<const float>(batch, Coord{{token[0], token[1], token[2]}}, head)[0]
                     : 0.0f;
  rows.key[i] = is_row ? offset_of(p.key, token) : missing;
  rows.value[i] = is_row ? offset_of(p.value, token) : missing;
  return is_row ? of_map : -1;
}

// Starts the copy of rows to a tile, whose other elements become zero, up to a multiple of 32 columns. A row outside the
// map is `fill`, if there is one.
template <int kThreads, class Shared, class Element>
__device__ void start_rows(const Shared& sT, const Element* head, const int64_t* rows, const Element* fill, int columns,
                           bool is_aligned) {
  constexpr int kVector = 16 / int(sizeof(Element)), kVectors = decltype(cute::size<1>(sT))::value / kVector;
  constexpr int kRows = decltype(cute::size<0>(sT))::value, kSteps = cuda::ceil_div(kRows * kVectors, kThreads);
  CUTE_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    const int i = step * kThreads + int(threadIdx.x), row = i / kVectors, column = i % kVectors * kVector;
    if (kRows * kVectors % kThreads != 0 && i >= kRows * kVectors) break;
    if (column >= (columns + 31) / 32 * 32) continue;
    const int64_t offset = rows[row];
    const Element* const from = offset >= 0 ? head + offset : offset == kRowOutside ? fill : nullptr;
    Element* const to = &sT(row, column);
    if (is_aligned) {
      copy_16_bytes(to, (from ? from : head) + column, from && column < columns ? 16 : 0);
    } else {
      for (int c = 0; c < kVector; ++c) to[c] = from && column + c < columns ? from[column + c] : Element(0);
    }
  }
}

// Stores rows of a tile at their tokens, which are `stride` elements apart.
template <int kThreads, class Shared, class Element>
__device__ void store_rows(const Shared& sT, const int* tokens, Element* target, int64_t stride, int columns) {
  constexpr int kVector = 16 / int(sizeof(Element)), kVectors = decltype(cute::size<1>(sT))::value / kVector;
  constexpr int kRows = decltype(cute::size<0>(sT))::value;
  const bool is_aligned = columns % kVector == 0;  // as results are: contiguous
  for (int i = int(threadIdx.x); i < kRows * kVectors; i += kThreads) {
    const int row = i / kVectors, column = i % kVectors * kVector;
    if (tokens[row] < 0 || column >= columns) continue;
    const Element* const from = &sT(row, column);
    Element* const to = target + tokens[row] * stride + column;
    if (is_aligned) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int c = 0; c < kVector && column + c < columns; ++c) to[c] = from[c];
    }
  }
}

// Whether a query sees a key, on all axes at once: neither difference borrows from a guard bit.
__device__ inline bool is_seen(unsigned guards, unsigned before_first, unsigned last, unsigned key) {
  return ((key - before_first) & (last - key) & guards) == guards;
}

}  // namespace vitkernels::cuda
