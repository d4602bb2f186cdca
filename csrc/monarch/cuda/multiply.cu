// Products with a Monarch matrix on a GPU.
//
// A thread block takes 64 rows of x. The first product leaves the intermediate of these rows in shared memory, where
// the blocks of the second weight read it; the second product adds the epilogue. Both weights pass through shared
// memory once, and copies run ahead across tiles and products. Where the intermediate of all blocks does not fit,
// thread blocks share them, and only x is read again. That of a single block may be too large: it goes through global
// memory.

#include "monarch/cuda/gelu.h"
#include "monarch/cuda/stream.h"

namespace vitkernels {
namespace {

using namespace cuda;

template <class T, int kBlocks>
class MonarchKernel {
  using Tile = MonarchTile<T>;
  using Acc = MonarchAcc<2, Tile::kColumnsOfSlot / 8>;  // (MMA,MMA_M,MMA_N)

 public:
  using Element = T;
  static constexpr int kThreads = Tile::kThreads;

  __device__ MonarchKernel(const MonarchCudaParams& params, bool allow_tf32, Element* shared)
      : p(params),
        allow_tf32_(allow_tf32),
        stages_(shared),
        places_(reinterpret_cast<int*>(shared + Tile::kPlaces)),
        inner_(shared + Tile::kInner),
        group_(params, int(block_index() % unsigned(params.num_groups))),
        slots_(group_),
        first_row_(int64_t(block_index() / unsigned(params.num_groups)) * Tile::kRows) {}

  __device__ __forceinline__ void run() {
    if (p.is_inner_shared) clear_tails();
    Stream stream(group_, first_row_, stages_);
    start_stages(stream);
    MonarchCursor tile;
    tile.advance(group_, Slots::kColumns, slots_.parts);
    for (;; tile.advance(group_, Slots::kColumns, slots_.parts)) {
      const bool is_second = tile.is_second(group_);
      if (is_second && tile.first == 0) finish_inner(stream);
      if (tile.is_done(group_)) break;
      if (!is_second) write_place(tile);
      Acc acc;
      cute::clear(acc);
      if (kBlocks > 1 && is_second) {
        multiply<kBlocks, 4 / kBlocks>(stream, acc, true);
      } else if (tile.width == MonarchCursor::kMaxWidth) {
        multiply<1, 4>(stream, acc, is_second);
      } else {
        multiply<1, 3>(stream, acc, is_second);
      }
      if (is_second) {
        store_outputs(acc, tile);
      } else {
        share_out(acc, tile);
        places_offset_ ^= kThreads;
      }
    }
  }

 private:
  using Slots = MonarchSlots<kBlocks>;
  using Stream = MonarchStream<Element, kBlocks>;
  static constexpr int kSteps = Tile::kDepth * int(sizeof(Element)) / 32;  // of instructions, in a step of the stream

  static __device__ int slot() { return int(threadIdx.x) / kWarpSize % Tile::kSlots; }
  static __device__ int first_row_of_warp() { return int(threadIdx.x) / kWarpSize / Tile::kSlots * Tile::kRowsOfWarp; }
  // Where a thread's sums lie: rows r, of four, and columns c of a pair of instructions, of four.
  static __device__ int row_of(int r) { return first_row_of_warp() + lane_index() / 4 + 8 * r; }
  static __device__ int column_of(int c) { return lane_index() % 4 * 2 + c % 2 + c / 2 * 8; }
  static __device__ float& sum_at(Acc& acc, int r, int pair, int c) {
    return acc(r % 2 * 2 + c % 2, r / 2, 2 * pair + c / 2);
  }

  // Found where they are used, to save registers.
  __device__ int num_rows() const { return int(min(p.problem.rows - computed_here(first_row_), int64_t(Tile::kRows))); }
  __device__ int depth_tiles() const { return ceil_div(computed_here(int(p.problem.second.inputs)), Tile::kDepth); }

  // Behind the intermediate's columns its last tiles are zero.
  __device__ void clear_tails() const {
    if (int(p.problem.second.inputs) % Tile::kDepth == 0) return;
    for (int block = 0; block < group_.count; ++block) {
      Element* const tile = inner_ + ((block + 1) * depth_tiles() - 1) * Tile::kTile;
      *reinterpret_cast<uint4*>(tile + int(threadIdx.x) * Tile::kVector) = uint4{};
    }
  }

