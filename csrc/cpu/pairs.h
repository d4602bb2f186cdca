// Pairs of bfloat16, for CPUs that multiply them two at a time: a lane of a float32 vector holds the bits of a pair.
#pragma once

#include "cpu/convert.h"
#include "cpu/matmul_operands.h"

#if defined(__AVX512BF16__)

namespace vitkernels::VK_ISA {

// Elements from memory as they lie there, zero from `count` on.
VK_INLINE Vec<float> load_pairs(const BFloat16* p, int64_t count) {
  const __mmask32 mask = count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p));
}

// The bits of a pair (a[i], b[i]) in each lane; i runs over the lower or the upper half of both.
template <bool kUpper>
VK_INLINE Vec<float> interleave(Vec<float> a, Vec<float> b) {
  typedef int16_t Indices __attribute__((vector_size(64)));
  const auto indices = constant_lanes<Indices>([](int i) { return (kUpper ? 16 : 0) + i / 2 + (i % 2 ? 32 : 0); });
  const __m512i both = _mm512_permutex2var_epi16(_mm512_castps_si512(a), (__m512i)indices, _mm512_castps_si512(b));
  return _mm512_castsi512_ps(both);
}

// pack_groups (pack.h) for pairs: target [padded rows / 2, width, 2].
template <class Rows>
void pack_pairs(Rows source, int64_t rows, int64_t columns, BFloat16* target, int64_t width) {
  const auto row = [&](int64_t r) { return r < rows ? source[r] : nullptr; };
  for (int64_t r = 0; r < padded_depth<BFloat16>(rows); r += 2) {
    const BFloat16 *first = row(r), *second = row(r + 1);
    for_each_part<32>(columns, [&](int64_t c, int64_t count) VK_BODY {
      const Vec<float> a = first ? load_pairs(first + c, count) : Vec<float>{};
      const Vec<float> b = second ? load_pairs(second + c, count) : Vec<float>{};
      float* to = reinterpret_cast<float*>(target + r * width + c * 2);
      store(to, interleave<false>(a, b));
      if (c + 16 < width) store(to + 16, interleave<true>(a, b));
    });
  }
}

// The pairs of two float32 vectors, rounded.
VK_INLINE Vec<float> narrow_pairs(Vec<float> a, Vec<float> b) {
  const __m512 halves = _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(b, a));  // a, then b
  typedef int16_t Indices __attribute__((vector_size(64)));
  const auto indices = constant_lanes<Indices>([](int i) { return i / 2 + (i % 2 ? 16 : 0); });
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16((__m512i)indices, _mm512_castps_si512(halves)));
}

// One row of operands. Columns up to the next full vector are written.
inline void narrow_row(const float* row, int64_t columns, BFloat16* target) {
  for (int64_t c = 0; c < columns; c += kWidth<float>) narrow(load(row + c), target + c);
}

// Two rows (null: zeros) times `factor` as one row of pairs, which may lie where the first row is.
inline void narrow_groups(const float* first, const float* second, int64_t columns, float factor, float* target) {
  for (int64_t c = 0; c < columns; c += kWidth<float>) {
    const Vec<float> a = first ? load(first + c) : Vec<float>{}, b = second ? load(second + c) : Vec<float>{};
    store(target + c, narrow_pairs(a * factor, b * factor));
  }
}

}  // namespace vitkernels::VK_ISA

#endif
