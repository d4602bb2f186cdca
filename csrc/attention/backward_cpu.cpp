// Backward of softmax attention on the CPU. Compiled once per instruction set.
//
// Five products per tile of keys and block of queries:
//   S = Q K^T, dP = dO V^T, then with P = exp(S - lse) and dS = P * (dP - delta):
//   dV += P^T dO, dK += dS^T Q, dQ += dS K.
// A task is a range of keys (a split) of a group of heads that share a gradient. It alone writes their key and value
// gradients and these keys' columns of the bias gradients; sums over batch and heads run inside it, in order.

#include "attention/differentiate_cpu.h"
#include "attention/logits_cpu.h"
#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/scratch.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class Backward {
  using T = Compute<S>;

 public:
  Backward(const AttentionBackwardParams& params, void* memory) : p(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  int64_t parts_size() const { return p.splits * p.heads * p.num_rows() * query_width * int64_t(sizeof(T)); }

  void run(int64_t begin, int64_t end) {
    for_each_key_tile(p, begin, end, [&](int64_t of_batch, int64_t of_kv_head, int64_t of_split, Range tile) {
      batch = of_batch, kv_head = of_kv_head, split = of_split;
      start_sequence();
      tile_of_keys(tile);
    });
  }

  // dQ of some (batch, head) pairs: the splits' parts, added in order, times the scale.
  void finish(int64_t begin, int64_t end) {
    const int64_t part = p.heads * p.num_rows() * query_width;
    for (int64_t pair = begin; pair < end; ++pair) {
      batch = pair / p.heads, head = pair % p.heads;
      start_sequence();
      for (int64_t query = 0; query < axis.num_queries; ++query) {
        const int64_t token = sequence.first_query + query;
        T* sum = query_gradient(0, query);
        sum_splits(sum, query_width, p.splits, part);
        if (p.query_dot) {
          static_cast<T*>(p.query_dot)[head * p.num_rows() + sequence.first_row + query] =
              dot_with_tensor<T>(p.query.at<const S>(batch, token, head), sum, p.head_dim);
        }
        unpack_rows<T>(sum, query_width, 1, p.head_dim, p.score.scale_of<T>(head),
                       p.grad_query.at<S>(batch, token, head), p.grad_query.token_stride);
      }
    }
  }

 private:
  void start_sequence() {
    sequence = p.sequence(batch);
    axis = sequence.axis;
  }

  void tile_of_keys(Range tile) {
    const int64_t count = tile.end - tile.begin, first = sequence.first_key + tile.begin;
    const S* key_rows = p.key.at<const S>(batch, first, kv_head);
    const S* value_rows = p.value.at<const S>(batch, first, kv_head);
    key_tile.pack(key_rows, p.key.token_stride, count);
    pack_transposed<T>(value_rows, p.value.token_stride, count, p.value_dim, value_panels);
    pack_rows<T>(key_rows, p.key.token_stride, count, p.head_dim, T(1), key_copy, query_width);
    std::fill_n(key_gradient, count * query_width, T(0));
    std::fill_n(value_gradient, count * value_width, T(0));

    const int64_t blocks = divide_up(axis.num_queries, kBackwardQueryBlock);
    for (int64_t i = p.first_head[kv_head]; i < p.first_head[kv_head + 1]; ++i) {
      head = p.head_list[i];
      for (int64_t block = 0; block < blocks; ++block) {
        block_of_queries({axis.num_queries * block / blocks, axis.num_queries * (block + 1) / blocks}, tile);
      }
    }
    unpack_rows<T>(key_gradient, query_width, count, p.head_dim, T(1), p.grad_key.at<S>(batch, first, kv_head),
                   p.grad_key.token_stride);
    unpack_rows<T>(value_gradient, value_width, count, p.value_dim, T(1), p.grad_value.at<S>(batch, first, kv_head),
                   p.grad_value.token_stride);
  }

  void block_of_queries(Range rows, Range tile) {
    const Range seen = relative_to(intersect(axis.any_keys(rows), tile), tile.begin);
    if (seen.empty()) return;
    const int64_t count = rows.end - rows.begin;
    const int64_t width = round_up(seen.end, kWidth<T>);

    pack_rows<T>(p.query.at<const S>(batch, sequence.first_query + rows.begin, head), p.query.token_stride, count,
                 p.head_dim, p.score.scale_of<T>(head), queries, query_width);  // [count, d]
    pack_rows<T>(p.grad_out.at<const S>(batch, sequence.first_query + rows.begin, head), p.grad_out.token_stride, count,
                 p.value_dim, T(1), out_gradient, value_width);          // [count, dv]
    key_tile.multiply(queries, count, seen.end, logits, logits_stride);  // [count, seen]
    matmul<T, false>({out_gradient, value_width, 1}, {value_panels, kPanel<T>, p.value_dim * kPanel<T>}, count, width,
                     p.value_dim, gradients, logits_stride);  // [count, width]

    for (int64_t r = 0; r < count; ++r) {
      const int64_t query = rows.begin + r;
      const Range visible = relative_to(intersect(axis.keys(query), tile), tile.begin);
      const int64_t row = (sequence.first_row + query) * p.heads + head;
      // delta = dO.O - dlse, so that dS = P * (dP - delta).
      T delta = dot_with_tensor<T>(p.out.at<const S>(batch, sequence.first_query + query, head),
                                   out_gradient + r * value_width, p.value_dim);
      if (p.grad_lse) delta -= static_cast<const T*>(p.grad_lse)[row];
      differentiate_row(p.score, {batch, head, query, tile.begin, visible, seen.end}, static_cast<const T*>(p.lse)[row],
                        delta, logits + r * logits_stride, gradients + r * logits_stride);
    }

    // P^T and dS^T are read in place: a column stride of one.
    matmul<T, true>({logits, 1, logits_stride}, {out_gradient, value_width, kPanel<T>}, seen.end, value_width, count,
                    value_gradient, value_width);  // [keys, dv]
    matmul<T, true>({gradients, 1, logits_stride}, {queries, query_width, kPanel<T>}, seen.end, query_width, count,
                    key_gradient, query_width);  // [keys, d]
    matmul<T, true>({gradients, logits_stride, 1}, {key_copy, query_width, kPanel<T>}, count, query_width, seen.end,
                    query_gradient(split, rows.begin), query_width);  // [count, d]
  }

  T* query_gradient(int64_t of_split, int64_t query) const {
    const int64_t row = (of_split * p.heads + head) * p.num_rows() + sequence.first_row + query;
    return static_cast<T*>(p.grad_query_parts) + row * query_width;
  }

  const AttentionBackwardParams& p;
  Scratch scratch;
  const int64_t most_keys = std::min(round_up(p.num_keys(), kTileAlignment), kBackwardKeyTile);
  const int64_t query_width = round_up(p.head_dim, kWidth<T>);
  const int64_t value_width = round_up(p.value_dim, kWidth<T>);
  const int64_t logits_stride = (most_keys / kWidth<T> | 1) * kWidth<T>;

  T* queries = scratch.take<T>(kBackwardQueryBlock * query_width);
  T* out_gradient = scratch.take<T>(kBackwardQueryBlock * value_width);
  T* logits = scratch.take<T>(kBackwardQueryBlock * logits_stride);     // then P
  T* gradients = scratch.take<T>(kBackwardQueryBlock * logits_stride);  // dP, then dS
  KeyTile<T> key_tile{scratch.take<T>(most_keys * p.head_dim), scratch.take<T>(kMostLastKeys* query_width), p.head_dim,
                      query_width};
  T* value_panels = scratch.take<T>(most_keys * p.value_dim);
  T* key_copy = scratch.take<T>(most_keys * query_width);
  T* key_gradient = scratch.take<T>(most_keys * query_width);
  T* value_gradient = scratch.take<T>(most_keys * value_width);

  int64_t batch = 0, head = 0, kv_head = 0, split = 0;
  Sequence sequence;
  Axis axis;
};

}  // namespace

int64_t attention_backward_scratch(const AttentionBackwardParams& params) {
  int64_t size = 0;
  dispatch_dtype(params.dtype, [&]<class S>(S) { size = Backward<S>(params, nullptr).scratch_size(); });
  return size;
}

int64_t attention_backward_parts(const AttentionBackwardParams& params) {
  int64_t size = 0;
  dispatch_dtype(params.dtype, [&]<class S>(S) { size = Backward<S>(params, nullptr).parts_size(); });
  return size;
}

void attention_backward(const AttentionBackwardParams& params, int64_t begin, int64_t end, void* scratch) {
  dispatch_dtype(params.dtype, [&]<class S>(S) { Backward<S>(params, scratch).run(begin, end); });
}

void finish_query_gradient(const AttentionBackwardParams& params, int64_t begin, int64_t end) {
  dispatch_dtype(params.dtype, [&]<class S>(S) { Backward<S>(params, nullptr).finish(begin, end); });
}

}  // namespace vitkernels::VK_ISA
