// Matrix products of bfloat16 by tile registers (AMX).
//
// A tile has 16 rows of 64 bytes: 16 float32 sums, or 16 pairs of bfloat16. Two tiles of rows times two of columns stay in
// registers over the depth. The instructions are written out: the compiler's own do not tell it that they touch memory.
#pragma once

#include <algorithm>

#include "cpu/matmul_operands.h"

#if defined(__AMX_BF16__)

namespace vitkernels::VK_ISA {

// Tiles are the thread's, and other libraries use them too: a kernel configures them when it begins on a thread and gives
// them back at its end.
class TileScope {
 public:
  TileScope() {
    Configuration all_whole;
    asm volatile("ldtilecfg %0" ::"m"(all_whole));
  }
  ~TileScope() { asm volatile("tilerelease" ::: "memory"); }
  TileScope(const TileScope&) = delete;

 private:
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {kTileSize, kTileSize, kTileSize, kTileSize, kTileSize, kTileSize, kTileSize, kTileSize};
  };
};

template <int kTile>
VK_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
VK_INLINE void tile_load(const void* p, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride_bytes), "i"(kTile) : "memory");
}

template <int kTile>
VK_INLINE void tile_store(void* p, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride_bytes), "i"(kTile) : "memory");
}

template <int kSum, int kA, int kB>
VK_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

// Tile registers: sums (row tile, column tile), then the operands'.
inline constexpr int kSums = 0, kTilesOfA = 4, kTilesOfB = 6;

// sums = A B over the depth; A is read by rows. Strides in elements.
template <int kRowTiles, int kColumnTiles>
VK_INLINE void multiply_tiles(const BFloat16* a, int64_t a_stride, int64_t a_tile, int64_t a_step, const BFloat16* b,
                              int64_t b_stride, int64_t steps) {
  constexpr int64_t kBytes = sizeof(BFloat16);
  tile_zero<kSums>();
  if constexpr (kColumnTiles == 2) tile_zero<kSums + 1>();
  if constexpr (kRowTiles == 2) tile_zero<kSums + 2>();
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) tile_zero<kSums + 3>();
  for (int64_t k = 0; k < steps; ++k, a += a_step, b += kTileSize * b_stride) {
    tile_load<kTilesOfA>(a, a_stride * kBytes);
    tile_load<kTilesOfB>(b, b_stride * kBytes);
    tile_multiply_add<kSums, kTilesOfA, kTilesOfB>();
    if constexpr (kColumnTiles == 2) {
      tile_load<kTilesOfB + 1>(b + kTileSize * 2, b_stride * kBytes);
      tile_multiply_add<kSums + 1, kTilesOfA, kTilesOfB + 1>();
    }
    if constexpr (kRowTiles == 2) {
      tile_load<kTilesOfA + 1>(a + a_tile, a_stride * kBytes);
      tile_multiply_add<kSums + 2, kTilesOfA + 1, kTilesOfB>();
      if constexpr (kColumnTiles == 2) tile_multiply_add<kSums + 3, kTilesOfA + 1, kTilesOfB + 1>();
    }
  }
}

// The sums as rows of C: at most `rows` of them, set or added.
template <int kRowTiles, int kColumnTiles>
VK_INLINE void store_sums(float* c, int64_t c_stride, int64_t rows, bool add) {
  constexpr int64_t kBufferStride = kTileSize * kColumnTiles;
  alignas(64) float buffer[kRowTiles * kTileSize * kBufferStride];
  const bool directly = !add && rows == kRowTiles * kTileSize;
  float* target = directly ? c : buffer;
  const int64_t stride = directly ? c_stride : kBufferStride, bytes = stride * sizeof(float);
  tile_store<kSums>(target, bytes);
  if constexpr (kColumnTiles == 2) tile_store<kSums + 1>(target + kTileSize, bytes);
  if constexpr (kRowTiles == 2) tile_store<kSums + 2>(target + kTileSize * stride, bytes);
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) tile_store<kSums + 3>(target + kTileSize * (stride + 1), bytes);
  if (directly) return;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < kBufferStride; i += kTileSize) {
      float* to = c + r * c_stride + i;
      const Vec<float> sum = load(buffer + r * kBufferStride + i);
      store(to, add ? load(to) + sum : sum);
    }
  }
}

// Where A's neighbours along the depth are not neighbours in memory, tiles of it are transposed first.
inline constexpr int64_t kStagedSteps = kChain / (kTileSize * 2);

inline void stage_tile(const BFloat16* a, int64_t depth_stride, float* tile) {
  Vec<float> pairs[kTileSize];
  for (int64_t k = 0; k < kTileSize; ++k) pairs[k] = load(reinterpret_cast<const float*>(a + k * depth_stride));
  transpose<float>(pairs);
  for (int64_t r = 0; r < kTileSize; ++r) store(tile + r * kTileSize, pairs[r]);
}

inline void matmul_tiles(MatmulA<BFloat16> a, MatmulB<BFloat16> b, int64_t rows, int64_t columns, int64_t depth,
                         float* c, int64_t c_stride, bool accumulate) {
  constexpr int64_t kStep = kTileSize * 2, kTileElements = kTileSize * kStep;
  alignas(64) float staged[kStagedSteps * 2 * kTileElements / 2];
  const bool by_rows = a.depth_stride == 2;
  const int64_t steps = depth / kStep, max_steps = by_rows ? steps : std::min(steps, kStagedSteps);
  for (int64_t row = 0; row < rows; row += 2 * kTileSize) {
    const int64_t count = std::min<int64_t>(rows - row, 2 * kTileSize), row_tiles = divide_up(count, kTileSize);
    for (int64_t first = 0; first < steps; first += max_steps) {
      const int64_t part = std::min(steps - first, max_steps);
      const BFloat16* a_part = a.data + row * a.row_stride + first * kTileSize * a.depth_stride;
      int64_t stride = a.row_stride, tile = kTileSize * a.row_stride, step = kStep;
      if (!by_rows) {
        for (int64_t k = 0; k < part; ++k) {
          for (int64_t t = 0; t < row_tiles; ++t) {
            stage_tile(a_part + k * kTileSize * a.depth_stride + t * tile, a.depth_stride,
                       staged + (k * 2 + t) * kTileElements / 2);
          }
        }
        a_part = reinterpret_cast<const BFloat16*>(staged);
        stride = kStep, tile = kTileElements, step = 2 * kTileElements;
      }
      const bool add = accumulate || first > 0;
      for (int64_t column = 0; column < columns; column += kPanel<BFloat16>) {
        const BFloat16* panel = b.data + column / kPanel<BFloat16> * b.panel_stride + first * kTileSize * b.row_stride;
        const auto block = [&]<int kRowTiles, int kColumnTiles>() {
          multiply_tiles<kRowTiles, kColumnTiles>(a_part, stride, tile, step, panel, b.row_stride, part);
          store_sums<kRowTiles, kColumnTiles>(c + row * c_stride + column, c_stride, count, add);
        };
        const bool wide = columns - column > kTileSize;
        if (row_tiles == 2) {
          wide ? block.operator()<2, 2>() : block.operator()<2, 1>();
        } else {
          wide ? block.operator()<1, 2>() : block.operator()<1, 1>();
        }
      }
    }
  }
}

}  // namespace vitkernels::VK_ISA

#else

namespace vitkernels::VK_ISA {

struct TileScope {
  TileScope() {}
};

}  // namespace vitkernels::VK_ISA

#endif
