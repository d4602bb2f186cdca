// From products to logits over a map, in the registers of a warp: scale, score terms, pattern.
#pragma once

#include "attention/cuda/score.h"
#include "attention/cuda/spatial_tile.h"

namespace vitkernels::cuda {

// The score of a head's logits (queries,keys).
template <int kQueries, int kKeys>
struct SpatialScore {
  const SpatialCudaParams& p;
  const PackedCoords& packed;
  const QueryRows<kQueries>& queries;
  const KeyRows<kKeys>& keys;
  float scale;
  const float* relative;                       // relative logits of the head's first token, or null
  const float *bias_table, *multiplier_table;  // their entries for an offset of zero, or null

  __device__ SpatialScore(const SpatialCudaParams& p, const SpatialCut& cut, const QueryRows<kQueries>& queries,
                          const KeyRows<kKeys>& keys, int64_t batch, int64_t head)
      : p(p),
        packed(cut.packed),
        queries(queries),
        keys(keys),
        scale(p.score.scale_of<float>(head)),
        relative(relative_of(batch, head)),
        bias_table(table_of(p.score.by_offset.bias, head)),
        multiplier_table(table_of(p.score.by_offset.multiplier, head)) {}

  // Products become logits: -inf for keys that the query does not see. `at` gives the (query,key) of each.
  template <class Tile, class Coordinates>
  __device__ void apply(Tile& tile, const Coordinates& at, bool is_whole) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tile); ++i) tile(i) *= scale;
    const bool is_plain = !multiplier_table && !bias_table && !relative && p.radius_squared < 0;
    if (is_plain && !p.key_bias.data) {
      if (!is_whole) hide(tile, at);
      return;
    }
    for_each(tile, at, is_whole, [&](float& x, const Query& q, const Key& k) {
      if (multiplier_table) x *= multiplier_table[q.entry - k.entry];
      x += k.bias;
      if (bias_table) x += bias_table[q.entry - k.entry];
      if (relative) x += relative_logit(q.row, k.packed);
    });
  }

  // Keys that the query does not see.
  template <class Tile, class Coordinates>
  __device__ void hide(Tile& tile, const Coordinates& at) const {
    struct Bounds {
      unsigned before_first, last;
    };
    const auto bounds = [&](int row) -> Bounds { return {queries.before_first[row], queries.last[row]}; };
    const auto key = [&](int column) { return keys.packed[column]; };
    for_each_pair(tile, at, bounds, key, [&](int r, int c, const Bounds& q, unsigned k) {
      const bool seen = is_seen(packed.guards, q.before_first, q.last, k);
      tile(r, c) = seen ? tile(r, c) : -std::numeric_limits<float>::infinity();
    });
  }

  // Times the multiplier, for pairs of which the query sees the key.
  template <class Tile, class Coordinates>
  __device__ void multiply(Tile& tile, const Coordinates& at) const {
    if (!multiplier_table) return;
    for_each(
        tile, at, false, [&](float& x, const Query& q, const Key& k) { x *= multiplier_table[q.entry - k.entry]; },
        0.0f);
  }

  struct Query {
    int row, entry;
    unsigned before_first, last;
  };
  struct Key {
    unsigned packed;
    int entry;
    float bias;
  };

  // Calls f(element, query, key) for pairs of which the query sees the key. Others become `unseen`.
  template <class Tile, class Coordinates, class Function>
  __device__ void for_each(Tile& tile, const Coordinates& at, bool is_whole, Function&& f,
                           float unseen = -std::numeric_limits<float>::infinity()) const {
    const auto query = [&](int row) -> Query {
      return {row, queries.entry[row], queries.before_first[row], queries.last[row]};
    };
    const auto key = [&](int column) -> Key { return {keys.packed[column], keys.entry[column], keys.bias[column]}; };
    for_each_pair(tile, at, query, key, [&](int r, int c, const Query& q, const Key& k) {
      bool seen = is_whole || is_seen(packed.guards, q.before_first, q.last, k.packed);
      if (p.radius_squared >= 0) seen = seen && is_near(q.row, k.packed);
      if (seen) {
        f(tile(r, c), q, k);
      } else {
        tile(r, c) = unseen;
      }
    });
  }

 private:
  __device__ const float* table_of(const TableTerm& term, int64_t head) const {
    if (!term.data) return nullptr;
    return static_cast<const float*>(term.data) + head * term.head_stride + p.score.by_offset.small.center();
  }

  __device__ const float* relative_of(int64_t batch, int64_t head) const {
    const DeviceRelativeLogits& logits = p.score.by_offset.relative;
    return logits.data ? logits.data + batch * logits.batch_stride + head * logits.head_stride : nullptr;
  }
  __device__ float relative_logit(int row, unsigned key) const {
    float sum = 0.0f;
    CUTE_UNROLL
    for (int a = 0; a < kMaxAxes; ++a) {
      if (p.score.by_offset.rel_pos[a].data) sum += relative[relative_place(a, row, packed.coord(a, key))];
    }
    return sum;
  }

 public:
  // Where the relative logit of a query and a key's coordinate on an axis lies, from that of the head's first token. A
  // query that does not exist takes those of another.
  __device__ int64_t relative_place(int axis, int row, int coord) const {
    const OffsetTerms& terms = p.score.by_offset;
    return int64_t(max(queries.token[row], 0)) * terms.relative.width + terms.relative.first[axis] +
           queries.coord[axis][row] - coord + terms.small.size[axis] - 1;
  }

 private:
  static constexpr int64_t kFarAway = int64_t(1) << 30;  // the square of the distance fits into 64 bits

  __device__ bool is_near(int row, unsigned key) const {
    int64_t distance = 0;
    CUTE_UNROLL
    for (int a = 0; a < kMaxAxes; ++a) {
      const int64_t away = int64_t(queries.coord[a][row] - packed.coord(a, key)) * int(p.rule(a).step);
      const int64_t tokens = min(max(away, -kFarAway), kFarAway);
      distance += tokens * tokens;
    }
    return distance <= p.radius_squared;
  }
};

}  // namespace vitkernels::cuda
