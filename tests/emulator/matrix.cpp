// Matrix instructions of a whole warp: ldmatrix, stmatrix, mma.sync.
#include <algorithm>

#include "numbers.h"
#include "warp.h"

namespace emulator {
namespace {

constexpr int kMatrixRows = 8, kRowBytes = 16;

void check_whole_warp(Warp& warp, Mask mask) {
  if (mask != kAllLanes) warp.fail("divergent_barrier", "needs all 32 lanes of the warp");
}

const Operand& part(const Operand& o, int i) { return o.parts.empty() ? o : o.parts[i]; }

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16 {d, ...}, [p]; stmatrix.sync... [p], {s, ...}
// Row r of matrix i lies where lane 8i + r says. A lane holds two elements of row lane/4, or of that column under .trans.
template <Access access>
void move_matrices(Warp& warp, const Instruction& in, Mask mask) {
  check_whole_warp(warp, mask);
  constexpr bool loads = access == Access::read;
  const Operand &pointer = in.operands[loads], &registers = in.operands[!loads];
  const int count = in.has("x4") ? 4 : in.has("x2") ? 2 : 1;
  const bool transposed = in.has("trans");
  uint64_t addresses[kLanes];  // all read before the register of one can be written
  for (int lane = 0; lane < count * kMatrixRows; ++lane) addresses[lane] = warp.address(pointer, lane);
  for (int i = 0; i < count; ++i) {
    Location rows[kMatrixRows];
    for (int r = 0; r < kMatrixRows; ++r) {
      const int lane = i * kMatrixRows + r;
      rows[r] = warp.reach(lane, Space::shared, addresses[lane], kRowBytes, access);
    }
    const Row held = warp.row(part(registers, i));
    for (int lane = 0; lane < kLanes; ++lane) {
      if (loads) held.set(lane, 0, 0);
      for (int b = 0; b < 4; ++b) {
        const int line = lane / 4, element = lane % 4 * 2 + b / 2;
        const Location& row = rows[transposed ? element : line];
        const int at = 2 * (transposed ? line : element) + b % 2;
        if constexpr (loads) {
          held.value[lane] |= static_cast<uint64_t>(row.data[at]) << 8 * b;
          held.unknown[lane] |= row.unknown[at] << b;
        } else {
          row.data[at] = static_cast<uint8_t>(held.value[lane] >> 8 * b);
          row.unknown[at] = held.unknown[lane] >> b & 1;
        }
      }
    }
  }
  const Mask used = count == 4 ? kAllLanes : (Mask{1} << count * kMatrixRows) - 1;
  warp.count(Space::shared, addresses, kRowBytes, used, !loads);
}

// D = A B + C with tiles of 16 x k, k x 8 and 16 x 8. Lane l holds rows l/4 and l/4 + 8, columns from l%4 times the
// number of elements in a register. Products are exact and summed in double together with C, then rounded once: GPUs
// keep fewer bits between, in an order of their own, so results agree up to rounding only.
template <class T, class Accumulator, int k>
void mma(Warp& warp, const Instruction& in, Mask mask) {
  check_whole_warp(warp, mask);
  constexpr int m = 16, n = 8, elements = 4 / kBytes<T>, bits = 32 / elements;
  constexpr int c_bytes = kBytes<Accumulator>, c_elements = 4 / c_bytes;
  static double a[m][k], b[n][k];             // [m, k], [n, k]
  bool a_unknown[m] = {}, b_unknown[n] = {};  // a row of A, a column of B
  const auto read = [&](const Operand& o, auto&& location) {
    for (int i = 0; i < std::max(1, static_cast<int>(o.parts.size())); ++i) {
      const Row r = warp.row(part(o, i));
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int e = 0; e < elements; ++e) {
          location(i, lane, e, number<T>(r.value[lane] >> bits * e),
                   (r.unknown[lane] >> kBytes<T> * e & kUnknown<T>) != 0);
        }
      }
    }
  };
  read(in.operands[1], [&](int i, int lane, int e, double value, bool unknown) {
    const int row = lane / 4 + 8 * (i & 1), column = lane % 4 * elements + e + 4 * elements * (i >> 1);
    a[row][column] = value;
    a_unknown[row] |= unknown;
  });
  read(in.operands[2], [&](int i, int lane, int e, double value, bool unknown) {
    const int row = lane % 4 * elements + e + 4 * elements * i, column = lane / 4;
    b[column][row] = value;
    b_unknown[column] |= unknown;
  });
  uint64_t sums[4 / c_elements][kLanes] = {};
  unsigned unknown[4 / c_elements][kLanes] = {};
  for (int element = 0; element < 4; ++element) {
    const int i = element / c_elements, e = element % c_elements;
    const Row c = warp.row(in.operands[3].parts[i]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4 + 8 * (element >> 1), column = lane % 4 * 2 + (element & 1);
      double sum = 0;
      for (int j = 0; j < k; ++j) sum += a[row][j] * b[column][j];
      sum += static_cast<double>(number<Accumulator>(c.value[lane] >> 8 * c_bytes * e));
      sums[i][lane] |= bits_of<Accumulator>(sum) << 8 * c_bytes * e;
      const bool c_unknown = c.unknown[lane] >> c_bytes * e & kUnknown<Accumulator>;
      if (a_unknown[row] || b_unknown[column] || c_unknown) unknown[i][lane] |= kUnknown<Accumulator> << c_bytes * e;
    }
  }
  for (int i = 0; i < 4 / c_elements; ++i) {
    const Row d = warp.row(in.operands[0].parts[i]);
    for (int lane = 0; lane < kLanes; ++lane) d.set(lane, sums[i][lane], unknown[i][lane]);
  }
}

// Types stand in the order D, A, B, C.
template <int k, class A>
Handler mma_of(Type element, const Instruction& in) {
  const bool fits =
      in.types.size() == 4 && in.types[1] == element && in.types[2] == element && in.types[0] == in.types[3];
  if (!fits) return nullptr;
  if (in.types[0] == Type::f32) return mma<A, float, k>;
  return in.types[0] == Type::f16 && element == Type::f16 ? mma<A, Half, k> : nullptr;
}
template <int k>
Handler mma_16bit(const Instruction& in) {
  const Handler half = mma_of<k, Half>(Type::f16, in);
  return half ? half : mma_of<k, Bfloat>(Type::bf16, in);
}
template <int k>
Handler mma_tf32(const Instruction& in) {
  return mma_of<k, Tfloat>(Type::tf32, in);
}

constexpr const char* kMatrixModifiers = "aligned m8n8 x1 x2 x4 trans shared shared::cta";

const InstructionRow kRows[] = {
    {"ldmatrix.sync", kMatrixModifiers, always<move_matrices<Access::read>>, Lanes::warp},
    {"stmatrix.sync", kMatrixModifiers, always<move_matrices<Access::write>>, Lanes::warp},
    {"mma.sync.m16n8k16", "aligned row col", mma_16bit<16>, Lanes::warp},
    {"mma.sync.m16n8k8", "aligned row col", mma_16bit<8>, Lanes::warp},
    {"mma.sync.m16n8k8", "aligned row col", mma_tf32<8>, Lanes::warp},
    {"mma.sync.m16n8k4", "aligned row col", mma_tf32<4>, Lanes::warp},
};

}  // namespace

const std::span<const InstructionRow> kMatrixRows = kRows;

}  // namespace emulator
