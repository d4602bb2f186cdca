// Discrete Fourier transforms of a few points in registers: of V, a vector of signals on the CPU and one of a thread's
// on a GPU, where cpu/simd.h is not included. T is the type of its numbers; forward means exp(-2 pi i / n).
#pragma once

#if defined(__CUDACC__)
#define VK_DFT __device__ __forceinline__
#define VK_DFT_UNROLL _Pragma("unroll")
#define VK_DFT_NAMESPACE cuda
#else
#define VK_DFT VK_INLINE
#define VK_DFT_UNROLL _Pragma("GCC unroll 16")
#define VK_DFT_NAMESPACE VK_ISA
#endif

namespace vitkernels::VK_DFT_NAMESPACE {

template <class T, class V>
VK_DFT void dft2(V& a, V& b) {
  const V sum = a + b;
  b = a - b, a = sum;
}

template <class T, class V>
VK_DFT void dft3(V* re, V* im) {
  const T c = T(0.866025403784438646763723170752936183);
  const V sum_re = re[1] + re[2], sum_im = im[1] + im[2], re0 = re[0] - T(0.5) * sum_re, im0 = im[0] - T(0.5) * sum_im,
          d_re = c * (re[1] - re[2]), d_im = c * (im[1] - im[2]);
  re[0] += sum_re, im[0] += sum_im;
  re[1] = re0 + d_im, im[1] = im0 - d_re;
  re[2] = re0 - d_im, im[2] = im0 + d_re;
}

template <class T, class V>
VK_DFT void dft4(V* re, V* im) {
  dft2<T, V>(re[0], re[2]), dft2<T, V>(im[0], im[2]);
  dft2<T, V>(re[1], re[3]), dft2<T, V>(im[1], im[3]);
  const V re0 = re[0], im0 = im[0], re1 = re[1], im1 = im[1], re2 = re[2], im2 = im[2], re3 = re[3], im3 = im[3];
  re[0] = re0 + re1, im[0] = im0 + im1;
  re[1] = re2 + im3, im[1] = im2 - re3;
  re[2] = re0 - re1, im[2] = im0 - im1;
  re[3] = re2 - im3, im[3] = im2 + re3;
}

template <class T, class V>
VK_DFT void dft5(V* re, V* im) {
  const T c1 = T(0.309016994374947424102293417182819059), s1 = T(0.951056516295153572116439333379382143),
          c2 = T(-0.809016994374947424102293417182819059), s2 = T(0.587785252292473129168705954639072769);
  const V a_re = re[1] + re[4], a_im = im[1] + im[4], b_re = re[2] + re[3], b_im = im[2] + im[3], d_re = re[1] - re[4],
          d_im = im[1] - im[4], e_re = re[2] - re[3], e_im = im[2] - im[3];
  const V p_re = re[0] + c1 * a_re + c2 * b_re, p_im = im[0] + c1 * a_im + c2 * b_im,
          q_re = re[0] + c2 * a_re + c1 * b_re, q_im = im[0] + c2 * a_im + c1 * b_im, u_re = s1 * d_re + s2 * e_re,
          u_im = s1 * d_im + s2 * e_im, v_re = s2 * d_re - s1 * e_re, v_im = s2 * d_im - s1 * e_im;
  re[0] += a_re + b_re, im[0] += a_im + b_im;
  re[1] = p_re + u_im, im[1] = p_im - u_re;
  re[4] = p_re - u_im, im[4] = p_im + u_re;
  re[2] = q_re + v_im, im[2] = q_im - v_re;
  re[3] = q_re - v_im, im[3] = q_im + v_re;
}

template <class T, class V>
VK_DFT void dft7(V* re, V* im) {
  const T c1 = T(0.623489801858733530525004884004239810), c2 = T(-0.222520933956314404288902564496794760),
          c3 = T(-0.900968867902419126236102319507445052), s1 = T(0.781831482468029808708444526674057750),
          s2 = T(0.974927912181823607018131682993931218), s3 = T(0.433883739117558120475768332848358755);
  const T cosines[3][3] = {{c1, c2, c3}, {c2, c3, c1}, {c3, c1, c2}},
          sines[3][3] = {{s1, s2, s3}, {s2, -s3, -s1}, {s3, -s1, s2}};
  V sum_re[3], sum_im[3], d_re[3], d_im[3];
  const V re0 = re[0], im0 = im[0];
  VK_DFT_UNROLL
  for (int q = 0; q < 3; ++q) {
    sum_re[q] = re[q + 1] + re[6 - q], sum_im[q] = im[q + 1] + im[6 - q];
    d_re[q] = re[q + 1] - re[6 - q], d_im[q] = im[q + 1] - im[6 - q];
    re[0] += sum_re[q], im[0] += sum_im[q];
  }
  VK_DFT_UNROLL
  for (int k = 0; k < 3; ++k) {
    V p_re = re0, p_im = im0, u_re{}, u_im{};
    VK_DFT_UNROLL
    for (int q = 0; q < 3; ++q) {
      p_re += cosines[k][q] * sum_re[q], p_im += cosines[k][q] * sum_im[q];
      u_re += sines[k][q] * d_re[q], u_im += sines[k][q] * d_im[q];
    }
    re[k + 1] = p_re + u_im, im[k + 1] = p_im - u_re;
    re[6 - k] = p_re - u_im, im[6 - k] = p_im + u_re;
  }
}

template <class T, class V>
VK_DFT void dft8(V* re, V* im) {
  const T c = T(0.707106781186547524400844362104849039);
  V even_re[4], even_im[4], odd_re[4], odd_im[4];
  VK_DFT_UNROLL
  for (int q = 0; q < 4; ++q) {
    even_re[q] = re[q] + re[q + 4], even_im[q] = im[q] + im[q + 4];
    odd_re[q] = re[q] - re[q + 4], odd_im[q] = im[q] - im[q + 4];
  }
  const V re1 = odd_re[1], re2 = odd_re[2], re3 = odd_re[3];
  odd_re[1] = c * (re1 + odd_im[1]), odd_im[1] = c * (odd_im[1] - re1);
  odd_re[2] = odd_im[2], odd_im[2] = -re2;
  odd_re[3] = c * (odd_im[3] - re3), odd_im[3] = -c * (re3 + odd_im[3]);
  dft4<T, V>(even_re, even_im), dft4<T, V>(odd_re, odd_im);
  VK_DFT_UNROLL
  for (int k = 0; k < 4; ++k) {
    re[2 * k] = even_re[k], im[2 * k] = even_im[k];
    re[2 * k + 1] = odd_re[k], im[2 * k + 1] = odd_im[k];
  }
}

// By Good and Thomas: without twiddles, since 2 and 7 have no common factor.
template <class T, class V>
VK_DFT void dft14(V* re, V* im) {
  V even_re[7], even_im[7], odd_re[7], odd_im[7];
  VK_DFT_UNROLL
  for (int q = 0; q < 7; ++q) {
    const int a = 2 * q, b = (2 * q + 7) % 14;
    even_re[q] = re[a] + re[b], even_im[q] = im[a] + im[b];
    odd_re[q] = re[a] - re[b], odd_im[q] = im[a] - im[b];
  }
  dft7<T, V>(even_re, even_im), dft7<T, V>(odd_re, odd_im);
  VK_DFT_UNROLL
  for (int k = 0; k < 7; ++k) {
    re[8 * k % 14] = even_re[k], im[8 * k % 14] = even_im[k];
    re[(8 * k + 7) % 14] = odd_re[k], im[(8 * k + 7) % 14] = odd_im[k];
  }
}

template <class T, class V>
VK_DFT void dft16(V* re, V* im) {
  // exp(-i pi / 8) to the power of 0 ... 9.
  const T c = T(0.923879532511286756128183189396788287), s = T(0.382683432365089771728459984030398867),
          h = T(0.707106781186547524400844362104849039);
  const T cosines[] = {1, c, h, s, 0, -s, -h, -c, -1, -c}, sines[] = {0, -s, -h, -c, -1, -c, -h, -s, 0, s};
  V r[4][4], i[4][4];
  VK_DFT_UNROLL
  for (int q = 0; q < 4; ++q) {
    VK_DFT_UNROLL
    for (int p = 0; p < 4; ++p) r[q][p] = re[4 * p + q], i[q][p] = im[4 * p + q];
    dft4<T, V>(r[q], i[q]);
    VK_DFT_UNROLL
    for (int k = 1; k < 4; ++k) {
      if (q == 0) continue;
      const V a = r[q][k], b = i[q][k];
      r[q][k] = a * cosines[q * k] - b * sines[q * k], i[q][k] = b * cosines[q * k] + a * sines[q * k];
    }
  }
  VK_DFT_UNROLL
  for (int k = 0; k < 4; ++k) {
    V to_re[4], to_im[4];
    VK_DFT_UNROLL
    for (int q = 0; q < 4; ++q) to_re[q] = r[q][k], to_im[q] = i[q][k];
    dft4<T, V>(to_re, to_im);
    VK_DFT_UNROLL
    for (int p = 0; p < 4; ++p) re[k + 4 * p] = to_re[p], im[k + 4 * p] = to_im[p];
  }
}

// The inverse, without its factor 1 / n, is the forward transform with real and imaginary parts exchanged.
template <bool kInverse, int kCount, class T, class V>
VK_DFT void dft(V* real, V* imaginary) {
  V *re = kInverse ? imaginary : real, *im = kInverse ? real : imaginary;
  if constexpr (kCount == 2) dft2<T, V>(re[0], re[1]), dft2<T, V>(im[0], im[1]);
  if constexpr (kCount == 3) dft3<T, V>(re, im);
  if constexpr (kCount == 4) dft4<T, V>(re, im);
  if constexpr (kCount == 5) dft5<T, V>(re, im);
  if constexpr (kCount == 7) dft7<T, V>(re, im);
  if constexpr (kCount == 8) dft8<T, V>(re, im);
  if constexpr (kCount == 14) dft14<T, V>(re, im);
  if constexpr (kCount == 16) dft16<T, V>(re, im);
}

}  // namespace vitkernels::VK_DFT_NAMESPACE
