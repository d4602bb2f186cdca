// Decayed linear attention on the CPU, in blocks of tokens: products of pairs inside a block, a running state between
// blocks, and a state of its own between chunks of blocks. Powers of the decay only ever shrink, so that nothing
// overflows. Compiled once per instruction set.

#include "linear_attention/decayed.h"

#include <vector>

#include "cpu/make_kernel.h"
#include "linear_attention/cpu/state_tile.h"

namespace vitkernels::VK_ISA {
namespace {

// Rows of a block that multiply the keys up to their own alone.
inline constexpr int64_t kDecayedRows = 16;

template <class S>
class DecayedLinearAttention {
  using T = Compute<S>;

 public:
  DecayedLinearAttention(const DecayedParams& params, void* memory) : p(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }
  int64_t parts_size() const { return p.num_pairs() * chunks * state_size * int64_t(sizeof(T)); }

  void run(int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      switch (p.stage) {
        case DecayedStage::kAll: run_pairs({task * p.group, std::min((task + 1) * p.group, p.num_pairs())}); break;
        case DecayedStage::kSum: sum_chunk(task / chunks, task % chunks, chunk_state(task)); break;
        case DecayedStage::kRead:
          start(0, task / chunks);
          std::copy_n(chunk_state(task), state_size, heads[0].before);
          chunk(task % chunks, 1);
      }
    }
  }

  // From the sums of chunks to the states before them.
  void finish(int64_t begin, int64_t end) {
    std::vector<T> state(state_size), sum(state_size), of_decay(kLinearBlock + 1);
    for (int64_t pair = begin; pair < end; ++pair) {
      raise(pair, of_decay.data());
      load_state(pair, state.data());
      for (int64_t c = 0; c < chunks; ++c) {
        T* const at = chunk_state(pair * chunks + c);
        std::copy_n(at, state_size, sum.data());
        std::copy_n(state.data(), state_size, at);
        pass(c, of_decay.data(), state.data(), sum.data());
      }
      if (p.state) store_state(pair, state.data());
    }
  }

 private:
  // One of the pairs of a task.
  struct Head {
    int64_t batch, head;
    T* powers;     // powers[n] = decay^n
    T* by_offset;  // the same by column minus row of a block: those of the keys that a row reads, zero for later ones
    T* before;     // the state before a chunk
    T* running;    // the chunk's own sum so far
  };

  // All pairs at one block, and then all at the next.
  void run_pairs(Range pairs) {
    const int64_t count = pairs.end - pairs.begin;
    for (int64_t i = 0; i < count; ++i) {
      start(i, pairs.begin + i);
      load_state(pairs.begin + i, heads[i].before);
    }
    for (int64_t c = 0; c < chunks; ++c) {
      chunk(c, count);
      for (int64_t i = 0; i < count; ++i) pass(c, heads[i].powers, heads[i].before, heads[i].running);
    }
    for (int64_t i = 0; p.state && i < count; ++i) store_state(pairs.begin + i, heads[i].before);
  }

  void start(int64_t i, int64_t pair) {
    T* const memory = of_heads + i * head_size;
    heads[i] = {pair / p.heads,
                pair % p.heads,
                memory,
                memory + kPowers,
                memory + kPowers + kOffsets,
                memory + kPowers + kOffsets + state_size};
    raise(pair, heads[i].powers);
    std::fill_n(heads[i].by_offset, kOffsets, T(0));
    for (int64_t n = p.includes_self ? 0 : 1; n < kLinearBlock; ++n) {
      heads[i].by_offset[kLinearBlock - 1 - n] = heads[i].powers[n];
    }
  }

  void raise(int64_t pair, T* powers) const {
    T power = 1;
    for (int64_t n = 0; n <= kLinearBlock; ++n) {
      powers[n] = power;
      power *= static_cast<const T*>(p.decay)[pair % p.heads];
    }
  }

