// Matrix instructions of a whole warp: ldmatrix, stmatrix, movmatrix, mma.sync.
#include <cstring>

#include "numbers.h"
#include "warp.h"

namespace emulator {
namespace {

constexpr int kMatrixRows = 8, kRowBytes = 16;

int matrices(const Instruction& in) { return in.has("x4") ? 4 : in.has("x2") ? 2 : 1; }

void check_whole_warp(Warp& warp, Mask mask) {
  if (mask != kAllLanes) warp.fail("divergent_barrier", "needs all 32 lanes of the warp");
}

// Row r of matrix i lies where lane 8i + r says. Each lane holds two elements of a row (of a column under .trans).
struct Fragment {
  int byte[2];  // of its elements in the 8 x 8 matrix of 16-bit elements
  Fragment(int lane, bool transposed) {
    for (int e = 0; e < 2; ++e) {
      const int line = lane / 4, element = lane % 4 * 2 + e;
      byte[e] = transposed ? element * kRowBytes + line * 2 : line * kRowBytes + element * 2;
    }
  }
};

const Operand& part(const Operand& o, int i) { return o.parts.empty() ? o : o.parts[i]; }

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16 {d, ...}, [p]
void ldmatrix(Warp& warp, const Instruction& in, Mask mask) {
  check_whole_warp(warp, mask);
  const int count = matrices(in);
  const bool transposed = in.has("trans");
  uint64_t addresses[kLanes];
  for (int lane = 0; lane < count * kMatrixRows; ++lane) addresses[lane] = warp.address(in.operands[1], lane);
  for (int i = 0; i < count; ++i) {
    uint8_t data[kMatrixRows * kRowBytes], unknown[kMatrixRows * kRowBytes];
    for (int r = 0; r < kMatrixRows; ++r) {
      const int lane = i * kMatrixRows + r;
      const Place place = warp.reach(lane, Space::shared, addresses[lane], kRowBytes, Access::read);
      std::memcpy(data + r * kRowBytes, place.data, kRowBytes);
      std::memcpy(unknown + r * kRowBytes, place.unknown, kRowBytes);
    }
    const Row d = warp.row(part(in.operands[0], i));
    for (int lane = 0; lane < kLanes; ++lane) {
      const Fragment f(lane, transposed);
      d.value[lane] = 0;
      d.unknown[lane] = 0;
      for (int b = 0; b < 4; ++b) {
        const int from = f.byte[b / 2] + b % 2;
        d.value[lane] |= static_cast<uint64_t>(data[from]) << 8 * b;
        d.unknown[lane] |= unknown[from] << b;
      }
    }
  }
  const Mask used = count == 4 ? kAllLanes : (Mask{1} << count * kMatrixRows) - 1;
  warp.count(Space::shared, addresses, kRowBytes, used, false);
}

// stmatrix.sync.aligned.m8n8.x4[.trans].shared.b16 [p], {d, ...}
void stmatrix(Warp& warp, const Instruction& in, Mask mask) {
  check_whole_warp(warp, mask);
  const int count = matrices(in);
  const bool transposed = in.has("trans");
  uint64_t addresses[kLanes];
  for (int i = 0; i < count; ++i) {
    Place rows[kMatrixRows];
    for (int r = 0; r < kMatrixRows; ++r) {
      const int lane = i * kMatrixRows + r;
      addresses[lane] = warp.address(in.operands[0], lane);
      rows[r] = warp.reach(lane, Space::shared, addresses[lane], kRowBytes, Access::write);
    }
    const Row s = warp.row(part(in.operands[1], i));
    for (int lane = 0; lane < kLanes; ++lane) {
      const Fragment f(lane, transposed);
      for (int b = 0; b < 4; ++b) {
        const int to = f.byte[b / 2] + b % 2;
        rows[to / kRowBytes].data[to % kRowBytes] = static_cast<uint8_t>(s.value[lane] >> 8 * b);
        rows[to / kRowBytes].unknown[to % kRowBytes] = s.unknown[lane] >> b & 1;
      }
    }
  }
  const Mask used = count == 4 ? kAllLanes : (Mask{1} << count * kMatrixRows) - 1;
  warp.count(Space::shared, addresses, kRowBytes, used, true);
}

// movmatrix.sync.aligned.m8n8.trans.b16 d, a
void movmatrix(Warp& warp, const Instruction& in, Mask mask) {
  check_whole_warp(warp, mask);
  const Row d = warp.row(in.operands[0]), a = warp.row(in.operands[1]);
  uint8_t data[kMatrixRows * kRowBytes], unknown[kMatrixRows * kRowBytes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Fragment f(lane, false);
    for (int b = 0; b < 4; ++b) {
      data[f.byte[b / 2] + b % 2] = static_cast<uint8_t>(a.value[lane] >> 8 * b);
      unknown[f.byte[b / 2] + b % 2] = a.unknown[lane] >> b & 1;
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const Fragment f(lane, true);
    d.value[lane] = 0, d.unknown[lane] = 0;
    for (int b = 0; b < 4; ++b) {
      d.value[lane] |= static_cast<uint64_t>(data[f.byte[b / 2] + b % 2]) << 8 * b;
      d.unknown[lane] |= unknown[f.byte[b / 2] + b % 2] << b;
    }
  }
}

// A tile of an mma in numbers, and which of them are unknown.
template <int rows, int columns>
struct Tile {
  double value[rows][columns];  // [rows, columns]
  bool unknown[rows][columns];  // [rows, columns]
};

// D = A B + C with tiles of 16 x k, k x 8 and 16 x 8. Lane l holds rows l/4 and l/4 + 8, columns from l%4 times the
// number of elements in a register. Products are exact and summed in double together with C, then rounded once: GPUs
// keep fewer bits between, in an order of their own, so results agree up to rounding only.
template <class T, class Accumulator, int k>
void mma(Warp& warp, const Instruction& in, Mask mask) {
  check_whole_warp(warp, mask);
  constexpr int m = 16, n = 8, elements = 4 / kBytes<T>, bits = 32 / elements;
  constexpr int c_elements = 4 / kBytes<Accumulator>;
  static Tile<m, k> a;
  static Tile<n, k> b;  // transposed
  const auto read = [&](const Row& r, int lane, int e, double& value, bool& unknown) {
    value = number<T>(r.value[lane] >> bits * e & (~uint64_t{0} >> (64 - bits)));
    unknown = r.unknown[lane] >> kBytes<T> * e & kUnknown<T>;
  };
  for (int i = 0; i < static_cast<int>(in.operands[1].parts.size()); ++i) {
    const Row r = warp.row(in.operands[1].parts[i]);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int e = 0; e < elements; ++e) {
        const int row = lane / 4 + 8 * (i & 1), column = lane % 4 * elements + e + 4 * elements * (i >> 1);
        read(r, lane, e, a.value[row][column], a.unknown[row][column]);
      }
    }
  }
  for (int i = 0; i < std::max(1, static_cast<int>(in.operands[2].parts.size())); ++i) {
    const Row r = warp.row(part(in.operands[2], i));
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int e = 0; e < elements; ++e) {
        const int row = lane % 4 * elements + e + 4 * elements * i, column = lane / 4;
        read(r, lane, e, b.value[column][row], b.unknown[column][row]);
      }
    }
  }
  bool a_unknown[m] = {}, b_unknown[n] = {};
  for (int row = 0; row < m; ++row) {
    for (int j = 0; j < k; ++j) a_unknown[row] |= a.unknown[row][j];
  }
  for (int column = 0; column < n; ++column) {
    for (int j = 0; j < k; ++j) b_unknown[column] |= b.unknown[column][j];
  }
  for (int i = 0; i < 4 / c_elements; ++i) {
    const Row c = warp.row(in.operands[3].parts[i]), d = warp.row(in.operands[0].parts[i]);
    for (int lane = 0; lane < kLanes; ++lane) {
      uint64_t value = 0;
      unsigned unknown = 0;
      for (int e = 0; e < c_elements; ++e) {
        const int element = i * c_elements + e, row = lane / 4 + 8 * (element >> 1), column = lane % 4 * 2 + (element & 1);
        constexpr int shift = 8 * kBytes<Accumulator>;
        double sum = 0;
        for (int j = 0; j < k; ++j) sum += a.value[row][j] * b.value[column][j];
        sum += static_cast<double>(number<Accumulator>(c.value[lane] >> shift * e));
        value |= bits_of<Accumulator>(sum) << shift * e;
        const bool c_unknown = c.unknown[lane] >> kBytes<Accumulator> * e & kUnknown<Accumulator>;
        if (a_unknown[row] || b_unknown[column] || c_unknown) unknown |= kUnknown<Accumulator> << kBytes<Accumulator> * e;
      }
      d.value[lane] = value;
      d.unknown[lane] = static_cast<uint8_t>(unknown);
    }
  }
}

