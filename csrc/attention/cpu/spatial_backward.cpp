// Backward of attention over maps on the CPU. Compiled once per instruction set.
//
// A task loops over a range of query tiles, for every query head of one kv head and every batch of a group. The query
// gradient of a tile is written after its last KV tile.

#include "attention/cpu/backward_tile.h"
#include "attention/cpu/differentiate.h"
#include "attention/cpu/spatial_terms.h"
#include "attention/cpu/tile_tokens.h"
#include "cpu/make_kernel.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class SpatialBackward {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  SpatialBackward(const SpatialBackwardParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    const TileScope scope;
    std::fill_n(zeros, std::max(p.head_dim, p.value_dim), S{});
    const int64_t num_tiles = p.num_tiles();
    for (int64_t task = begin; task < end; ++task) {
      split = task % params.splits, kv_head = task / params.splits % p.kv_heads;
      const int64_t group = task / params.splits / p.kv_heads;
      part = group * params.splits + split;
      const Range batches{p.batch * group / params.batch_groups, p.batch * (group + 1) / params.batch_groups};
      for (batch = batches.begin; batch < batches.end; ++batch) clear_sums();
      for (int64_t i = p.groups.first_head[kv_head]; i < p.groups.first_head[kv_head + 1]; ++i) {
        head = p.groups.head_list[i], head_scale_sum = 0;
        for (batch = batches.begin; batch < batches.end; ++batch) {
          const Range of_split{num_tiles * split / params.splits, num_tiles * (split + 1) / params.splits};
          if (!of_split.empty()) find(of_split.begin);
          for (int64_t t = of_split.begin; t < of_split.end; ++t) {
            std::swap(present, next);
            tile.start(present.boxes);
            next_share = 0;
            if (t + 1 < of_split.end) {
              find(t + 1);
              const bool is_short = tile.keys.count() <= kSpatialBackwardKeyTile;
              if (is_short) next_share = divide_up(next.count(), std::max<int64_t>(tile.queries.count(), 1));
            }
            one_tile();
          }
        }
        if (params.head_scale_sums) params.head_scale_sums[part * p.heads + head] = head_scale_sum;
      }
      terms.finish(part);
    }
  }

 private:
  // The rows of all tensors that a tile of a head reads and writes.
  struct Tokens : TileInputs<S> {
    TileBoxes boxes;
    TileTokens<const S> outputs, out_gradients;
    TileTokens<S> query_gradients, key_gradients, value_gradients;  // null beyond the map

    Tokens(const SpatialParams& p, Scratch& scratch)
        : TileInputs<S>(p, scratch),
          outputs(p.max_queries(), p.value_dim, scratch),
          out_gradients(p.max_queries(), p.value_dim, scratch),
          query_gradients(p.max_queries(), p.head_dim, scratch),
          key_gradients(p.max_keys(), p.head_dim, scratch),
          value_gradients(p.max_keys(), p.value_dim, scratch) {}

    int64_t count() const { return std::max(outputs.count, this->keys.count); }
    VK_INLINE void prefetch(Range tokens, int turn) const {
      if (turn == 0) this->queries.prefetch(tokens);
      if (turn == 1) outputs.prefetch(tokens);
      if (turn == 2) out_gradients.prefetch(tokens);
      if (turn == 3) this->keys.prefetch(tokens);
      if (turn == 4) this->values.prefetch(tokens);
      if (turn == 5) query_gradients.prefetch(tokens);
      if (turn == 6) key_gradients.prefetch(tokens);
      if (turn == 7) value_gradients.prefetch(tokens);
    }
  };

  void find(int64_t index) {
    next.boxes = tile.boxes_of(index);
    const Box &queries = next.boxes.queries, &outputs = next.boxes.outputs, &keys = next.boxes.keys;
    next.TileInputs<S>::find(p, next.boxes, batch, head, zeros);
    next.outputs.find(p.out, batch, head, outputs);
    if (params.grad_out.is_laid_out_as(p.out)) {
      next.out_gradients.find_as(next.outputs, p.out, params.grad_out);
    } else {
      next.out_gradients.find(params.grad_out, batch, head, outputs);
    }
    if (!params.query_sums.are_wanted()) next.query_gradients.find(params.grad_query, batch, head, queries);
    if (!params.key_sums.are_wanted())
      next.key_gradients.find(params.grad_key, batch, kv_head, keys, p.key_size, nullptr);
    if (!params.value_sums.are_wanted())
      next.value_gradients.find(params.grad_value, batch, kv_head, keys, p.key_size, nullptr);
  }

  // The partial sums of this task, for one batch.
  void clear_sums() const {
    clear_sums(params.key_sums);
    clear_sums(params.value_sums);
  }
  void clear_sums(const MapPartialSums& sums) const {
    if (!sums.are_wanted()) return;
    const SplitTokens& tokens = sums.of_split[split];
    std::fill_n(sums.part<T>(split, batch, kv_head), (tokens.shared.end - tokens.shared.begin) * sums.width, T(0));
    Box map;
    std::copy_n(p.key_size, kMaxAxes, map.size);
    map.for_each_line(tokens.owned, [&](int64_t, int64_t count, const Coord& first) {
      T* row = sums.owned.at<T>(batch, first, kv_head);
      for (int64_t i = 0; i < count; ++i, row += sums.owned.axis_stride[kLast]) std::fill_n(row, sums.width, T(0));
    });
  }

  void one_tile() {
    const int64_t num_rows = tile.queries.count(), num_keys = tile.keys.count();
    find_numbers(num_rows);
    std::fill_n(query_gradient, num_rows * query_width, T(0));
    if (relative_query_gradient) std::fill_n(relative_query_gradient, num_rows * query_width, T(0));

    const Tiling kv_tiles = tile_axis(num_keys, kSpatialBackwardKeyTile);
    const int64_t blocks = divide_up(num_rows, spatial_backward_rows(p));
    for (int64_t kv_tile = 0; kv_tile < kv_tiles.count; ++kv_tile) {
      const Range columns{kv_tile * kv_tiles.size, std::min((kv_tile + 1) * kv_tiles.size, num_keys)};
      key_tile.pack(present.keys.from(columns.begin), present.values.from(columns.begin), columns.end - columns.begin);
      const bool has_terms = terms.any_on(tile);
      if (has_terms) terms.start_columns(batch, head, tile, columns);
      for (int64_t block = 0; block < blocks; ++block) {
        const Range rows{num_rows * block / blocks, num_rows * (block + 1) / blocks};
        block_of_rows({rows, columns, block * kv_tiles.count + kv_tile, blocks * kv_tiles.count}, has_terms);
      }
      if (has_terms) terms.finish_columns(split, batch, head, columns);
      add_gradient(present.key_gradients, params.key_sums, key_tile.key_gradient, query_width, p.head_dim, columns);
      add_gradient(present.value_gradients, params.value_sums, key_tile.value_gradient, key_tile.value_width,
                   p.value_dim, columns);
      add_fill(params.key_fill_sums, key_tile.key_gradient, query_width, p.head_dim, columns);
      add_fill(params.value_fill_sums, key_tile.value_gradient, key_tile.value_width, p.value_dim, columns);
    }
    finish_queries(num_rows);
  }

  void find_numbers(int64_t num_rows) {
    const Box& outputs = tile.outputs;
    outputs.for_each_line({0, num_rows}, [&](int64_t first, int64_t count, const Coord& index) {
      int64_t at = p.row(batch, outputs.on_map(index)) * p.heads + head;
      for (int64_t row = first; row < first + count; ++row, at += outputs.step[kLast] * p.heads) {
        // delta = dO.O - dlse, so that dS = P * (dP - delta).
        deltas[row] = dot_rows<T>(present.outputs[row], present.out_gradients[row], p.value_dim);
        if (params.grad_lse) deltas[row] -= static_cast<const T*>(params.grad_lse)[at];
        offsets[row] = exponent_offset(static_cast<const T*>(p.lse)[at]);
      }
    });
  }

  void block_of_rows(const LogitTile& logit_tile, bool has_terms) {
    const Range rows = logit_tile.rows, columns = logit_tile.columns;
    const Range seen = relative_to(intersect(tile.seen_by_any(rows), columns), columns.begin);
    if (seen.empty()) return;
    const T scale = p.score.scale_of<T>(head), left_scale = kFoldsScale<E> ? T(1) : scale;
    const ScatteredRows<S> of_block = present.queries.from(rows.begin);
    if (has_terms) {
      terms.start_logit_tile(head, logit_tile, part);
      terms.start_rows(of_block, rows);
    }
    key_tile.add(
        {of_block, present.out_gradients.from(rows.begin), rows.end - rows.begin,
         query_gradient + rows.begin * query_width},
        seen, scale,
        [&](int64_t r, int64_t first_key, int64_t width, T* logits, T* gradients) VK_BODY {
          const int64_t row = rows.begin + r;
          const Range visible = relative_to(intersect(tile.seen_by(row), columns), columns.begin + first_key);
          const RowNumbers<T> numbers{left_scale, offsets[row], deltas[row]};
          if (has_terms && terms.is_bias()) {
            differentiate_bias(row, visible, first_key, numbers, logits, gradients);
          } else if (has_terms) {
            differentiate_terms(row, visible, first_key, numbers, logits, gradients);
          } else {
            differentiate_products(visible, numbers, logits, gradients);
          }
          clear_outside<T>(logits, visible, width);
          clear_outside<T>(gradients, visible, width);
        },
        [&](int turn) VK_BODY { next.prefetch({rows.begin * next_share, rows.end * next_share}, turn); });
    if (!has_terms) return;
    if (relative_query_gradient) terms.finish_rows(part, relative_query_gradient + rows.begin * query_width);
    terms.finish_logit_tile();
  }

  // When the terms reduce to a bias: its pointer stays in a register.
  VK_INLINE void differentiate_bias(int64_t row, Range visible, int64_t first_key, RowNumbers<T> with, T* logits,
                                    T* gradients) {
    const BiasRow<T> score = terms.bias_row(row, first_key);
    T* sums = terms.bias_gradient_row(row, first_key);
    if (!sums) return differentiate_score(score, visible, with, logits, gradients, [](auto...) {});
    differentiate_score(score, visible, with, logits, gradients,
                        [&](Vec<T> grad, Vec<T>, int64_t c, Range lanes)
                            VK_BODY { store(sums + c, load(sums + c) + keep(grad, lanes, T(0))); });
  }

  VK_WHOLE void differentiate_terms(int64_t row, Range visible, int64_t first_key, RowNumbers<T> with, T* logits,
                                    T* gradients) {
    const ScoreRow<T> score = terms.row(row, first_key);
    differentiate_score(score, visible, with, logits, gradients,
                        [&](Vec<T> grad, Vec<T> product, int64_t c, Range lanes) {
                          terms.add_gradient(row, first_key, grad, product, c, lanes);
                        });
    terms.finish_row(row);
  }

  // Adds the gradients of keys inside the map to their partial sums, or stores them if no other tile sees these keys.
  void add_gradient(const TileTokens<S>& gradients, const MapPartialSums& sums, const T* rows, int64_t width,
                    int64_t dim, Range columns) {
    if (!sums.are_wanted()) {
      for (int64_t column = columns.begin; column < columns.end; ++column, rows += width) {
        if (gradients[column]) unpack_rows<T>(rows, width, 1, dim, T(1), gradients[column], 0);
      }
      return;
    }
    const SplitTokens& tokens = sums.of_split[split];
    T* part = sums.part<T>(split, batch, kv_head);
    const int64_t step = tile.keys.step[kLast], stride = step * sums.owned.axis_stride[kLast];
    tile.keys.for_each_line_on(p.key_size, columns, [&](int64_t column, int64_t count, const Coord& first) {
      const Coord coord = tile.keys.on_map(first);
      const T* from = rows + (column - columns.begin) * width;
      T* owned = sums.owned.at<T>(batch, coord, kv_head);
      int64_t token = (coord.at[0] * p.key_size[1] + coord.at[1]) * p.key_size[2] + coord.at[2];
      for (int64_t i = 0; i < count; ++i, from += width, owned += stride, token += step) {
        T* to = token < tokens.owned.begin ? part + (token - tokens.shared.begin) * width : owned;
        for (int64_t c = 0; c < width; c += kWidth<T>) store(to + c, load(to + c) + load(from + c));
      }
    });
  }

  // Keys outside the map contribute to the gradient of the fill.
  void add_fill(double* all_sums, const T* rows, int64_t width, int64_t dim, Range columns) const {
    if (!all_sums) return;
    double* sums = all_sums + (part * p.kv_heads + kv_head) * dim;
    for (int64_t column = columns.begin; column < columns.end; ++column, rows += width) {
      const Coord at = tile.keys.index(column);
      if (on_map(at, 0) && on_map(at, 1) && on_map(at, 2)) continue;
      for (int64_t c = 0; c < dim; ++c) sums[c] += rows[c];
    }
  }

  bool on_map(const Coord& index, int axis) const {
    return tile.keys.on_map(axis, p.key_size[axis]).contains(index.at[axis]);
  }

  // The scale applies to the products alone, not to the relative logits.
  void finish_queries(int64_t num_rows) {
    const T scale = p.score.scale_of<T>(head);
    for (int64_t row = 0; row < num_rows; ++row) {
      T* sum = query_gradient + row * query_width;
      if (params.head_scale_sums) head_scale_sum += dot_rows<T>(present.queries[row], sum, p.head_dim);
      for (int64_t c = 0; c < query_width; c += kWidth<T>) {
        const Vec<T> scaled = load(sum + c) * scale;
        store(sum + c,
              relative_query_gradient ? scaled + load(relative_query_gradient + row * query_width + c) : scaled);
      }
      if (!params.query_sums.are_wanted()) {
        unpack_rows<T>(sum, query_width, 1, p.head_dim, T(1), present.query_gradients[row], 0);
        continue;
      }
      T* to = split == 0 ? params.query_sums.owned.at<T>(batch, tile.queries.index(row), head)
                         : params.query_sums.part<T>(split, batch, head) + row * query_width;
      for (int64_t c = 0; c < query_width; c += kWidth<T>) store(to + c, load(to + c) + load(sum + c));
    }
  }

  static constexpr int kLast = kMaxAxes - 1;

  const SpatialBackwardParams& params;
  const SpatialParams& p = params.forward;
  Scratch scratch;
  const int64_t max_keys = std::min(round_up(p.max_keys(), kTileAlignment), kSpatialBackwardKeyTile);
  const int64_t max_rows = p.max_queries();
  const int64_t max_block = std::min(max_rows, spatial_backward_rows(p));

  SpatialTile tile{p, scratch};
  BackwardTile<S, ScatteredRows<S>> key_tile{p.head_dim, p.value_dim, max_keys, scratch};
  const int64_t query_width = key_tile.query_width;
  S* zeros = scratch.take<S>(std::max(p.head_dim, p.value_dim));
  T* query_gradient = scratch.take<T>(max_rows * query_width);
  T* relative_query_gradient =
      p.score.by_offset.has_rel_pos() ? scratch.take<T>(max_rows * query_width) : nullptr;  // without the scale
  T* deltas = scratch.take<T>(max_rows);
  T* offsets = scratch.take<T>(max_rows);
  SpatialTerms<T> terms{
      p,
      {max_block, max_keys, divide_up(max_rows, max_block) * tile_axis(p.max_keys(), kSpatialBackwardKeyTile).count,
       max_block, true},
      scratch};

  int64_t batch = 0, head = 0, kv_head = 0, split = 0, part = 0;
  double head_scale_sum = 0;
  int64_t next_share = 0;  // tokens of the next tile to prefetch per row of this one

  Tokens present{p, scratch}, next{p, scratch};
};