  static __device__ __forceinline__ void start_stages(Stream& stream) {
#pragma unroll 1
    for (int i = 0; i < Tile::kStages - 1; ++i) stream.start(), commit_copies();
  }

  // Between the products.
  __device__ __forceinline__ void finish_inner(Stream& stream) {
    __syncthreads();
    if (!p.is_inner_shared) {
      wait_for_copies<0>();
      stream.pass_barrier(stages_ + stage_);
      start_stages(stream);
    } else if (p.needs_inner) {
      store_inner();
    }
  }

  // Adds the product of a tile. A slot has kOfSlot operands A, each with kPairs sixteens of columns.
  template <int kOfSlot, int kPairs>
  __device__ __forceinline__ void multiply(Stream& stream, Acc& acc, bool is_second) {
    const int steps = ceil_div(int((is_second ? p.problem.second : p.problem.first).inputs), Tile::kDepth);
    const RowOperand<Element, true> rows_operand(first_row_of_warp());
    const RowOperand<Element, false> columns_operand(0);
    const bool is_inner = is_second && p.is_inner_shared;
    int a[kOfSlot];  // the next step's operands, in elements from the stages on
    CUTE_UNROLL
    for (int i = 0; i < kOfSlot; ++i) {
      a[i] = Tile::kInner + min(slots_.block(slot(), i), group_.count - 1) * depth_tiles() * Tile::kTile;
    }
    with_arithmetic<Element>(allow_tf32_, [&](auto arithmetic) __attribute__((always_inline)) {
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        wait_for_copies<Tile::kStages - 2>();
        __syncthreads();  // the stage is there, and all reads of the one before are done
        stream.start();
        commit_copies();
        const Element* const stage = stages_ + stage_;
        const Element* const columns_tile = stage + (1 + slot()) * Tile::kTile;
        constexpr int kUnrolled = sizeof(Element) == 2 ? kSteps : 1;  // of float, code grows and registers run out
#pragma unroll kUnrolled
        for (int k = 0; k < kSteps; ++k) {
          CUTE_UNROLL
          for (int i = 0; i < kOfSlot; ++i) {
            uint32_t rows[2][4];
            CUTE_UNROLL
            for (int m = 0; m < 2; ++m) rows_operand.read(rows[m], stages_ + (is_inner ? a[i] : stage_), m, k);
            const PreparedRows<Element, decltype(arithmetic)> prepared(rows);
            CUTE_UNROLL
            for (int j = 0; j < kPairs; ++j) {
              const int pair = i * (4 / kOfSlot) + j;
              uint32_t columns[4];
              columns_operand.read(columns, columns_tile, pair, k);
              multiply_pair<Element>(arithmetic, acc, prepared, columns, pair);
            }
          }
        }
        stage_ = stage_ == (Tile::kStages - 1) * Tile::kStage ? 0 : stage_ + Tile::kStage;
        CUTE_UNROLL
        for (int i = 0; i < kOfSlot; ++i) a[i] += Tile::kTile;
      }
    });
  }

  // Where a column goes, one for each thread, before a barrier of the product: in shared memory to whole tiles of the
  // depth, or to a column of `inner`; -1 if it is none of the group's.
  __device__ __forceinline__ void write_place(const MonarchCursor& tile) const {
    const int of_slot = int(threadIdx.x) % Tile::kColumnsOfSlot;
    const int column = tile.first + int(threadIdx.x) / Tile::kColumnsOfSlot * tile.width + of_slot;
    int place = -1;
    if (of_slot < tile.width && column < tile.end) {
      const MonarchGroup::Place at = group_.place(tile.block, column);
      const int columns = p.is_inner_shared ? depth_tiles() * Tile::kDepth : int(p.problem.second.inputs);
      if (at.block < group_.count)
        place = (p.is_inner_shared ? at.block : group_.first + at.block) * columns + at.depth;
    }
    places_[places_offset_ + int(threadIdx.x)] = place;
  }

