// The tail of the normal distribution, for float32.
#pragma once

#include "common/range.h"

namespace vitkernels {

inline constexpr int kNormalTailDegree = 9;

// A coefficient of exp(t^2 / 2) erfc(t / sqrt(2)) / 2 as a polynomial of 1 / (1 + t / 4): minimax in relative error,
// 1.2e-8, for t to 13.3, where the density vanishes.
VK_HOST_DEVICE constexpr float normal_tail(int i) {
  constexpr float kCoefficients[kNormalTailDegree + 1] = {
      -2.43623890e-05f, 1.00281369e-01f,  9.43930771e-02f, 1.23535937e-01f,  -2.60311828e-02f,
      3.14963920e-01f,  -3.46052793e-01f, 4.04449615e-01f, -2.00207681e-01f, 3.46920942e-02f};
  return kCoefficients[i];
}

}  // namespace vitkernels
