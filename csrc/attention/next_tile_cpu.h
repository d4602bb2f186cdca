// The tile of a map after the present one. Its tokens lie in short rows far apart, which a processor does not foresee:
// they are brought nearer while the present one is worked on.
#pragma once

#include "attention/spatial_tile_cpu.h"

namespace vitkernels::VK_ISA {

template <class S>
class NextTile {
 public:
  // Empty boxes if there is none.
  void start(const TileBoxes& of_next, int64_t of_batch) { boxes = of_next, batch = of_batch; }

  struct Rows {
    const MapTensor& tensor;
    int64_t head, dim;
  };

  // Brings one of `count` shares of a tensor's rows.
  VK_INLINE void fetch(const Rows& rows, const int64_t (&map)[kMaxAxes], Box TileBoxes::* of_tensor, int64_t share,
             int64_t count) const {
    constexpr int64_t kCacheLine = 64;
    const Box& box = boxes.*of_tensor;
    const int64_t tokens = box.count(), step = rows.tensor.axis_stride[kMaxAxes - 1] * box.step[kMaxAxes - 1];
    const Range shared{tokens * share / count, tokens * (share + 1) / count};
    box.for_each_line_on(map, shared, [&](int64_t, int64_t on_line, const Place& first) VK_BODY {
      const S* row = rows.tensor.template at<const S>(batch, box.on_map(first), rows.head);
      for (int64_t i = 0; i < on_line; ++i, row += step) {
        const char* bytes = reinterpret_cast<const char*>(row);
        for (int64_t at = 0; at < rows.dim * int64_t(sizeof(S)); at += kCacheLine) __builtin_prefetch(bytes + at, 0, 2);
      }
    });
  }

 private:
  TileBoxes boxes{};
  int64_t batch = 0;
};

}  // namespace vitkernels::VK_ISA
