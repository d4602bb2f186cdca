// Transposed attention on the CPU: O = P^T (w V') with P = exp(S - lse). Compiled once per instruction set.
//
// A task is a tile of keys of one (batch, head) and loops over all queries: it owns these keys' rows of O. P^T is read in
// place, through strides. With few columns of V' (one, for the column sums of P) O^T = (w V')^T P is computed instead:
// its keys are contiguous and need no padding to full vectors.

#include <algorithm>

#include "attention/cpu/logits.h"
#include "attention/cpu/softmax.h"
#include "attention/cpu/tile_sizes.h"
#include "attention/cpu/transposed.h"
#include "cpu/make_kernel.h"
#include "cpu/scratch.h"

namespace vitkernels::VK_ISA {
namespace {

// kVectors vectors of add_weighted_rows.
template <class T, int kVectors>
VK_INLINE void add_weighted_vectors(const T* weights, int64_t weight_stride, const T* rows, int64_t row_stride,
                                    int64_t count, T* acc) {
  Vec<T> sum[kVectors] = {};
  for (int64_t r = 0; r < count; ++r, weights += weight_stride, rows += row_stride) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] += broadcast(*weights) * load(rows + v * kWidth<T>);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store(acc + v * kWidth<T>, load(acc + v * kWidth<T>) + sum[v]);
}

// acc [columns] += weights^T rows [count, columns], up to the next full vector of columns. A matrix product of one row
// would be bound by the latency of its additions; here enough of them are independent.
template <class T>
void add_weighted_rows(const T* weights, int64_t weight_stride, const T* rows, int64_t row_stride, int64_t count,
                       int64_t columns, T* acc) {
  constexpr int kVectors = 4;
  int64_t c = 0;
  for (; c + kVectors * kWidth<T> <= columns; c += kVectors * kWidth<T>) {
    add_weighted_vectors<T, kVectors>(weights, weight_stride, rows + c, row_stride, count, acc + c);
  }
  for (; c < columns; c += kWidth<T>) {
    add_weighted_vectors<T, 1>(weights, weight_stride, rows + c, row_stride, count, acc + c);
  }
}

template <class S>
class Transposed {
  using T = Compute<S>;
  using E = Operand<S>;  // of the first product; the second has float32 probabilities

 public:
  Transposed(const AttentionTransposedParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  // Heads that share keys are consecutive, so that a tile is packed once for them.
  void run(int64_t begin, int64_t end) {
    const TileScope tiles;
    for (int64_t task = begin; task < end; ++task) {
      batch = task / p.heads / keys.count;
      head = task % p.heads;
      const int64_t tile = task / p.heads % keys.count;
      tile_of_keys({tile * keys.size, std::min((tile + 1) * keys.size, p.num_keys())});
    }
  }

 private:
  void tile_of_keys(Range tile) {
    pack(tile);
    std::fill_n(acc, is_narrow ? p.value_dim * acc_stride : (tile.end - tile.begin) * acc_stride, T(0));
    const int64_t blocks = divide_up(p.num_queries(), block_rows);
    for (int64_t block = 0; block < blocks; ++block) {
      block_of_queries({p.num_queries() * block / blocks, p.num_queries() * (block + 1) / blocks}, tile);
    }
    finish(tile);
  }

  void pack(Range tile) {
    const int64_t kv_head = params.attention.groups.kv_head_of[head];
    if (packed_batch == batch && packed_head == kv_head && packed_key == tile.begin) return;
    packed_batch = batch, packed_head = kv_head, packed_key = tile.begin;
    key_tile.pack(EvenRows{p.key.at<const S>(batch, tile.begin, kv_head), p.key.token_stride}, tile.end - tile.begin);
  }

  void block_of_queries(Range rows, Range tile) {
    const Range seen = relative_to(intersect(axis.any_keys(rows), tile), tile.begin);
    if (seen.empty()) return;
    const int64_t count = rows.end - rows.begin, groups = divide_up(count, kRowGroup<E>);
    // The logits of a group stay in the L1 cache for the exponentials.
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = count * group / groups;
      group_of_rows({rows.begin + first, rows.begin + count * (group + 1) / groups}, tile, seen.end,
                    probabilities + first * logits_stride);
    }
    pack_weighted_values<T, S>(p, params.weight, batch, head, rows, values, value_width);  // [count, dv]
    if (is_narrow) {
      for (int64_t c = 0; c < p.value_dim; ++c) {
        add_weighted_rows(values + c, value_width, probabilities, logits_stride, count, seen.end,
                          acc + c * acc_stride);  // [dv, keys]
      }
    } else {
      matmul<T, true>({probabilities, 1, logits_stride}, {values, value_width, kPanel<T>}, seen.end, value_width, count,
                      acc, acc_stride);  // [keys, dv]
    }
  }

