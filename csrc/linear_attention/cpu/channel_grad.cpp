// The backward of channel attention on the CPU. Compiled once per instruction set.
//
// With W = softmax(s P) and P = q^T k / (|q| |k|): dV = dO W, dW = dO^T V, dP = s W (dW - sum of W dW), and with
// A = dP / (|q| |k|): dq = k A^T - q (sum of P dP) / |q|^2, dk = q A - k (sum of P dP) / |k|^2.

#include "cpu/make_kernel.h"
#include "linear_attention/cpu/channel_tile.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class ChannelAttentionGrad {
  using E = Operand<S>;
  using T = Sum<E>;

 public:
  ChannelAttentionGrad(const ChannelGradParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }
  int64_t parts_size() const { return parts.bytes(); }

  void run(int64_t begin, int64_t end) {
    [[maybe_unused]] const TileScope tiles;
    run_channel_tasks(*this, parts, {begin, end}, p.num_values, p.num_tokens, sums);
  }

  // acc: the gradient of the weights.
  void sum(int64_t pair, Range tokens, T* acc) {
    weigh(pair);
    const int64_t batch = pair / p.heads, head = pair % p.heads;
    for_each_channel_block(tokens, [&](int64_t first, int64_t count) {
      const EvenRows<S> grads = rows_of<S>(params.grad_out, batch, first, head);
      const TokensAsDepth<E> g(grads, count, p.head_dim, false, rows);  // [d, tokens]
      const TokensAsDepth<E> v(rows_of<S>(p.value, batch, first, head), count, p.value_dim, true,
                               values);                                                            // [tokens, dv]
      matmul<E, true>(g.as_a(), v.as_b(), p.head_dim, width, padded_depth<E>(count), acc, width);  // [d, dv]
      const MatmulA<E> by_rows = channels_as_depth(grads, count, p.head_dim, rows);                // [tokens, d]
      matmul<E, false>(by_rows, of_rows, count, width, padded_depth<E>(p.head_dim), grad, width);  // [tokens, dv]
      unpack_rows<T>(grad, width, count, p.value_dim, T(1), params.grad_value.at<S>(batch, first, head),
                     params.grad_value.token_stride);
    });
  }

  // The gradient of the products, from that of the weights.
  void finish(int64_t pair, const T* acc, bool is_first) {
    weigh(pair);
    const T scale = scale_of<T>(p, pair);
    const T* state = state_of(pair);
    const T* const key_norms = state + p.head_dim * (p.value_dim + 1);
    std::fill_n(of_keys, width, T(0));
    std::fill_n(inverse, width, T(0));
    for (int64_t c = 0; c < p.value_dim; ++c) inverse[c] = T(1) / key_norms[c];
    Vec<T> of_scale{};
    const int64_t row_size = p.value_dim + 1;
    const T* given = params.grad_state ? static_cast<const T*>(params.grad_state) + pair * p.state_size() : nullptr;
    for (int64_t d = 0; d < p.head_dim; ++d, state += row_size) {
      T* const row = weights.values + d * width;
      const T* const grads = acc + d * width;
      const T dots = dot(row, grads, width), factor = T(1) / state[p.value_dim];
      Vec<T> of_query{};
      for_each_part<kWidth<T>>(p.value_dim, [&](int64_t c, int64_t count) VK_BODY {
        const Vec<T> product = load_widened<T>(state + c, count);
        const Vec<T> of_logit = load(row + c) * (load(grads + c) - dots);
        const Vec<T> of_product =
            given ? of_logit * scale + load_widened<T>(given + d * row_size + c, count) : of_logit * scale;
        of_scale += of_logit * product, of_query += of_product * product;
        store(of_keys + c, load(of_keys + c) + of_product * product);
        store(row + c, of_product * load(inverse + c) * factor);
      });
      of_queries[d] =
          along(reduce_add<T>(of_query), given ? given + d * row_size + p.value_dim : nullptr, state[p.value_dim]);
    }
    for (int64_t c = 0; c < p.value_dim; ++c) {
      of_keys[c] = along(of_keys[c], given ? given + p.head_dim * row_size + c : nullptr, key_norms[c]);
    }
    if (is_first && params.grad_scale) static_cast<T*>(params.grad_scale)[pair] = reduce_add<T>(of_scale);
    of_rows = weights.as_it_is(), of_columns = weights.transposed();
    weighed = -1;
  }

  void read(int64_t pair, Range tokens) {
    const int64_t batch = pair / p.heads, head = pair % p.heads;
    for_each_channel_block(tokens, [&](int64_t first, int64_t count) {
      const EvenRows<S> q = rows_of<S>(p.query, batch, first, head), k = rows_of<S>(p.key, batch, first, head);
      const MatmulA<E> keys = channels_as_depth(k, count, p.value_dim, values);  // [tokens, dv]
      matmul<E, false>(keys, of_columns, count, head_width, padded_depth<E>(p.value_dim), grad,
                       head_width);  // [tokens, d]
      write(head_width, q, of_queries, count, p.head_dim, params.grad_query,
            params.grad_query.at<S>(batch, first, head));
      const MatmulA<E> queries = channels_as_depth(q, count, p.head_dim, rows);                    // [tokens, d]
      matmul<E, false>(queries, of_rows, count, width, padded_depth<E>(p.head_dim), grad, width);  // [tokens, dv]
      write(width, k, of_keys, count, p.value_dim, params.grad_key, params.grad_key.at<S>(batch, first, head));
    });
  }

 private:
  const T* state_of(int64_t pair) const { return static_cast<const T*>(params.state) + pair * p.state_size(); }

  // How much of a channel itself its gradient loses, from the sum of its P dP and the gradient of its norm. A norm that
  // was raised to the epsilon has no gradient; that of zeros, 1, is multiplied with zeros.
  T along(T sum, const T* of_norm, T norm) const {
    if (!p.normalizes || norm <= kNormEpsilon<T>) return T(0);
    return (sum / norm - (of_norm ? *of_norm : T(0))) / norm;
  }

  // The weights once more, from the state.
  void weigh(int64_t pair) {
    if (weighed == pair) return;
    weighed = pair;
    const T scale = scale_of<T>(p, pair);
    const T* state = state_of(pair);
    for (int64_t d = 0; d < p.head_dim; ++d, state += p.value_dim + 1) {
      T* const row = weights.values + d * width;
      std::copy_n(state, p.value_dim, row);
      softmax_row(row, p.value_dim, scale);
    }
    of_rows = weights.as_it_is();
  }

  // target = grad [tokens, stride] - source * factors.
  void write(int64_t stride, EvenRows<S> source, const T* factors, int64_t count, int64_t columns, const TokenTensor& t,
             S* target) const {
    if (!p.normalizes) return unpack_rows<T>(grad, stride, count, columns, T(1), target, t.token_stride);
    for (int64_t r = 0; r < count; ++r, target += t.token_stride) {
      for_each_part<kWidth<T>>(columns, [&](int64_t c, int64_t n) VK_BODY {
        const Vec<T> lost = load_widened<T>(source[r] + c, n) * load(factors + c);
        store_narrowed<T>(target + c, load(grad + r * stride + c) - lost, n);
      });
    }
  }

  const ChannelGradParams& params;
  const ChannelProblem& p = params.problem;
  const int64_t width = round_up(p.value_dim, kWidth<T>), head_width = round_up(p.head_dim, kWidth<T>);
  const ChannelParts<T> parts{p, p.head_dim* width};
  Scratch scratch;
  ChannelMatrix<E> weights{p.head_dim, p.value_dim, scratch};  // [d, dv], and then the gradient of the products
  T* sums = scratch.take<T>(parts.size);
  T* grad = scratch.take<T>(kChannelBlock * std::max(width, head_width));
  T* inverse = scratch.take<T>(width);
  T* of_queries = scratch.take<T>(head_width);
  T* of_keys = scratch.take<T>(width);
  E* rows = scratch.take<E>(kChannelBlock * round_up(p.head_dim, kOperandWidth<E>));
  E* values = scratch.take<E>(kChannelBlock * round_up(p.value_dim, kOperandWidth<E>));
  MatmulB<E> of_rows{}, of_columns{};  // [d, dv], [dv, d]
  int64_t weighed = -1;                // the pair whose weights stand there
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(ChannelAttentionGrad, ChannelGradParams);
