// Channel attention on the CPU: products of channels over the tokens, their softmax, and what the values' channels read
// with it. Compiled once per instruction set.

#include "cpu/make_kernel.h"
#include "linear_attention/cpu/channel_tile.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class ChannelAttention {
  using E = Operand<S>;
  using T = Sum<E>;

 public:
  ChannelAttention(const ChannelParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }
  int64_t parts_size() const { return parts.bytes(); }

  void run(int64_t begin, int64_t end) {
    [[maybe_unused]] const TileScope tiles;
    run_channel_tasks(*this, parts, {begin, end}, p.num_tokens, p.num_values, sums);
  }

  // acc: the products, then the sums of squares of query's and key's channels.
  void sum(int64_t pair, Range tokens, T* acc) {
    const int64_t batch = pair / p.heads, head = pair % p.heads;
    for_each_channel_block(tokens, [&](int64_t first, int64_t count) {
      const TokensAsDepth<E> q(rows_of<S>(p.query, batch, first, head), count, p.head_dim, false, rows);  // [d, tokens]
      const TokensAsDepth<E> k(rows_of<S>(p.key, batch, first, head), count, p.value_dim, true, keys);  // [tokens, dv]
      matmul<E, true>(q.as_a(), k.as_b(), p.head_dim, width, padded_depth<E>(count), acc, width);       // [d, dv]
      if (!p.normalizes) return;
      T* const squares = acc + p.head_dim * width;
      q.add_squares(count, p.head_dim, squares);                // [d]
      k.add_squares(count, p.value_dim, squares + head_width);  // [dv]
    });
  }

  // From sums to the state, which the first tile stores, and to the weights.
  void finish(int64_t pair, T* acc, bool is_first) {
    T *const query_norms = acc + p.head_dim * width, *const key_norms = query_norms + head_width;
    if (p.normalizes) {
      to_norms(query_norms, head_width), to_norms(key_norms, width);
      for (int64_t c = 0; c < width; c += kWidth<T>) store(inverse + c, T(1) / load(key_norms + c));
    }
    const T scale = scale_of<T>(p, pair);
    T* state = static_cast<T*>(params.state) + pair * p.state_size();
    for (int64_t d = 0; d < p.head_dim; ++d, state += p.value_dim + 1) {
      const T* const from = acc + d * width;
      T* const row = weights.values + d * width;
      const T factor = p.normalizes ? T(1) / query_norms[d] : T(1);
      for (int64_t c = 0; c < width; c += kWidth<T>) {
        store(row + c, p.normalizes ? load(from + c) * load(inverse + c) * factor : load(from + c));
      }
      if (is_first) {
        std::copy_n(row, p.value_dim, state);
        state[p.value_dim] = p.normalizes ? query_norms[d] : T(1);
      }
      softmax_row(row, p.value_dim, scale);
    }
    if (is_first) {
      p.normalizes ? std::copy_n(key_norms, p.value_dim, state) : std::fill_n(state, p.value_dim, T(1));
      state[p.value_dim] = T(0);
    }
    weights_of_columns = weights.transposed();
  }

  void read(int64_t pair, Range tokens) {
    const int64_t batch = pair / p.heads, head = pair % p.heads;
    for_each_channel_block(tokens, [&](int64_t first, int64_t count) {
      const MatmulA<E> v =
          channels_as_depth(rows_of<S>(p.value, batch, first, head), count, p.value_dim, rows);  // [tokens, dv]
      S* const to = params.out.at<S>(batch, first, head);
      const int64_t depth = padded_depth<E>(p.value_dim);
      if constexpr (std::is_same_v<S, T>) {
        if (p.head_dim == head_width) {
          matmul<E, false>(v, weights_of_columns, count, head_width, depth, to,
                           params.out.token_stride);  // [tokens, d]
          return;
        }
      }
      matmul<E, false>(v, weights_of_columns, count, head_width, depth, out, head_width);  // [tokens, d]
      unpack_rows<T>(out, head_width, count, p.head_dim, T(1), to, params.out.token_stride);
    });
  }

 private:
  // Zeros have norm 1: the gradient of a channel of zeros would be divided by the epsilon.
  static void to_norms(T* squares, int64_t size) {
    for (int64_t c = 0; c < size; ++c) {
      const T norm = std::sqrt(squares[c]);
      squares[c] = norm == T(0) ? T(1) : norm < kNormEpsilon<T> ? kNormEpsilon<T> : norm;
    }
  }

  const ChannelParams& params;
  const ChannelProblem& p = params.problem;
  const int64_t width = round_up(p.value_dim, kWidth<T>), head_width = round_up(p.head_dim, kWidth<T>);
  const ChannelParts<T> parts{p, p.head_dim* width + (p.normalizes ? head_width + width : 0)};
  Scratch scratch;
  ChannelMatrix<E> weights{p.head_dim, p.value_dim, scratch};  // [d, dv]
  T* sums = scratch.take<T>(parts.size);
  T* inverse = scratch.take<T>(width);
  T* out = scratch.take<T>(kChannelBlock * head_width);
  // Of query's tokens, or of value's.
  E* rows = scratch.take<E>(kChannelBlock * std::max(head_width, round_up(p.value_dim, kOperandWidth<E>)));
  E* keys = scratch.take<E>(kChannelBlock * width);
  MatmulB<E> weights_of_columns{};  // [dv, d]
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(ChannelAttention, ChannelParams);