  // P of some rows: their columns up to the first full vector that ends at `width` or later.
  void group_of_rows(Range rows, Range tile, int64_t width, T* prob) {
    const int64_t count = rows.end - rows.begin;
    const T scale = p.score.scale_of<T>(head), left_scale = kFoldsScale<E> ? T(1) : scale;
    const EvenRows query_rows{p.query.at<const S>(batch, rows.begin, head), p.query.token_stride};
    pack_queries(query_rows, count, p.head_dim, scale, queries, query_width);  // [count, d]
    key_tile.multiply(queries, count, {0, width}, prob, logits_stride);        // [count, width]
    for (int64_t query = rows.begin; query < rows.end; ++query, prob += logits_stride) {
      const Range visible = relative_to(intersect(axis.keys(query), tile), tile.begin);
      const T offset = exponent_offset(
          static_cast<const T*>(params.attention.lse)[(batch * p.num_queries() + query) * p.heads + head]);
      if (p.score.has_terms()) {
        const ScoreRow<T> score(p.score, batch, head, query, tile.begin);
        exponentiate(prob, visible, offset,
                     [&](Vec<T> x, int64_t column, Range lanes) { return score.apply(x * left_scale, column, lanes); });
      } else {
        const T scale_of_row = remaining_scale(prob, visible, left_scale, offset);
        exponentiate(prob, visible, offset, [&](Vec<T> x, int64_t, Range) { return x * scale_of_row; });
      }
      clear_outside<T>(prob, visible, round_up(width, kWidth<T>));
    }
  }

  template <class Logit>
  static void exponentiate(T* row, Range visible, T offset, Logit&& logit_of) {
    for_each_vector<T>(visible, [&](int64_t c, Range lanes) {
      store(row + c, keep(exp<T>(logit_of(load(row + c), c, lanes) - offset), lanes, T(0)));
    });
  }

  void finish(Range tile) {
    const int64_t count = tile.end - tile.begin;
    S* out = params.attention.out.at<S>(batch, tile.begin, head);
    if (!is_narrow)
      return unpack_rows<T>(acc, acc_stride, count, p.value_dim, T(1), out, params.attention.out.token_stride);
    for (int64_t key = 0; key < count; ++key, out += params.attention.out.token_stride) {
      for (int64_t c = 0; c < p.value_dim; ++c) store_narrowed<T>(out + c, broadcast(acc[c * acc_stride + key]), 1);
    }
  }

  const AttentionTransposedParams& params;
  const Problem& p = params.attention.problem;
  Scratch scratch;
  const Axis axis = p.axis;
  const Tiling keys = transposed_keys(p);
  const bool is_narrow = p.value_dim <= kFewColumns;
  const int64_t block_rows = is_narrow ? kRowGroup<E> : kBackwardQueryBlock;
  const int64_t query_width = round_up(p.head_dim, kOperandWidth<E>);
  const int64_t value_width = round_up(p.value_dim, kWidth<T>);
  const int64_t logits_stride = (keys.size / kWidth<T> | 1) * kWidth<T>;
  const int64_t acc_stride = is_narrow ? keys.size : value_width;

  E* queries = scratch.take<E>(kRowGroup<E> * query_width);
  T* values = scratch.take<T>(block_rows * value_width);
  T* probabilities = scratch.take<T>(block_rows * logits_stride);
  KeyTile<E> key_tile{scratch.take<E>(keys.size * padded_depth<E>(p.head_dim)),
                      scratch.take<E>(kMaxLastKeys* query_width), p.head_dim, query_width};
  T* acc = scratch.take<T>(is_narrow ? p.value_dim * keys.size : keys.size * value_width);

  int64_t batch = 0, head = 0;
  int64_t packed_batch = -1, packed_head = -1, packed_key = -1;
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(Transposed, AttentionTransposedParams);