  // Of the intermediate, to the blocks of the second weight.
  __device__ __forceinline__ void share_out(Acc& acc, const MonarchCursor& tile) const {
    if (p.is_inner_shared) {
      using Layout = typename Tile::Shared::Layout;
      constexpr int kEightRows = Layout{}(8, 0);  // the swizzle's period
      for_each_place(tile, [&](int pair, int c, int place) __attribute__((always_inline)) {
        Element* const to = inner_ + place / Tile::kDepth * Tile::kTile + Layout{}(row_of(0), place % Tile::kDepth);
        CUTE_UNROLL
        for (int r = 0; r < 4; ++r) to[r * kEightRows] = Element(sum_at(acc, r, pair, c));
      });
    } else {
      rarely();
      for_each_place(tile, [&](int pair, int c, int place) __attribute__((always_inline)) {
        // From row to row, since pointers to all four would take the registers of the sums.
        Element* to = p.inner.row<Element>(first_row_ + computed_here(row_of(0))) + place;
        CUTE_UNROLL
        for (int r = 0; r < 4; ++r, to += 8 * p.inner.row_stride) {
          if (row_of(r) < num_rows()) *to = Element(sum_at(acc, r, pair, c));
        }
      });
    }
  }

  // Calls f(pair, column of it, place).
  template <class Function>
  __device__ __forceinline__ void for_each_place(const MonarchCursor& tile, Function&& f) const {
    const int* const places = places_ + places_offset_ + slot() * Tile::kColumnsOfSlot;
    CUTE_UNROLL
    for (int pair = 0; pair < 4; ++pair) {
      if (pair * 16 >= tile.width) break;
      CUTE_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int place = places[pair * 16 + column_of(c)];
        if (place >= 0) f(pair, c, place);
      }
    }
  }

  // From shared memory to its rows in memory.
  __device__ void store_inner() const {
    const int inputs = int(p.problem.second.inputs), vectors = depth_tiles() * (Tile::kDepth / Tile::kVector);
#pragma unroll 1
    for (int row = int(threadIdx.x) / kWarpSize; row < num_rows(); row += kThreads / kWarpSize) {
      Element* const to = p.inner.row<Element>(first_row_ + row) + int64_t(group_.first) * inputs;
#pragma unroll 1
      for (int i = lane_index(); i < group_.count * vectors; i += kWarpSize) {
        const int block = i / vectors, depth = (i - block * vectors) * Tile::kVector;
        const Element* const tile = inner_ + (block * depth_tiles() + depth / Tile::kDepth) * Tile::kTile;
        store_vector(to + block * inputs + depth, tile + typename Tile::Shared::Layout{}(row, depth % Tile::kDepth),
                     inputs - depth, p.is_inner_aligned);
      }
    }
  }

  // The outputs of a tile in shared memory: runs of columns that lie beside each other in memory.
  struct Runs {
    int count, length, pitch;      // `pitch` from one to the next in shared memory
    int64_t stride, column;        // from one to the next in memory, and where the first one begins
    int bias_stride, bias_of_run;  // between their columns, and from one to the next, of the bias and of grad_out

    __device__ Runs(const MonarchCudaParams& p, const MonarchGroup& group, const MonarchCursor& tile, int outputs,
                    int columns) {
      const int blocks = int(p.problem.second.blocks);
      if (!p.is_interleaved) {
        count = group.count, length = outputs, pitch = columns, stride = p.problem.second.outputs;
        column = group.first * stride + tile.first, bias_stride = blocks, bias_of_run = 1;
      } else {
        const bool is_whole = group.count == blocks;
        count = is_whole ? 1 : outputs, length = is_whole ? outputs * blocks : group.count;
        pitch = length, stride = blocks;
        column = int64_t(tile.first) * blocks + group.first, bias_stride = 1, bias_of_run = blocks;
      }
    }
  };

  __device__ __forceinline__ void store_outputs(Acc& acc, const MonarchCursor& tile) const {
    const int columns = slots_.parts * tile.width, outputs = min(columns, tile.end - tile.first);  // of each block
    const Runs runs(p, group_, tile, outputs, columns);
    const int multiplied = (stage_ == 0 ? Tile::kStages * Tile::kStage : stage_) - Tile::kStage;
    float* const staged = reinterpret_cast<float*>(stages_ + multiplied);  // [kStagedRows, kPitch]
#pragma unroll 1
    for (int first = 0; first < num_rows(); first += Tile::kStagedRows) {
      __syncthreads();  // all reads of the stage, or of the rows before, are done
      if (first_row_of_warp() == first) {
        stage_sums<0>(acc, tile, runs, outputs, staged);
      } else if (first_row_of_warp() + 16 == first) {
        stage_sums<1>(acc, tile, runs, outputs, staged);
      }
      __syncthreads();
      store_rows(tile, runs, first, staged);
    }
  }

