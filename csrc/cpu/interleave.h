// Several rows that take turns in one: element c of row j of n is element c n + j of the whole.
#pragma once

#include <algorithm>

#include "cpu/convert.h"

namespace vitkernels::VK_ISA {

// Riffles of the concatenated vectors: after log2(kCount) of them, their elements take turns.
template <int kCount, class T>
VK_INLINE void interleave_vectors(Vec<T> (&v)[kCount]) {
  constexpr int kN = kWidth<T>;
  const auto low = constant_lanes<Bits<T>>([](int i) { return i / 2 + i % 2 * kN; }), high = low + kN / 2;
#pragma GCC unroll 4
  for (int rounds = 1; rounds < kCount; rounds *= 2) {
    Vec<T> next[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      next[2 * i] = __builtin_shuffle(v[i], v[i + kCount / 2], low);
      next[2 * i + 1] = __builtin_shuffle(v[i], v[i + kCount / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) v[i] = next[i];
  }
}

// The way back.
template <int kCount, class T>
VK_INLINE void separate_vectors(Vec<T> (&v)[kCount]) {
  const auto even = constant_lanes<Bits<T>>([](int i) { return 2 * i; }), odd = even + 1;
#pragma GCC unroll 4
  for (int rounds = 1; rounds < kCount; rounds *= 2) {
    Vec<T> next[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      next[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even);
      next[i + kCount / 2] = __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) v[i] = next[i];
  }
}

// Calls f.operator()<n>() for a number of rows that takes few riffles; others return false.
template <class Function>
VK_INLINE bool with_few_rows(int64_t n, Function&& f) {
  switch (n) {
    case 1: f.template operator()<1>(); return true;
    case 2: f.template operator()<2>(); return true;
    case 4: f.template operator()<4>(); return true;
    case 8: f.template operator()<8>(); return true;
    default: return false;
  }
}

// Columns [0, columns) of n rows, in turn: store(position, vector, count).
template <class T, class Store>
VK_INLINE void interleave_rows(const T* rows, int64_t row_stride, int64_t n, int64_t columns, Store&& store) {
  constexpr int kN = kWidth<T>;
  int64_t c = 0;
  const bool is_done = with_few_rows(n, [&]<int kCount>() VK_BODY {
    for (; c + kN <= columns; c += kN) {
      Vec<T> v[kCount];
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) v[i] = load(rows + i * row_stride + c);
      interleave_vectors<kCount, T>(v);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) store(c * kCount + i * kN, v[i], int64_t(kN));
    }
  });
  if (!is_done && n % kN == 0) {
    for (; c + kN <= columns; c += kN) {
      for (int64_t j = 0; j < n; j += kN) {
        Vec<T> square[kN];
#pragma GCC unroll 16
        for (int i = 0; i < kN; ++i) square[i] = load(rows + (j + i) * row_stride + c);
        transpose<T>(square);
#pragma GCC unroll 16
        for (int i = 0; i < kN; ++i) store((c + i) * n + j, square[i], int64_t(kN));
      }
    }
  }
  for (; c < columns; ++c) {
    for (int64_t j = 0; j < n; j += kN) {
      const int64_t count = std::min<int64_t>(n - j, kN);
      Vec<T> turn{};
      for (int64_t i = 0; i < count; ++i) turn[i] = rows[(j + i) * row_stride + c];
      store(c * n + j, turn, count);
    }
  }
}

// The way back: load(position, count) -> vector; store(row, column, vector, count).
template <class T, class Load, class Store>
VK_INLINE void separate_rows(int64_t n, int64_t columns, Load&& load, Store&& store) {
  constexpr int kN = kWidth<T>;
  int64_t c = 0;
  const bool is_done = with_few_rows(n, [&]<int kCount>() VK_BODY {
    for (; c + kN <= columns; c += kN) {
      Vec<T> v[kCount];
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) v[i] = load(c * kCount + i * kN, int64_t(kN));
      separate_vectors<kCount, T>(v);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) store(i, c, v[i], int64_t(kN));
    }
  });
  if (!is_done && n % kN == 0) {
    for (; c + kN <= columns; c += kN) {
      for (int64_t j = 0; j < n; j += kN) {
        Vec<T> square[kN];
#pragma GCC unroll 16
        for (int i = 0; i < kN; ++i) square[i] = load((c + i) * n + j, int64_t(kN));
        transpose<T>(square);
#pragma GCC unroll 16
        for (int i = 0; i < kN; ++i) store(j + i, c, square[i], int64_t(kN));
      }
    }
  }
  for (; c < columns; c += kN) {
    const int64_t count = std::min<int64_t>(columns - c, kN);
    for (int64_t j = 0; j < n; ++j) {
      Vec<T> row{};
      for (int64_t i = 0; i < count; ++i) row[i] = load((c + i) * n + j, int64_t(1))[0];
      store(j, c, row, count);
    }
  }
}

}  // namespace vitkernels::VK_ISA
