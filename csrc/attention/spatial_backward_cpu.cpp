// Backward of attention over maps on the CPU. Compiled once per instruction set.
//
// A task goes through a range of tiles, for every query head of one kv head and every entry of a group of the batch. It
// writes the query gradients of a tile when it is done with it.

#include "attention/backward_tile_cpu.h"
#include "attention/differentiate_cpu.h"
#include "attention/spatial_terms_cpu.h"
#include "cpu/kernels.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class SpatialBackward {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  SpatialBackward(const SpatialBackwardParams& params, void* memory) : p(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    const TileScope scope;
    const int64_t num_tiles = p.num_tiles();
    for (int64_t task = begin; task < end; ++task) {
      split = task % p.splits, kv_head = task / p.splits % p.kv_heads;
      const int64_t group = task / p.splits / p.kv_heads;
      part = group * p.splits + split;
      for (int64_t i = p.first_head[kv_head]; i < p.first_head[kv_head + 1]; ++i) {
        head = p.head_list[i], head_scale_sum = 0;
        for (batch = p.batch * group / p.batch_groups; batch < p.batch * (group + 1) / p.batch_groups; ++batch) {
          for (int64_t t = num_tiles * split / p.splits; t < num_tiles * (split + 1) / p.splits; ++t) one_tile(t);
        }
        if (p.head_scale_sums) p.head_scale_sums[part * p.heads + head] = head_scale_sum;
      }
      terms.finish(part);
    }
  }

 private:
  void one_tile(int64_t index) {
    tile.start(index);
    const int64_t num_rows = tile.queries.count(), num_keys = tile.keys.count();
    const Range all{0, num_rows};
    queries = query_rows.of(p.query, batch, head, tile.queries, all);
    out_gradient = out_gradient_rows.of(p.grad_out, batch, head, tile.outputs(), all);
    find_numbers(num_rows);
    std::fill_n(query_gradient, num_rows * query_width, T(0));
    if (relative_query_gradient) std::fill_n(relative_query_gradient, num_rows * query_width, T(0));

    const Tiling stretches = tile_axis(num_keys, kBackwardKeyTile);
    const int64_t blocks = divide_up(num_rows, spatial_backward_rows(p));
    for (int64_t stretch = 0; stretch < stretches.count; ++stretch) {
      const Range columns{stretch * stretches.size, std::min((stretch + 1) * stretches.size, num_keys)};
      key_tile.pack(
          key_rows.of(p.key, batch, kv_head, tile.keys, columns, p.key_size, fill(p.key_fill, p.head_dim)),
          value_rows.of(p.value, batch, kv_head, tile.keys, columns, p.key_size, fill(p.value_fill, p.value_dim)),
          columns.end - columns.begin);
      const bool has_terms = terms.any_on(tile);
      if (has_terms) terms.start_columns(batch, head, tile, columns);
      for (int64_t block = 0; block < blocks; ++block) {
        const Range rows{num_rows * block / blocks, num_rows * (block + 1) / blocks};
        block_of_rows({rows, columns, block * stretches.count + stretch, blocks * stretches.count}, has_terms);
      }
      if (has_terms) terms.finish_columns(split, batch, head, columns);
      add_gradient(p.grad_key, p.key_sums, key_tile.key_gradient, query_width, p.head_dim, columns);
      add_gradient(p.grad_value, p.value_sums, key_tile.value_gradient, key_tile.value_width, p.value_dim, columns);
      add_fill(p.key_fill_sums, key_tile.key_gradient, query_width, p.head_dim, columns);
      add_fill(p.value_fill_sums, key_tile.value_gradient, key_tile.value_width, p.value_dim, columns);
    }
    finish_queries(num_rows);
  }

  const S* fill(const void* rows, int64_t dim) const {
    return rows ? static_cast<const S*>(rows) + kv_head * dim : nullptr;
  }

  void find_numbers(int64_t num_rows) {
    const Box outputs = tile.outputs();
    for (int64_t row = 0; row < num_rows; ++row) {
      const Place place = outputs.on_map(outputs.index(row));
      const int64_t at = p.row(batch, place) * p.heads + head;
      // delta = dO.O - dlse, so that dS = P * (dP - delta).
      deltas[row] = dot_rows<T>(p.out.at<const S>(batch, place, head), out_gradient.from(row).data, p.value_dim);
      if (p.grad_lse) deltas[row] -= static_cast<const T*>(p.grad_lse)[at];
      offsets[row] = exponent_offset(static_cast<const T*>(p.lse)[at]);
    }
  }

  void block_of_rows(const TilePiece& piece, bool has_terms) {
    const Range rows = piece.rows, columns = piece.columns;
    const Range seen = relative_to(intersect(tile.seen_by_any(rows), columns), columns.begin);
    if (seen.empty()) return;
    const T scale = p.score.scale_of<T>(head), left_scale = kFoldsScale<E> ? T(1) : scale;
    const TensorRows<S> of_block = queries.from(rows.begin);
    if (has_terms) {
      terms.start_piece(head, piece, part);
      terms.start_rows(of_block, rows);
    }
    key_tile.add(
        {of_block, out_gradient.from(rows.begin), rows.end - rows.begin, query_gradient + rows.begin * query_width},
        seen, scale, [&](int64_t r, int64_t first_key, int64_t width, T* logits, T* gradients) VK_BODY {
          const int64_t row = rows.begin + r;
          const Range visible = relative_to(intersect(tile.seen_by(row), columns), columns.begin + first_key);
          const RowNumbers<T> numbers{left_scale, offsets[row], deltas[row]};
          if (has_terms) {
            differentiate_terms(row, visible, first_key, numbers, logits, gradients);
          } else {
            differentiate_products(visible, numbers, logits, gradients);
          }
          clear_outside(logits, visible, width);
          clear_outside(gradients, visible, width);
        });
    if (!has_terms) return;
    if (relative_query_gradient) terms.finish_rows(part, relative_query_gradient + rows.begin * query_width);
    terms.finish_piece();
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

  // Adds the gradients of the keys on the map to their sums; or they are the gradient, where no other tile sees them.
  void add_gradient(const MapTensor& gradient, void* all_sums, const T* rows, int64_t width, int64_t dim,
                    Range columns) {
    const Box& box = tile.keys;
    const Range inside = box.on_map(kLast, p.key_size[kLast]);
    T* sums = static_cast<T*>(all_sums) + ((split * p.batch + batch) * p.kv_heads + kv_head) * p.num_keys() * width;
    box.for_each_line(columns, [&](int64_t column, int64_t count, const Place& first) {
      if (!on_map(first, 0) || !on_map(first, 1)) return;
      const Range on_line = intersect(inside, {first.at[kLast], first.at[kLast] + count});
      if (on_line.empty()) return;
      const Place place = box.on_map({{first.at[0], first.at[1], on_line.begin}});
      const T* from = rows + (column - columns.begin + on_line.begin - first.at[kLast]) * width;
      const int64_t keys = on_line.end - on_line.begin;
      if (!all_sums) {
        unpack_rows<T>(from, width, keys, dim, T(1), gradient.at<S>(batch, place, kv_head),
                       gradient.axis_stride[kLast] * box.step[kLast]);
        return;
      }
      T* to = sums + ((place.at[0] * p.key_size[1] + place.at[1]) * p.key_size[2] + place.at[2]) * width;
      for (int64_t i = 0; i < keys; ++i, from += width, to += box.step[kLast] * width) {
        for (int64_t c = 0; c < width; c += kWidth<T>) store(to + c, load(to + c) + load(from + c));
      }
    });
  }

  // And those of the keys beyond it to the fill's.
  void add_fill(double* all_sums, const T* rows, int64_t width, int64_t dim, Range columns) const {
    if (!all_sums) return;
    double* sums = all_sums + (part * p.kv_heads + kv_head) * dim;
    for (int64_t column = columns.begin; column < columns.end; ++column, rows += width) {
      const Place at = tile.keys.index(column);
      if (on_map(at, 0) && on_map(at, 1) && on_map(at, 2)) continue;
      for (int64_t c = 0; c < dim; ++c) sums[c] += rows[c];
    }
  }

  bool on_map(const Place& index, int axis) const {
    return tile.keys.on_map(axis, p.key_size[axis]).contains(index.at[axis]);
  }

  // The scale belongs to the gradient of the products alone.
  void finish_queries(int64_t num_rows) {
    const T scale = p.score.scale_of<T>(head);
    for (int64_t row = 0; row < num_rows; ++row) {
      T* sum = query_gradient + row * query_width;
      if (p.head_scale_sums) head_scale_sum += dot_rows<T>(queries.from(row).data, sum, p.head_dim);
      for (int64_t c = 0; c < query_width; c += kWidth<T>) {
        const Vec<T> scaled = load(sum + c) * scale;
        store(sum + c,
              relative_query_gradient ? scaled + load(relative_query_gradient + row * query_width + c) : scaled);
      }
      const Place place = tile.queries.on_map(tile.queries.index(row));
      if (!p.query_sums) {
        unpack_rows<T>(sum, query_width, 1, p.head_dim, T(1), p.grad_query.at<S>(batch, place, head), 0);
        continue;
      }
      T* to = static_cast<T*>(p.query_sums) +
              (((split * p.batch + batch) * p.heads + head) * most_rows + row) * query_width;
      for (int64_t c = 0; c < query_width; c += kWidth<T>) store(to + c, load(to + c) + load(sum + c));
    }
  }

  static constexpr int kLast = kMaxAxes - 1;

  const SpatialBackwardParams& p;
  Scratch scratch;
  const int64_t most_keys = std::min(round_up(p.most_keys(), kTileAlignment), kBackwardKeyTile);
  const int64_t most_rows = p.most_queries();
  const int64_t most_block = std::min(most_rows, spatial_backward_rows(p));

  SpatialTile tile{p, scratch};
  BackwardTile<S> key_tile{p.head_dim, p.value_dim, most_keys, scratch};
  const int64_t query_width = key_tile.query_width;
  BoxRows<S> query_rows{most_rows, p.head_dim, scratch}, out_gradient_rows{most_rows, p.value_dim, scratch};
  BoxRows<S> key_rows{most_keys, p.head_dim, scratch}, value_rows{most_keys, p.value_dim, scratch};
  T* query_gradient = scratch.take<T>(most_rows * query_width);
  T* relative_query_gradient =
      p.score.on_grid.has_rel_pos() ? scratch.take<T>(most_rows * query_width) : nullptr;  // without the scale
  T* deltas = scratch.take<T>(most_rows);
  T* offsets = scratch.take<T>(most_rows);
  SpatialTerms<T> terms{
      p,
      {most_block, most_keys, divide_up(most_rows, most_block) * tile_axis(p.most_keys(), kBackwardKeyTile).count,
       most_block, true},
      scratch};

  int64_t batch = 0, head = 0, kv_head = 0, split = 0, part = 0;
  double head_scale_sum = 0;
  TensorRows<S> queries{}, out_gradient{};
};

