// Divides queries and keys on a map by their norms, and the gradient of that. Compiled once per instruction set.

#include "attention/unit_rows.h"

#include <cmath>

#include "attention/cpu/softmax.h"
#include "cpu/convert.h"
#include "cpu/make_kernel.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class UnitRows {
  using T = Compute<S>;

 public:
  UnitRows(const UnitRowsParams& params, void*) : p(params) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const S* const row = p.row<S>(i);
      const T norm = std::sqrt(product(row, row)), factor = unit_factor(norm);
      if (p.units) scale(row, factor, static_cast<S*>(p.units) + i * p.dim);
      if (p.grad) differentiate(row, norm, factor, static_cast<S*>(p.grad) + i * p.dim);
    }
  }

 private:
  T product(const S* a, const S* b) const {
    Vec<T> sum{};
    for_each_vector<T>({0, p.dim}, [&](int64_t c, Range lanes) {
      sum += load_widened<T>(a + c, lanes.end) * load_widened<T>(b + c, lanes.end);
    });
    return reduce_add<T>(sum);
  }

  void scale(const S* row, T factor, S* unit) const {
    for_each_vector<T>({0, p.dim}, [&](int64_t c, Range lanes) {
      store_narrowed<T>(unit + c, load_widened<T>(row + c, lanes.end) * factor, lanes.end);
    });
  }

  // What points along the row is taken out of the gradient.
  void differentiate(const S* row, T norm, T factor, S* grad) const {
    const T along = norm < T(kSmallestNorm) ? T(0) : product(row, grad) * factor * factor;
    for_each_vector<T>({0, p.dim}, [&](int64_t c, Range lanes) {
      const Vec<T> across = load_widened<T>(grad + c, lanes.end) - load_widened<T>(row + c, lanes.end) * along;
      store_narrowed<T>(grad + c, across * factor, lanes.end);
    });
  }

  const UnitRowsParams& p;
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(UnitRows, UnitRowsParams);