  void load_state(int64_t pair, T* to) const {
    std::fill_n(to, state_size, T(0));
    if (!p.initial_state) return;
    const T* from = static_cast<const T*>(p.initial_state) + pair * p.head_dim * p.value_dim;
    for (int64_t d = 0; d < p.head_dim; ++d) std::copy_n(from + d * p.value_dim, p.value_dim, to + d * width);
  }
  void store_state(int64_t pair, const T* from) const {
    T* to = static_cast<T*>(p.state) + pair * p.head_dim * p.value_dim;
    for (int64_t d = 0; d < p.head_dim; ++d) std::copy_n(from + d * width, p.value_dim, to + d * p.value_dim);
  }
  T* chunk_state(int64_t task) const { return static_cast<T*>(p.chunk_states) + task * state_size; }

  Range tokens_of(int64_t c) const { return {c * kDecayedChunk, std::min((c + 1) * kDecayedChunk, p.tokens)}; }

  // What is left, `count` tokens into a block, of the state before the chunk, of which the block's first token reads
  // `left` decayed once more.
  T left_after(int64_t first, int64_t count, const T* powers, T left) const {
    if (first % kDecayedChunk != 0) return left * powers[count];
    return first == 0 && p.initial_exponent == 0 ? powers[count - 1] : powers[count];
  }

  // before = the state behind a chunk.
  void pass(int64_t c, const T* powers, T* before, const T* sum) const {
    T left = 1;
    for_each_block(tokens_of(c), [&](int64_t first, int64_t count) { left = left_after(first, count, powers, left); });
    for (int64_t i = 0; i < state_size; i += kWidth<T>) store(before + i, load(before + i) * left + load(sum + i));
  }

  void sum_chunk(int64_t pair, int64_t c, T* to) {
    start(0, pair);
    std::fill_n(heads[0].running, state_size, T(0));
    for_each_block(tokens_of(c), [&](int64_t first, int64_t count) {
      add_block(heads[0], first, count, {rows(p.value, heads[0], first), count, p.value_dim, values});
    });
    std::copy_n(heads[0].running, state_size, to);
  }

  // The outputs of a chunk, and its own sums.
  void chunk(int64_t c, int64_t count_of_heads) {
    const bool reads_before = c > 0 || p.initial_state;
    for (int64_t i = 0; i < count_of_heads; ++i) std::fill_n(heads[i].running, state_size, T(0)), left_of[i] = 1;
    for_each_block(tokens_of(c), [&](int64_t first, int64_t count) {
      fetch(p.query, p.head_dim, first, count, count_of_heads);
      fetch(p.key, p.head_dim, first, count, count_of_heads);
      fetch(p.value, p.value_dim, first, count, count_of_heads);
      for (int64_t i = 0; i < count_of_heads; ++i) {
        const bool is_first = first == c * kDecayedChunk;
        const T* const state = is_first ? (reads_before ? heads[i].before : nullptr)
                                        : (reads_before ? joined(heads[i], left_of[i]) : heads[i].running);
        block(heads[i], first, count, state);
        left_of[i] = left_after(first, count, heads[i].powers, left_of[i]);
      }
    });
  }

  // The state inside a chunk.
  const T* joined(const Head& head, T left) const {
    for (int64_t i = 0; i < state_size; i += kWidth<T>) {
      store(both + i, load(head.running + i) + load(head.before + i) * left);
    }
    return both;
  }

  // Tokens in the order in which the state passes them.
  EvenRows<S> rows(const TokenTensor& t, const Head& head, int64_t first) const {
    const int64_t token = p.is_reversed ? p.tokens - 1 - first : first;
    return {t.at<const S>(head.batch, token, head.head), p.is_reversed ? -t.token_stride : t.token_stride};
  }