  // Those of sixteen rows of the warp.
  template <int kSixteen>
  __device__ __forceinline__ void stage_sums(Acc& acc, const MonarchCursor& tile, const Runs& runs, int outputs,
                                             float* staged) const {
    // From an output of a block to the next, and from a block to the next.
    const int step = p.is_interleaved ? group_.count : 1;
    const int of_block = p.is_interleaved ? 1 : runs.pitch;
    CUTE_UNROLL
    for (int pair = 0; pair < 4; ++pair) {
      constexpr int kPairs = 4 / kBlocks;
      const int block = slots_.block(slot(), pair / kPairs), part = slots_.part(slot());
      if (block >= group_.count || part >= slots_.parts) continue;
      CUTE_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int of_slot = pair % kPairs * 16 + column_of(c), output = part * tile.width + of_slot;
        if (of_slot >= tile.width || output >= outputs) continue;
        float* const to = staged + output * step + block * of_block;
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) {
          to[(lane_index() / 4 + 8 * r) * Tile::kPitch] = sum_at(acc, 2 * kSixteen + r, pair, c);
        }
      }
    }
  }

  // With the epilogue, a vector of columns a thread, in every eighth row.
  __device__ __forceinline__ void store_rows(const MonarchCursor& tile, const Runs& runs, int first,
                                             const float* staged) const {
    constexpr int kVector = Tile::kVector;
    Element* const out = p.out.row<Element>(first_row_) + runs.column;
    const bool is_aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0 && p.out.row_stride % kVector == 0 &&
                            (runs.count == 1 || runs.stride % kVector == 0);
    const int vectors = ceil_div(runs.length, kVector);
    const bool has_vectors = runs.count == 1 || runs.pitch % 4 == 0;
#pragma unroll 1
    for (int i = lane_index(); i < runs.count * vectors; i += kWarpSize) {
      const int run = i / vectors, at = (i - run * vectors) * kVector, count = min(runs.length - at, kVector);
      const int64_t of_bias =
          int64_t(tile.first) * p.problem.second.blocks + group_.first + run * runs.bias_of_run + at * runs.bias_stride;
      float bias[kVector];
      CUTE_UNROLL
      for (int e = 0; e < kVector; ++e) bias[e] = p.bias && e < count ? p.bias[of_bias + e * runs.bias_stride] : 0.0f;
#pragma unroll 1
      for (int row = int(threadIdx.x) / kWarpSize; row < Tile::kStagedRows; row += kThreads / kWarpSize) {
        if (first + row >= num_rows()) break;
        const float* const from = staged + row * Tile::kPitch + run * runs.pitch + at;
        alignas(16) float x[kVector] = {};
        if (has_vectors) {
          CUTE_UNROLL
          for (int e = 0; e < kVector; e += 4) {
            if (e < count) *reinterpret_cast<float4*>(x + e) = *reinterpret_cast<const float4*>(from + e);
          }
        } else {
          CUTE_UNROLL
          for (int e = 0; e < kVector; ++e) {
            if (e < count) x[e] = from[e];
          }
        }
        CUTE_UNROLL
        for (int e = 0; e < kVector; ++e) x[e] += bias[e];
        activate(x, first_row_ + first + row, of_bias, runs.bias_stride, count);
        store_vector(out + (first + row) * p.out.row_stride + run * runs.stride + at, x, count, is_aligned);
      }
    }
  }

  __device__ __forceinline__ void activate(float (&x)[Tile::kVector], int64_t row, int64_t column, int stride,
                                           int count) const {
    if (p.epilogue == MonarchEpilogue::kGelu) {
      CUTE_UNROLL
      for (int e = 0; e < Tile::kVector; ++e) x[e] = gelu(x[e]);
    } else if (p.epilogue == MonarchEpilogue::kGradGelu) {
      const Element* const grad = p.grad_out.row<const Element>(row) + column;
      CUTE_UNROLL
      for (int e = 0; e < Tile::kVector; ++e) {
        x[e] = e < count ? float(grad[e * stride]) * gelu_derivative(x[e]) : 0.0f;
      }
    }
  }

  template <class From>
  static __device__ __forceinline__ void store_vector(Element* to, const From* from, int count, bool is_aligned) {
    alignas(16) Element rounded[Tile::kVector];
    CUTE_UNROLL
    for (int e = 0; e < Tile::kVector; ++e) rounded[e] = Element(from[e]);
    if (is_aligned && count >= Tile::kVector) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(rounded);
      return;
    }
    CUTE_UNROLL
    for (int e = 0; e < Tile::kVector; ++e) {
      if (e < count) to[e] = rounded[e];
    }
  }

  const MonarchCudaParams& p;
  const bool allow_tf32_;
  Element* const stages_;
  int* const places_;     // [2, columns of a tile]: one is read while the next is written
  Element* const inner_;  // [blocks of the group, tiles of the depth] of Shared
  const MonarchGroup group_;
  const Slots slots_;
  const int64_t first_row_;
  int places_offset_ = 0;
  int stage_ = 0;  // where the next one begins, in elements
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1)
    monarch_multiply(const __grid_constant__ MonarchCudaParams p, bool allow_tf32) {
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel(p, allow_tf32, reinterpret_cast<typename Kernel::Element*>(shared)).run();
}

