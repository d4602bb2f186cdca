// Decayed linear attention on the CPU, in blocks of tokens: products of pairs inside a block, a running state between
// blocks. Powers of the decay only ever shrink, so that nothing overflows. Compiled once per instruction set.

#include "linear_attention/decayed.h"
#include "cpu/make_kernel.h"
#include "linear_attention/cpu/state_tile.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class DecayedLinearAttention {
  using T = Compute<S>;

 public:
  DecayedLinearAttention(const DecayedParams& params, void* memory) : p(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      batch = task / p.heads, head = task % p.heads;
      raise_decay(static_cast<const T*>(p.decay)[head]);
      load_state(task);
      int64_t exponent = p.initial_exponent;
      for_each_block({0, p.tokens}, [&](int64_t first, int64_t count) {
        block(first, count, exponent);
        exponent = 1;
      });
      if (p.state) store_state(task);
    }
  }

 private:
  // powers[n] = decay^n, and by column minus row of a block: those of the keys that a row reads, zero for later ones.
  void raise_decay(T decay) {
    T power = 1;
    for (int64_t n = 0; n <= kLinearBlock; ++n, power *= decay) powers[n] = power;
    std::fill_n(by_offset, 2 * kLinearBlock + kWidth<T>, T(0));
    for (int64_t n = p.includes_self ? 0 : 1; n < kLinearBlock; ++n) by_offset[kLinearBlock - 1 - n] = powers[n];
  }

  void load_state(int64_t task) {
    std::fill_n(state, p.head_dim * width, T(0));
    if (!p.initial_state) return;
    const T* from = static_cast<const T*>(p.initial_state) + task * p.head_dim * p.value_dim;
    for (int64_t d = 0; d < p.head_dim; ++d) std::copy_n(from + d * p.value_dim, p.value_dim, state + d * width);
  }
  void store_state(int64_t task) const {
    T* to = static_cast<T*>(p.state) + task * p.head_dim * p.value_dim;
    for (int64_t d = 0; d < p.head_dim; ++d) std::copy_n(state + d * width, p.value_dim, to + d * p.value_dim);
  }

  // Tokens in the order in which the state passes them.
  EvenRows<S> rows(const TokenTensor& t, int64_t first) const {
    const int64_t token = p.is_reversed ? p.tokens - 1 - first : first;
    return {t.at<const S>(batch, token, head), p.is_reversed ? -t.token_stride : t.token_stride};
  }

  // The first row reads the state times decay^exponent.
  void block(int64_t first, int64_t count, int64_t exponent) {
    const int64_t columns = round_up(count, kWidth<T>);
    const OperandRows<T> q(rows(p.query, first), count, p.head_dim, queries);  // [tokens, d]
    const OperandRows<T> v(rows(p.value, first), count, p.value_dim, values);  // [tokens, dv]
    pack_rows(rows(p.key, first), count, p.head_dim, T(1), keys, key_width);   // [tokens, d]
    pack_transposed(EvenRows<T>{keys, key_width}, count, p.head_dim, panels);
    matmul<T, false>(q.as_a(), {panels, kPanel<T>, p.head_dim * kPanel<T>}, count, columns, p.head_dim, pairs,
                     kLinearBlock);  // [tokens, tokens]
    for (int64_t r = 0; r < count; ++r) {
      T* const row = pairs + r * kLinearBlock;
      const T* const weights = by_offset + kLinearBlock - 1 - r;
      for (int64_t c = 0; c < columns; c += kWidth<T>) store(row + c, load(row + c) * load(weights + c));
    }
    matmul<T, false>({pairs, kLinearBlock, 1}, v.as_b(), count, width, count, own, width);               // [tokens, dv]
    matmul<T, false>(q.as_a(), {state, width, kPanel<T>}, count, width, p.head_dim, from_state, width);  // [tokens, dv]
    write(first, count, exponent);

    // state = decay^(count - 1 + exponent) state + the sum of decay^(count - 1 - r) k_r^T v_r.
    const T kept = exponent == 0 ? powers[count - 1] : powers[count];
    for (int64_t i = 0; i < p.head_dim * width; i += kWidth<T>) store(state + i, load(state + i) * kept);
    for (int64_t r = 0; r < count; ++r) {
      T* const row = keys + r * key_width;
      for (int64_t c = 0; c < key_width; c += kWidth<T>) store(row + c, load(row + c) * powers[count - 1 - r]);
    }
    add_products(keys, key_width, p.head_dim, v.as_b(), width, count, state);  // [d, dv]
  }

  void write(int64_t first, int64_t count, int64_t exponent) const {
    const int64_t token = p.is_reversed ? p.tokens - 1 - first : first;
    S* to = p.out.at<S>(batch, token, head);
    const int64_t stride = p.is_reversed ? -p.out.token_stride : p.out.token_stride;
    for (int64_t r = 0; r < count; ++r, to += stride) {
      const T factor = powers[r + exponent];
      for_each_part<kWidth<T>>(p.value_dim, [&](int64_t c, int64_t n) VK_BODY {
        store_narrowed<T>(to + c, load(own + r * width + c) + load(from_state + r * width + c) * factor, n);
      });
    }
  }

  const DecayedParams& p;
  Scratch scratch;
  const int64_t width = round_up(p.value_dim, kWidth<T>), key_width = round_up(p.head_dim, kWidth<T>);
  T* powers = scratch.take<T>(kLinearBlock + 1);
  T* by_offset = scratch.take<T>(2 * kLinearBlock + kWidth<T>);
  T* state = scratch.take<T>(p.head_dim * width);
  T* queries = scratch.take<T>(kLinearBlock * key_width);
  T* keys = scratch.take<T>(kLinearBlock * key_width);
  T* panels = scratch.take<T>(round_up(kLinearBlock, kPanel<T>) * key_width);
  T* values = scratch.take<T>(kLinearBlock * width);
  T* pairs = scratch.take<T>(kLinearBlock * kLinearBlock);
  T* own = scratch.take<T>(kLinearBlock * width);
  T* from_state = scratch.take<T>(kLinearBlock * width);
  int64_t batch = 0, head = 0;
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(DecayedLinearAttention, DecayedParams);
