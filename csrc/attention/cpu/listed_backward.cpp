// Backward of attention to listed keys on the CPU. Compiled once per instruction set.
//
// A task loops over a range of groups, for every query head of one kv head. The gradients of a KV tile are added to the
// task's partial sums, the query gradient of a chunk is written after its last KV tile.

#include "attention/cpu/backward_tile.h"
#include "attention/cpu/differentiate.h"
#include "attention/cpu/listed_group.h"
#include "attention/cpu/listed_sums.h"
#include "cpu/make_kernel.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class ListedBackward {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  ListedBackward(const ListedBackwardParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }
  int64_t parts_size() const { return sums.size(); }

  void run(int64_t begin, int64_t end) {
    const TileScope tiles;
    std::fill_n(zeros, std::max(p.head_dim, p.value_dim), S{});
    for (int64_t task = begin; task < end; ++task) {
      sums.start(task);
      sums.for_each_head([&](int64_t batch, int64_t head, Range groups) {
        head_of_split(batch, head, groups);
        return head_scale_sum;
      });
    }
  }

  void finish(int64_t begin, int64_t end) { sums.template finish<S>(begin, end); }

 private:
  // The rows of all tensors that a group of a head reads and writes.
  struct Rows : ListedGroup<S> {
    ListedRows<const S> outputs, out_gradients;
    ListedRows<S> query_gradients;

    Rows(const ListedParams& params, Scratch& scratch)
        : ListedGroup<S>(params, scratch),
          outputs(params.queries.max_tokens(), params.problem.value_dim, scratch),
          out_gradients(params.queries.max_tokens(), params.problem.value_dim, scratch),
          query_gradients(params.queries.max_tokens(), params.problem.head_dim, scratch) {}

    int64_t count() const { return std::max(this->queries.count, this->keys.count); }
    VK_INLINE void prefetch(Range tokens, int turn) const {
      if (turn == 0) this->queries.prefetch(tokens);
      if (turn == 1) outputs.prefetch(tokens);
      if (turn == 2) out_gradients.prefetch(tokens);
      if (turn == 3) this->keys.prefetch(tokens);
      if (turn == 4) this->values.prefetch(tokens);
      if (turn == 5) query_gradients.prefetch(tokens);
    }
  };

  void head_of_split(int64_t batch, int64_t head, Range groups) {
    head_scale_sum = 0;
    if (!groups.empty()) find(batch, head, groups.begin);
    for (int64_t group = groups.begin; group < groups.end; ++group) {
      std::swap(present, next);
      next_share = 0;
      if (group + 1 < groups.end) {
        find(batch, head, group + 1);
        const bool is_short = present.keys.count <= kSpatialBackwardKeyTile;
        if (is_short) next_share = divide_up(next.count(), std::max<int64_t>(present.queries.count, 1));
      }
      const int64_t count = present.queries.count, chunks = divide_up(count, max_chunk);
      for (int64_t i = 0; i < chunks; ++i) chunk_of_queries({count * i / chunks, count * (i + 1) / chunks});
    }
  }

  void find(int64_t batch, int64_t head, int64_t group) {
    next.find(forward, batch, head, group, zeros);
    const int64_t count = next.queries.count;
    next.outputs.find(forward.out, batch, head, next.query_tokens, count);
    next.out_gradients.find(params.grad_out, batch, head, next.query_tokens, count);
    next.query_gradients.find(params.grad_query, batch, head, next.query_tokens, count);
  }

  void chunk_of_queries(Range chunk) {
    const int64_t count = chunk.end - chunk.begin, num_keys = present.keys.count;
    find_numbers(chunk);
    const Tiling kv_tiles = tile_axis(num_keys, kSpatialBackwardKeyTile);
    if (kv_tiles.count != 1) std::fill_n(query_gradient, count * query_width, T(0));
    for (int64_t kv_tile = 0; kv_tile < kv_tiles.count; ++kv_tile) {
      const Range columns{kv_tile * kv_tiles.size, std::min((kv_tile + 1) * kv_tiles.size, num_keys)};
      key_tile.pack(present.keys.from(columns.begin), present.values.from(columns.begin), columns.end - columns.begin);
      const int64_t blocks = divide_up(count, kBackwardQueryBlock);
      for (int64_t block = 0; block < blocks; ++block) {
        block_of_rows(chunk, {count * block / blocks, count * (block + 1) / blocks}, columns.end - columns.begin,
                      kv_tiles.count == 1);
      }
      add_gradients(columns);
    }
    finish_queries(chunk);
  }

  void find_numbers(Range chunk) {
    const T* lse = static_cast<const T*>(forward.lse) + present.batch * p.num_queries() * p.heads + present.head;
    const T* grad_lse = static_cast<const T*>(params.grad_lse);
    if (grad_lse) grad_lse += present.batch * p.num_queries() * p.heads + present.head;
    for (int64_t row = chunk.begin; row < chunk.end; ++row) {
      const int64_t at = present.query_tokens[row] * p.heads, r = row - chunk.begin;
      // delta = dO.O - dlse, so that dS = P * (dP - delta).
      deltas[r] = dot_rows<T>(present.outputs[row], present.out_gradients[row], p.value_dim);
      if (grad_lse) deltas[r] -= grad_lse[at];
      offsets[r] = exponent_offset(lse[at]);
    }
  }

  // `rows` count from the chunk's first.
  void block_of_rows(Range chunk, Range rows, int64_t columns, bool is_only_tile) {
    const T scale = p.score.scale_of<T>(present.head), left_scale = kFoldsScale<E> ? T(1) : scale;
    const int64_t first = chunk.begin + rows.begin;
    key_tile.add(
        {present.queries.from(first), present.out_gradients.from(first), rows.end - rows.begin,
         query_gradient + rows.begin * query_width, is_only_tile},
        {0, columns}, scale,
        [&](int64_t r, int64_t, int64_t width, T* logits, T* gradients) VK_BODY {
          const Range visible{0, columns};
          differentiate_products(visible, RowNumbers<T>{left_scale, offsets[rows.begin + r], deltas[rows.begin + r]},
                                 logits, gradients);
          clear_outside<T>(logits, visible, width);
          clear_outside<T>(gradients, visible, width);
        },
        [&](int turn)
            VK_BODY { next.prefetch({first * next_share, (first + rows.end - rows.begin) * next_share}, turn); });
  }

  void add_gradients(Range columns) {
    const T *key_row = key_tile.key_gradient, *value_row = key_tile.value_gradient;
    for (int64_t column = columns.begin; column < columns.end; ++column) {
      const int64_t token = present.key_tokens[column];
      if (token >= 0) {
        add_row(sums.keys + token * query_width, key_row, query_width);
        add_row(sums.values + token * value_width, value_row, value_width);
      }
      key_row += query_width, value_row += value_width;
    }
  }

  VK_INLINE static void add_row(T* to, const T* row, int64_t width) {
    for (int64_t c = 0; c < width; c += kWidth<T>) store(to + c, load(to + c) + load(row + c));
  }

  void finish_queries(Range chunk) {
    const T scale = p.score.scale_of<T>(present.head);
    const T* sum = query_gradient;
    for (int64_t row = chunk.begin; row < chunk.end; ++row, sum += query_width) {
      if (params.head_scale_sums) head_scale_sum += dot_rows<T>(present.queries[row], sum, p.head_dim);
      unpack_rows<T>(sum, query_width, 1, p.head_dim, scale, present.query_gradients[row], 0);
    }
  }

  const ListedBackwardParams& params;
  const ListedParams& forward = params.forward;
  const Problem& p = forward.problem;
  Scratch scratch;
  const int64_t max_keys = std::min(round_up(forward.keys.max_tokens(), kTileAlignment), kSpatialBackwardKeyTile);
  const int64_t max_chunk = std::min(forward.queries.max_tokens(), 4 * kBackwardQueryBlock);

  BackwardTile<S, ScatteredRows<S>> key_tile{p.head_dim, p.value_dim, max_keys, scratch};
  const int64_t query_width = key_tile.query_width, value_width = key_tile.value_width;
  ListedSums<T> sums{params, query_width, value_width};
  S* zeros = scratch.take<S>(std::max(p.head_dim, p.value_dim));
  T* query_gradient = scratch.take<T>(max_chunk * query_width);  // of a chunk
  T* deltas = scratch.take<T>(max_chunk);
  T* offsets = scratch.take<T>(max_chunk);

  Rows present{forward, scratch}, next{forward, scratch};
  double head_scale_sum = 0;
  int64_t next_share = 0;  // tokens of the next group to prefetch per row of this one
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(ListedBackward, ListedBackwardParams);
