// The roots of unity of transforms.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>
#include <vector>

namespace vitkernels {

// The roots of unity exp(-2 pi i k / 4 L), k < 4 L, rounded once from float64.
class Roots {
 public:
  explicit Roots(int64_t length) : length_(length), cosines_(length + 1) {
    const double step = std::numbers::pi / 2 / double(length);
    for (int64_t i = 0; i <= length; ++i) {
      cosines_[i] = 2 * i <= length ? std::cos(step * double(i)) : std::sin(step * double(length - i));
    }
  }

  template <class T>
  T* write(int64_t k, T* to) const {
    const double c = cosines_[k % length_], s = cosines_[length_ - k % length_];
    const double real[] = {c, -s, -c, s}, imaginary[] = {-s, -c, s, c};
    to[0] = T(real[k / length_]), to[1] = T(imaginary[k / length_]);
    return to + 2;
  }

 private:
  int64_t length_;
  std::vector<double> cosines_;
};

}  // namespace vitkernels