template <class S>
void sum_parts(const SpatialSum& p, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const int64_t width = round_up(p.dim, kWidth<T>), tokens = p.size[0] * p.size[1] * p.size[2];
  const int64_t part = p.batch * p.heads * tokens * width;
  for (int64_t pair = begin; pair < end; ++pair) {
    T* sums = static_cast<T*>(p.parts) + pair * tokens * width;
    for (int64_t line = 0; line < p.size[0] * p.size[1]; ++line) {
      T* first = sums + line * p.size[2] * width;
      for (int64_t i = 0; i < p.size[2]; ++i) sum_splits(first + i * width, width, p.num_parts, part);
      const Place place{{line / p.size[1], line % p.size[1], 0}};
      unpack_rows<T>(first, width, p.size[2], p.dim, T(1), p.target.at<S>(pair / p.heads, place, pair % p.heads),
                     p.target.axis_stride[kMaxAxes - 1]);
    }
  }
}

}  // namespace

int64_t spatial_attention_backward_scratch(const SpatialBackwardParams& params) {
  int64_t size = 0;
  dispatch_dtype(params.dtype, [&]<class S>(S) { size = SpatialBackward<S>(params, nullptr).scratch_size(); });
  return size;
}

void spatial_attention_backward(const SpatialBackwardParams& params, int64_t begin, int64_t end, void* scratch) {
  dispatch_dtype(params.dtype, [&]<class S>(S) { SpatialBackward<S>(params, scratch).run(begin, end); });
}

void sum_spatial_parts(const SpatialSum& params, int64_t begin, int64_t end) {
  dispatch_dtype(params.dtype, [&]<class S>(S) { sum_parts<S>(params, begin, end); });
}

}  // namespace vitkernels::VK_ISA