// Adds the partial sums. Where they accumulate in the gradient itself, tokens of a single split are final.
template <class S>
class SumParts {
  using T = Compute<S>;

 public:
  SumParts(const MapPartialSums& params, void*) : p(params) {}

  void run(int64_t begin, int64_t end) {
    const int64_t lines = p.size[0] * p.size[1];
    const bool is_in_place = p.owned.data == p.gradient.data;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / lines / p.heads, head = task / lines % p.heads, line = task % lines;
      const Coord coord{{line / p.size[1], line % p.size[1], 0}};
      S* to = p.gradient.at<S>(batch, coord, head);
      const T* from = p.owned.at<const T>(batch, coord, head);
      for (int64_t i = 0; i < p.size[2]; ++i) {
        const int64_t token = line * p.size[2] + i;
        const auto is_shared = [&](int64_t split) { return p.of_split[split].shared.contains(token); };
        bool is_done = is_in_place;
        for (int64_t split = 1; split < p.splits; ++split) is_done = is_done && !is_shared(split);
        for (int64_t c = 0; c < p.dim && !is_done; c += kWidth<T>) {
          Vec<T> sum = load(from + c);
          for (int64_t split = 1; split < p.splits; ++split) {
            if (!is_shared(split)) continue;
            const T* part = p.part<T>(split, batch, head);
            sum += load(part + (token - p.of_split[split].shared.begin) * p.width + c);
          }
          store_narrowed<T>(to + c, sum, std::min<int64_t>(p.dim - c, kWidth<T>));
        }
        to += p.gradient.axis_stride[kMaxAxes - 1], from += p.owned.axis_stride[kMaxAxes - 1];
      }
    }
  }

 private:
  const MapPartialSums& p;
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(SpatialBackward, SpatialBackwardParams);
VK_KERNEL(SumParts, MapPartialSums);
