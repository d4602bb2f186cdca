// What the kernels of channel attention on the CPU share: operands of their products, and weights from a state.
#pragma once

#include "cpu/math.h"
#include "linear_attention/channel.h"
#include "linear_attention/cpu/state_tile.h"

namespace vitkernels::VK_ISA {

inline constexpr int64_t kChannelBlock = 128;  // tokens whose operands stay in the L1 cache

// Tokens as rows, their channels as the depth of a product: in place where the elements are those of the arithmetic.
template <class E, class S>
MatmulA<E> channels_as_depth(EvenRows<S> rows, int64_t count, int64_t columns, E* buffer) {
  if constexpr (std::is_same_v<S, E> && kGroup<E> == 1) {
    return {rows.data, rows.stride, 1};
  } else {
    const int64_t stride = round_up(columns, kOperandWidth<E>);
    pack_operands(rows, count, columns, buffer, stride);
    return {buffer, stride, kGroup<E>};
  }
}

// Tokens as the depth of a product, their channels as rows of A or columns of B.
template <class E>
struct TokensAsDepth {
  const E* data;
  int64_t stride;  // between groups of tokens

  // In place where the elements are those of the arithmetic; B's columns are whole vectors.
  template <class S>
  TokensAsDepth(EvenRows<S> rows, int64_t count, int64_t columns, bool is_b, E* buffer) {
    if constexpr (std::is_same_v<S, E> && kGroup<E> == 1) {
      if (!is_b || columns % kWidth<E> == 0) {
        data = rows.data, stride = rows.stride;
        return;
      }
    }
    const int64_t width = round_up(columns, kWidth<Sum<E>>);
    pack_groups(rows, count, columns, buffer, width);
    data = buffer, stride = width * kGroup<E>;
  }

  MatmulA<E> as_a() const { return {data, kGroup<E>, stride}; }
  MatmulB<E> as_b() const { return {data, stride, kPanel<E> * kGroup<E>}; }

  // acc [columns] += the sums of squares of `count` tokens.
  void add_squares(int64_t count, int64_t columns, Sum<E>* acc) const {
    using Operand = Arithmetic<E>;
    constexpr int64_t kStep = kWidth<Sum<E>>;
    const int64_t groups = divide_up(count, kGroup<E>);
    for (int64_t c = 0; c < columns; c += kStep) {
      Vec<Sum<E>> sum{}, other{};  // two chains hide the latency
      const E* from = data + c * kGroup<E>;
      if (columns - c >= kStep || kGroup<E> > 1) {
        int64_t g = 0;
        for (; g + 2 <= groups; g += 2, from += 2 * stride) {
          const auto x = Operand::load(from), y = Operand::load(from + stride);
          sum = Operand::multiply_add(sum, x, x), other = Operand::multiply_add(other, y, y);
        }
        if (g < groups) sum = Operand::multiply_add(sum, Operand::load(from), Operand::load(from));
      } else if constexpr (kGroup<E> == 1) {
        for (int64_t g = 0; g < groups; ++g, from += stride) {
          const Vec<E> x = load_partial(from, columns - c);
          sum += x * x;
        }
      }
      store(acc + c, load(acc + c) + (sum + other));
    }
  }
};

// A matrix [rows, columns] as B, as it is and transposed. `values` has rows of whole vectors, zero behind the columns.
template <class E>
struct ChannelMatrix {
  using T = Sum<E>;

  ChannelMatrix(int64_t rows, int64_t columns, Scratch& scratch)
      : rows(rows),
        columns(columns),
        width(round_up(columns, kWidth<T>)),
        values(scratch.take<T>(rows * width)),
        narrowed(scratch.take<E>(kGroup<E> > 1 ? rows * round_up(columns, kOperandWidth<E>) : 0)),
        groups(scratch.take<E>(kGroup<E> > 1 ? padded_depth<E>(rows) * width : 0)),
        panels(scratch.take<E>(round_up(rows, kPanel<E>) * padded_depth<E>(columns))) {}

  MatmulB<E> as_it_is() {
    if constexpr (kGroup<E> == 1) {
      return {values, width, kPanel<E>};
    } else {
      pack_groups(narrow(), rows, columns, groups, width);
      return {groups, width * kGroup<E>, kPanel<E> * kGroup<E>};
    }
  }
  MatmulB<E> transposed() {
    pack_transposed(narrow(), rows, columns, panels);
    return {panels, kPanel<E> * kGroup<E>, kPanel<E> * padded_depth<E>(columns)};
  }