template <class Element, int kBlocksOfSlot>
cudaError_t launch(const MonarchCudaParams& p, bool allow_tf32, cudaStream_t stream) {
  using Kernel = MonarchKernel<Element, kBlocksOfSlot>;
  using Tile = MonarchTile<Element>;
  const int64_t bytes = Tile::shared_bytes(p.is_inner_shared ? p.group : 0, p.problem.second.inputs);
  const int64_t tiles = ceil_div<int64_t>(p.problem.rows, Tile::kRows);
  return launch_tasks(monarch_multiply<Kernel>, tiles * p.num_groups, Kernel::kThreads, int(bytes), stream, p,
                      allow_tf32);
}

}  // namespace

template <DType kDType>
cudaError_t MonarchLaunches<kDType>::multiply(const MonarchCudaParams& p, bool allow_tf32, cudaStream_t stream) {
  using Element = MonarchElement<kDType>;
  if (p.group <= 4) return launch<Element, 1>(p, allow_tf32, stream);
  return launch<Element, 2>(p, allow_tf32, stream);
}

template <DType kDType>
cudaError_t MonarchLaunches<kDType>::plan(MonarchCudaParams& p) {
  using Element = MonarchElement<kDType>;
  using Tile = MonarchTile<Element>;
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const BlockWeight &first = p.problem.first, &second = p.problem.second;
  int64_t group = std::min<int64_t>(second.blocks, kMaxMonarchGroup);
  while (group > 0 && Tile::shared_bytes(group, second.inputs) > limit) --group;
  p.is_inner_shared = group > 0;
  p.num_groups = int(ceil_div<int64_t>(second.blocks, std::max<int64_t>(group, 1)));
  p.group = int(ceil_div<int64_t>(second.blocks, p.num_groups));
  p.divisor = Divisor(p.order == MonarchOrder::kForward ? p.group : int(second.inputs));
  const auto is_aligned = [](const void* data, int64_t stride, int64_t columns) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % Tile::kVector == 0 && columns % Tile::kVector == 0;
  };
  p.is_x_aligned = is_aligned(p.problem.x.data, p.problem.x.row_stride, first.inputs);
  p.is_first_aligned = is_aligned(first.data, first.inputs, first.inputs);
  p.is_second_aligned = is_aligned(second.data, second.inputs, second.inputs);
  p.is_inner_aligned = is_aligned(p.inner.data, p.inner.row_stride, second.inputs);
  return cudaSuccess;
}

template cudaError_t MonarchLaunches<DType::VK_DTYPE>::plan(MonarchCudaParams&);
template cudaError_t MonarchLaunches<DType::VK_DTYPE>::multiply(const MonarchCudaParams&, bool, cudaStream_t);

}  // namespace vitkernels