  // Rows of all heads to the L2 cache, in the order in which they lie: those of one head alone lie too far apart for the
  // CPU to foresee.
  void fetch(const TokenTensor& t, int64_t columns, int64_t first, int64_t count, int64_t count_of_heads) const {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < count_of_heads; ++i) {
        const char* const row = reinterpret_cast<const char*>(rows(t, heads[i], first)[r]);
        for (int64_t b = 0; b < columns * int64_t(sizeof(S)); b += 64) __builtin_prefetch(row + b, 0, 2);
      }
    }
  }

  // `state`, what the tokens before have left; null: zeros.
  void block(const Head& head, int64_t first, int64_t count, const T* state) {
    const OperandRows<T> q(rows(p.query, head, first), count, p.head_dim, queries);  // [tokens, d]
    const OperandRows<T> v(rows(p.value, head, first), count, p.value_dim, values);  // [tokens, dv]
    pack_transposed<T>(rows(p.key, head, first), count, p.head_dim, panels);         // [d, tokens]
    for (int64_t r = 0; r < count; r += kDecayedRows) {
      const int64_t n = std::min(count - r, kDecayedRows), columns = round_up(r + n, kWidth<T>);
      T* const tile = pairs + r * kLinearBlock;
      matmul<T, false>({q.data + r * q.stride, q.stride, 1}, {panels, kPanel<T>, p.head_dim * kPanel<T>}, n, columns,
                       p.head_dim, tile, kLinearBlock);  // [rows, tokens]
      for (int64_t i = 0; i < n; ++i) {
        T* const row = tile + i * kLinearBlock;
        const T* const weights = head.by_offset + kLinearBlock - 1 - r - i;
        for (int64_t c = 0; c < columns; c += kWidth<T>) store(row + c, load(row + c) * load(weights + c));
      }
      matmul<T, false>({tile, kLinearBlock, 1}, v.as_b(), n, width, r + n, own + r * width, width);  // [rows, dv]
    }
    if (state) {
      matmul<T, false>(q.as_a(), {state, width, kPanel<T>}, count, width, p.head_dim, from_state,
                       width);  // [tokens, dv]
    }
    write(head, first, count, state != nullptr);
    add_block(head, first, count, v);
  }

  // running = decay^count running + the sum of decay^(count - 1 - r) k_r^T v_r.
  void add_block(const Head& head, int64_t first, int64_t count, const OperandRows<T>& v) {
    const T kept = head.powers[count];
    for (int64_t i = 0; i < state_size; i += kWidth<T>) store(head.running + i, load(head.running + i) * kept);
    const EvenRows<S> from = rows(p.key, head, first);
    for (int64_t r = 0; r < count; ++r) {
      pack_rows(from.from(r), 1, p.head_dim, head.powers[count - 1 - r], keys + r * key_width,
                key_width);  // [tokens, d]
    }
    add_products(keys, key_width, p.head_dim, v.as_b(), width, count, head.running);  // [d, dv]
  }

  void write(const Head& head, int64_t first, int64_t count, bool has_state) const {
    const int64_t token = p.is_reversed ? p.tokens - 1 - first : first, exponent = first == 0 ? p.initial_exponent : 1;
    S* to = p.out.at<S>(head.batch, token, head.head);
    const int64_t stride = p.is_reversed ? -p.out.token_stride : p.out.token_stride;
    for (int64_t r = 0; r < count; ++r, to += stride) {
      const T factor = head.powers[r + exponent];
      for_each_part<kWidth<T>>(p.value_dim, [&](int64_t c, int64_t n) VK_BODY {
        Vec<T> x = load(own + r * width + c);
        if (has_state) x += load(from_state + r * width + c) * factor;
        store_narrowed<T>(to + c, x, n);
      });
    }
  }

  static constexpr int64_t kPowers = round_up(kLinearBlock + 1, kWidth<T>), kOffsets = 2 * kLinearBlock + kWidth<T>;

  const DecayedParams& p;
  Scratch scratch;
  const int64_t width = round_up(p.value_dim, kWidth<T>), key_width = round_up(p.head_dim, kWidth<T>);
  const int64_t chunks = decayed_chunks(p.tokens), state_size = p.head_dim * width;
  const int64_t head_size = kPowers + kOffsets + 2 * state_size;
  Head* heads = scratch.take<Head>(p.group);
  T* left_of = scratch.take<T>(p.group);  // of the state before the chunk, at the block
  T* of_heads = scratch.take<T>(p.group * head_size);
  T* both = scratch.take<T>(state_size);
  T* queries = scratch.take<T>(kLinearBlock * key_width);
  T* keys = scratch.take<T>(kLinearBlock * key_width);
  T* panels = scratch.take<T>(round_up(kLinearBlock, kPanel<T>) * key_width);
  T* values = scratch.take<T>(kLinearBlock * width);
  T* pairs = scratch.take<T>(kLinearBlock * kLinearBlock);
  T* own = scratch.take<T>(kLinearBlock * width);
  T* from_state = scratch.take<T>(kLinearBlock * width);
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(DecayedLinearAttention, DecayedParams);