  int64_t rows, columns, width;
  T* values;

 private:
  EvenRows<E> narrow() {
    if constexpr (kGroup<E> == 1) {
      return {values, width};
    } else {
      const int64_t stride = round_up(columns, kOperandWidth<E>);
      unpack_rows<T>(values, width, rows, columns, T(1), narrowed, stride);
      return {narrowed, stride};
    }
  }

  E *narrowed, *groups, *panels;
};

// row [columns], padded with zeros, becomes softmax(scale row).
template <class T>
void softmax_row(T* row, int64_t columns, T scale) {
  const T lowest = -std::numeric_limits<T>::infinity();
  Vec<T> maxima = broadcast(lowest), sums{};
  for_each_part<kWidth<T>>(columns, [&](int64_t c, int64_t count) VK_BODY {
    const Vec<T> x = load(row + c) * scale;
    const Vec<T> seen = count == kWidth<T> ? x : keep_first<T>(x, count, lowest);
    maxima = max<T>(maxima, seen);
    store(row + c, seen);
  });
  const T maximum = reduce_max<T>(maxima);
  for (int64_t c = 0; c < columns; c += kWidth<T>) {
    const Vec<T> x = exp<T>(load(row + c) - maximum);
    sums += x;
    store(row + c, x);
  }
  const T factor = T(1) / reduce_add<T>(sums);
  for (int64_t c = 0; c < columns; c += kWidth<T>) store(row + c, load(row + c) * factor);
}

template <class T>
T scale_of(const ChannelProblem& p, int64_t pair) {
  const T scale = T(p.scale);
  return p.head_scale ? scale * static_cast<const T*>(p.head_scale)[pair % p.heads] : scale;
}

template <class T>
inline constexpr T kNormEpsilon = T(1e-12);  // torch.nn.functional.normalize's

// Partial sums: [splits][pairs][size].
template <class T>
struct ChannelParts {
  T* of(int64_t split, int64_t pair) const { return static_cast<T*>(p.parts) + (split * p.num_pairs() + pair) * size; }

  int64_t bytes() const {
    return p.stage == ChannelStage::kAll ? 0 : p.splits * p.num_pairs() * size * int64_t(sizeof(T));
  }

  // sums [size] = those of all splits, in order.
  void add_up(int64_t pair, T* sums) const {
    std::copy_n(of(0, pair), size, sums);
    for (int64_t split = 1; split < p.splits; ++split) {
      const T* const part = of(split, pair);
      for (int64_t i = 0; i < size; i += kWidth<T>) store(sums + i, load(sums + i) + load(part + i));
    }
  }

  const ChannelProblem& p;
  int64_t size;
};

// Calls f(first, count) for blocks of a range of tokens.
template <class Function>
void for_each_channel_block(Range tokens, Function&& f) {
  for (int64_t first = tokens.begin; first < tokens.end; first += kChannelBlock) {
    f(first, std::min(tokens.end - first, kChannelBlock));
  }
}

// Tasks are (batch, head) pairs, or pairs and splits, or pairs and tiles. Body has sum(pair, tokens, acc [size], zero at
// first), finish(pair, acc, is_first) and read(pair, tokens).
template <class T, class Body>
void run_channel_tasks(Body& body, const ChannelParts<T>& parts, Range tasks, int64_t num_summed, int64_t num_read,
                       T* sums) {
  const ChannelProblem& p = parts.p;
  const int64_t tiles = linear_tiles(num_read);
  int64_t finished = -1;
  for (int64_t task = tasks.begin; task < tasks.end; ++task) {
    if (p.stage == ChannelStage::kSum) {
      const int64_t pair = task / p.splits, split = task % p.splits;
      T* const part = parts.of(split, pair);
      std::fill_n(part, parts.size, T(0));
      body.sum(pair, {num_summed * split / p.splits, num_summed * (split + 1) / p.splits}, part);
    } else if (p.stage == ChannelStage::kRead) {
      const int64_t pair = task / tiles, tile = task % tiles, first = tile * kLinearTile;
      if (finished != pair) {
        parts.add_up(pair, sums);
        body.finish(pair, sums, tile == 0);
        finished = pair;
      }
      body.read(pair, {first, std::min(first + kLinearTile, num_read)});
    } else {
      std::fill_n(sums, parts.size, T(0));
      body.sum(task, {0, num_summed}, sums);
      body.finish(task, sums, true);
      body.read(task, {0, num_read});
    }
  }
}

}  // namespace vitkernels::VK_ISA