// Types stand in the order D, A, B, C.
template <int k, class A>
Handler mma_of(Type element, const Instruction& in) {
  const bool fits = in.types.size() == 4 && in.types[1] == element && in.types[2] == element && in.types[0] == in.types[3];
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
Handler mma_tf32(const Instruction& in) { return mma_of<k, Tfloat>(Type::tf32, in); }

constexpr const char* kMatrixModifiers = "aligned m8n8 x1 x2 x4 trans shared shared::cta";

const InstructionRow kRows[] = {
    {"ldmatrix.sync", kMatrixModifiers, always<ldmatrix>, Lanes::warp},
    {"stmatrix.sync", kMatrixModifiers, always<stmatrix>, Lanes::warp},
    {"movmatrix.sync", "aligned m8n8 trans", always<movmatrix>, Lanes::warp},
    {"mma.sync.m16n8k16", "aligned row col", mma_16bit<16>, Lanes::warp},
    {"mma.sync.m16n8k8", "aligned row col", mma_16bit<8>, Lanes::warp},
    {"mma.sync.m16n8k8", "aligned row col", mma_tf32<8>, Lanes::warp},
    {"mma.sync.m16n8k4", "aligned row col", mma_tf32<4>, Lanes::warp},
};

}  // namespace

const std::span<const InstructionRow> kMatrixRows = kRows;

}  // namespace emulator
