// Backward of transposed attention on the CPU. Compiled once per instruction set.
//
// With W = w V' and G = dO, for each head a tile of keys and a block of queries take five products:
//   S = Q K^T, dP = W G^T, then with P = exp(S - lse) and dS = P * dP:
//   U += P G, dK += dS^T Q, dQ += dS K.
// After all tiles a row's U gives dV' = w U, dw = V'.U and, since the sum of its dS is W.U, dlse = -w dw. Tasks are
// those of the attention's backward: ranges of keys, which own all that they write but the partial sums of dQ and U.

#include <algorithm>

#include "attention/cpu/differentiate.h"
#include "attention/cpu/logits.h"
#include "attention/cpu/transposed.h"
#include "cpu/make_kernel.h"
#include "cpu/scratch.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class TransposedBackward {
  using T = Compute<S>;
  using E = Operand<S>;  // of the first product: logits have the forward's bits

 public:
  TransposedBackward(const AttentionTransposedBackwardParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  int64_t parts_size() const {
    return attention.splits * p.heads * forward.num_rows() * value_width * int64_t(sizeof(T));
  }

  void run(int64_t begin, int64_t end) {
    const TileScope tiles;
    for_each_key_tile(attention, begin, end, [&](const KeyTileTask& task) {
      batch = task.batch, split = task.split;
      tile_of_keys(task.kv_head, task.tile);
    });
  }

  // dV', dw and dlse of some (batch, head) pairs.
  void finish(int64_t begin, int64_t end) {
    const int64_t part = p.heads * forward.num_rows() * value_width;
    for (int64_t pair = begin; pair < end; ++pair) {
      batch = pair / p.heads, head = pair % p.heads;
      for (int64_t query = 0; query < p.num_queries(); ++query) {
        T* u = row_of(params.grad_value_parts, 0, query, value_width);
        sum_splits(u, value_width, attention.splits, part);
        const T weight = params.weight.at<T>(batch, head, query);
        const T grad_weight = dot_rows<T>(p.value.at<const S>(batch, query, head), u, p.value_dim);
        const int64_t row = (batch * p.num_queries() + query) * p.heads + head;
        static_cast<T*>(params.grad_row_weight)[row] = grad_weight;
        static_cast<T*>(params.grad_row_lse)[row] = -weight * grad_weight;
        unpack_rows<T>(u, value_width, 1, p.value_dim, weight, attention.grad_value.at<S>(batch, query, head), 0);
      }
    }
  }

 private:
  void tile_of_keys(int64_t kv_head, Range tile) {
    const int64_t count = tile.end - tile.begin;
    const EvenRows keys{p.key.at<const S>(batch, tile.begin, kv_head), p.key.token_stride};
    key_tile.pack(keys, count);
    pack_rows<T>(keys, count, p.head_dim, T(1), key_copy, query_width);
    std::fill_n(key_gradient, count * query_width, T(0));

    const int64_t blocks = divide_up(axis.num_queries, kBackwardQueryBlock);
    for (int64_t i = forward.groups.first_head[kv_head]; i < forward.groups.first_head[kv_head + 1]; ++i) {
      head = forward.groups.head_list[i];
      const EvenRows gradient_rows{attention.grad_out.at<const S>(batch, tile.begin, head),
                                   attention.grad_out.token_stride};
      pack_transposed<T>(gradient_rows, count, p.value_dim, out_gradient_panels);
      pack_rows<T>(gradient_rows, count, p.value_dim, T(1), out_gradient, value_width);
      for (int64_t block = 0; block < blocks; ++block) {
        block_of_queries({axis.num_queries * block / blocks, axis.num_queries * (block + 1) / blocks}, tile);
      }
    }
    unpack_rows<T>(key_gradient, query_width, count, p.head_dim, T(1),
                   attention.grad_key.at<S>(batch, tile.begin, kv_head), attention.grad_key.token_stride);
  }

  void block_of_queries(Range rows, Range tile) {
    const Range seen = relative_to(intersect(axis.any_keys(rows), tile), tile.begin);
    if (seen.empty()) return;
    const int64_t count = rows.end - rows.begin;

    const EvenRows query_rows{p.query.at<const S>(batch, rows.begin, head), p.query.token_stride};
    const T scale = p.score.scale_of<T>(head);
    if constexpr (!kFoldsScale<E>) {
      pack_queries(query_rows, count, p.head_dim, scale, operands, operand_width);  // [count, d]
    }
    pack_rows<T>(query_rows, count, p.head_dim, scale, queries, query_width);              // [count, d]
    pack_weighted_values<T, S>(p, params.weight, batch, head, rows, values, value_width);  // [count, dv]
    key_tile.multiply(operands, count, {0, seen.end}, logits, logits_stride);              // [count, seen]
    matmul<T, false>({values, value_width, 1}, {out_gradient_panels, kPanel<T>, p.value_dim * kPanel<T>}, count,
                     round_up(seen.end, kWidth<T>), p.value_dim, gradients, logits_stride);  // [count, seen]

    for (int64_t r = 0; r < count; ++r) {
      const int64_t query = rows.begin + r;
      const Range visible = relative_to(intersect(axis.keys(query), tile), tile.begin);
      const T lse = static_cast<const T*>(forward.lse)[(batch * p.num_queries() + query) * p.heads + head];
      differentiate_row(p.score, {batch, head, query, tile.begin, visible, seen.end},
                        RowNumbers<T>{kFoldsScale<E> ? T(1) : scale, exponent_offset(lse), T(0)},
                        logits + r * logits_stride, gradients + r * logits_stride);
    }

    matmul<T, true>({logits, logits_stride, 1}, {out_gradient, value_width, kPanel<T>}, count, value_width, seen.end,
                    row_of(params.grad_value_parts, split, rows.begin, value_width), value_width);  // [count, dv]
    matmul<T, true>({gradients, 1, logits_stride}, {queries, query_width, kPanel<T>}, seen.end, query_width, count,
                    key_gradient, query_width);  // [keys, d]
    matmul<T, true>({gradients, logits_stride, 1}, {key_copy, query_width, kPanel<T>}, count, query_width, seen.end,
                    row_of(attention.grad_query_parts, split, rows.begin, query_width), query_width);  // [count, d]
  }

  // A query's row in an array [splits, heads, rows, width].
  T* row_of(void* parts, int64_t of_split, int64_t query, int64_t width) const {
    const int64_t row = (of_split * p.heads + head) * forward.num_rows() + batch * p.num_queries() + query;
    return static_cast<T*>(parts) + row * width;
  }

  const AttentionTransposedBackwardParams& params;
  const AttentionBackwardParams& attention = params.attention;
  const AttentionParams& forward = attention.forward;
  const Problem& p = forward.problem;
  Scratch scratch;
  const Axis axis = p.axis;
  const int64_t max_keys = std::min(round_up(p.num_keys(), kTileAlignment), kBackwardKeyTile);
  const int64_t query_width = round_up(p.head_dim, kWidth<T>);
  const int64_t operand_width = round_up(p.head_dim, kOperandWidth<E>);
  const int64_t value_width = round_up(p.value_dim, kWidth<T>);
  const int64_t logits_stride = (max_keys / kWidth<T> | 1) * kWidth<T>;

  T* queries = scratch.take<T>(kBackwardQueryBlock * query_width);
  T* values = scratch.take<T>(kBackwardQueryBlock * value_width);
  T* logits = scratch.take<T>(kBackwardQueryBlock * logits_stride);     // then P
  T* gradients = scratch.take<T>(kBackwardQueryBlock * logits_stride);  // dP, then dS
  // The queries of the first product: the others' rows where these hold its operands.
  E* operands = [this] {
    if constexpr (kFoldsScale<E>) {
      return queries;
    } else {
      return scratch.take<E>(kBackwardQueryBlock * operand_width);
    }
  }();
  KeyTile<E> key_tile{scratch.take<E>(max_keys * padded_depth<E>(p.head_dim)),
                      scratch.take<E>(kMaxLastKeys* operand_width), p.head_dim, operand_width};
  T* key_copy = scratch.take<T>(max_keys * query_width);
  T* key_gradient = scratch.take<T>(max_keys * query_width);
  T* out_gradient_panels = scratch.take<T>(max_keys * p.value_dim);
  T* out_gradient = scratch.take<T>(max_keys * value_width);

  int64_t batch = 0, head = 0, split = 0;
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(TransposedBackward, AttentionTransposedBackwardParams);
