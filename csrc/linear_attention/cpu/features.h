// Feature maps of linear attention on the CPU, row by row.
#pragma once

#include "cpu/convert.h"
#include "cpu/math.h"
#include "cpu/matmul.h"
#include "cpu/pack.h"
#include "cpu/rows.h"
#include "linear_attention/linear_attention.h"

namespace vitkernels::VK_ISA {

template <class T>
class Features {
 public:
  explicit Features(const LinearProblem& p) : map(p.feature_map), power(p.power), columns(p.head_dim) {}

  // NaN stays NaN: it is the second operand of every max().

  // target [rows, width] = phi(source [rows, columns]), zero in the columns behind.
  template <class S>
  void apply(EvenRows<S> source, int64_t rows, T* target) const {
    switch (map) {
      case FeatureMap::kIdentity: return apply_each(source, rows, target, [](Vec<T> x) VK_BODY { return x; });
      case FeatureMap::kRelu:
        return apply_each(source, rows, target, [](Vec<T> x) VK_BODY { return max<T>(Vec<T>{}, x); });
      case FeatureMap::kElu:
        return apply_each(source, rows, target,
                          [](Vec<T> x) VK_BODY { return x > 0 ? x + T(1) : exp<T>(x > 0 ? Vec<T>{} : x); });
      case FeatureMap::kExp:
        return apply_each(source, rows, target, [](Vec<T> x) VK_BODY {
          const Bits<T> is_large = x > kLargestExponent;  // where exp() has no meaning
          return is_large ? broadcast(std::numeric_limits<T>::infinity()) : exp<T>(is_large ? Vec<T>{} : x);
        });
      case FeatureMap::kFocused: break;
    }
    for (int64_t r = 0; r < rows; ++r) focus(source[r], target + r * width);
  }

  // grad [rows, width] becomes the gradient of the source from that of the features, `phi`.
  template <class S>
  void differentiate(EvenRows<S> source, const T* phi, int64_t rows, T* grad) const {
    switch (map) {
      case FeatureMap::kIdentity: return;
      case FeatureMap::kRelu:
        return multiply_each(phi, rows, grad, [](Vec<T> y) VK_BODY { return y > 0 ? broadcast(T(1)) : Vec<T>{}; });
      case FeatureMap::kElu:
        return multiply_each(phi, rows, grad, [](Vec<T> y) VK_BODY { return y < 1 ? y : broadcast(T(1)); });
      case FeatureMap::kExp: return multiply_each(phi, rows, grad, [](Vec<T> y) VK_BODY { return y; });
      case FeatureMap::kFocused: break;
    }
    for (int64_t r = 0; r < rows; ++r) unfocus(source[r], phi + r * width, grad + r * width);
  }

 private:
  static constexpr T kFocusEps = T(1e-6);
  static constexpr T kLargestExponent = sizeof(T) == 4 ? T(88.7228) : T(709.7827);

  template <class S, class Map>
  VK_INLINE void apply_each(EvenRows<S> source, int64_t rows, T* target, Map&& phi) const {
    for (int64_t r = 0; r < rows; ++r) {
      const S* from = source[r];
      T* to = target + r * width;
      for_each_part<kWidth<T>>(columns, [&](int64_t c, int64_t count) VK_BODY {
        const Vec<T> y = phi(load_widened<T>(from + c, count));
        store(to + c, count == kWidth<T> ? y : keep_first<T>(y, count, T(0)));
      });
    }
  }

  template <class Slope>
  VK_INLINE void multiply_each(const T* phi, int64_t rows, T* grad, Slope&& slope) const {
    for (int64_t i = 0; i < rows * width; i += kWidth<T>) store(grad + i, load(grad + i) * slope(load(phi + i)));
  }

  // A row u = relu(x) + 1e-6, divided by its largest element: powers then neither overflow nor vanish. As phi grows in
  // proportion to u, its gradient does not depend on that.
  template <class S>
  struct FocusedRow {
    const S* from;
    int64_t power;
    T largest = 0, of_u = 0, of_power = 0;  // sums of squares: of u, and of its power

    FocusedRow(const S* from, int64_t columns, int64_t power) : from(from), power(power) {
      Vec<T> maxima{}, squares{}, squares_of_power{};
      for_each_part<kWidth<T>>(columns, [&](int64_t c, int64_t count)
                                            VK_BODY { maxima = max<T>(maxima, load_widened<T>(from + c, count)); });
      largest = reduce_max<T>(maxima) + kFocusEps;
      for_each_part<kWidth<T>>(columns, [&](int64_t c, int64_t count) VK_BODY {
        const Vec<T> u = at(c, count), w = to_power(u, power);
        squares += u * u, squares_of_power += w * w;
      });
      of_u = reduce_add<T>(squares), of_power = reduce_add<T>(squares_of_power);
    }

    VK_INLINE Vec<T> at(int64_t c, int64_t count) const {
      const Vec<T> u = (max<T>(Vec<T>{}, load_widened<T>(from + c, count)) + kFocusEps) / broadcast(largest);
      return count == kWidth<T> ? u : keep_first<T>(u, count, T(0));
    }
    static VK_INLINE Vec<T> to_power(Vec<T> u, int64_t exponent) {
      Vec<T> result = broadcast(T(1));
      for (int64_t i = 0; i < exponent; ++i) result = result * u;
      return result;
    }
    T factor() const { return std::sqrt(of_u / of_power); }
  };

  template <class S>
  void focus(const S* from, T* to) const {
    const FocusedRow<S> row(from, columns, power);
    const Vec<T> factor = broadcast(row.factor() * row.largest);
    for_each_part<kWidth<T>>(columns, [&](int64_t c, int64_t count)
                                          VK_BODY { store(to + c, row.to_power(row.at(c, count), power) * factor); });
  }

  template <class S>
  void unfocus(const S* from, const T* phi, T* grad) const {
    const FocusedRow<S> row(from, columns, power);
    Vec<T> dots{};
    for (int64_t c = 0; c < width; c += kWidth<T>) dots += load(grad + c) * load(phi + c);
    const T dot = reduce_add<T>(dots) / row.largest;
    const Vec<T> factor = broadcast(row.factor()), by_power = broadcast(dot / row.of_power);
    const Vec<T> by_u = broadcast(dot / row.of_u);
    for_each_part<kWidth<T>>(columns, [&](int64_t c, int64_t count) VK_BODY {
      const Vec<T> u = row.at(c, count), slope = row.to_power(u, power - 1) * T(power);
      const Vec<T> of_u = slope * (load(grad + c) * factor - row.to_power(u, power) * by_power) + u * by_u;
      store(grad + c, load_widened<T>(from + c, count) > 0 ? of_u : Vec<T>{});
    });
  }

  FeatureMap map;
  int64_t power, columns;

 public:
  const int64_t width = round_up(columns, kWidth<T>);
};

}  // namespace vitkernels::VK_ISA
