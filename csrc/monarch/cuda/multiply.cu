// Products with a Monarch matrix on a GPU.
//
// A thread block takes 64 rows of x. The first product leaves the intermediate of these rows in shared memory, where the
// blocks of the second weight read it; the second product adds the epilogue. Both weights pass through shared memory
// once, and copies run ahead across tiles and products. Where the intermediate of all blocks does not fit, thread blocks
// share them, and only x is read again. That of a single block may be too large: it goes through global memory.

#include "monarch/cuda/gelu.h"
#include "monarch/cuda/stream.h"

namespace vitkernels {
namespace {

using namespace cuda;

template <class T, int kBlocks>
class MonarchKernel {
  using Tile = MonarchTile<T>;
  using Acc = MonarchSums<2, Tile::kColumnsOfSlot / 8>;  // (MMA,MMA_M,MMA_N)

 public:
  using Element = T;
  static constexpr int kThreads = Tile::kThreads;

  __device__ MonarchKernel(const MonarchCudaParams& params, bool allow_tf32, Element* shared)
      : p(params),
        allow_tf32_(allow_tf32),
        stages_(shared),
        staged_(shared + Tile::kStages * Tile::kStage),
        inner_(shared + Tile::kInner),
        group_(params, int(block_index() % unsigned(params.num_groups))),
        slots_(group_),
        first_row_(int64_t(block_index() / unsigned(params.num_groups)) * Tile::kRows),
        num_rows_(int(min(params.problem.rows - first_row_, int64_t(Tile::kRows)))),
        depth_tiles_(ceil_div(int(params.problem.second.inputs), Tile::kDepth)) {}

  __device__ __forceinline__ void run() {
    if (p.is_inner_shared) clear_tails();
    MonarchStream<Element, kBlocks> stream(group_, first_row_, stages_);
    start_stages(stream);
    MonarchCursor tile;
    tile.advance(group_, Slots::kColumns, slots_.parts);
    for (; !tile.is_second(group_); tile.advance(group_, Slots::kColumns, slots_.parts)) {
      const int steps = ceil_div(int(p.problem.first.inputs), Tile::kDepth);
      if (tile.width == 64) {
        first_product<4>(stream, tile, steps);
      } else if (tile.width == 48) {
        first_product<3>(stream, tile, steps);
      } else {
        first_product<2>(stream, tile, steps);
      }
    }
    if (p.needs_inner || !p.is_inner_shared) __syncthreads();
    if (p.needs_inner && p.is_inner_shared) store_inner();
    if (!p.is_inner_shared) {
      wait_for_copies<0>();
      stream.pass_barrier(stage_);
      start_stages(stream);
    }
    for (; !tile.is_done(group_); tile.advance(group_, Slots::kColumns, slots_.parts)) {
      if constexpr (kBlocks > 1) {
        second_product<4 / kBlocks>(stream, tile);
      } else if (tile.width == 64) {
        second_product<4>(stream, tile);
      } else if (tile.width == 48) {
        second_product<3>(stream, tile);
      } else {
        second_product<2>(stream, tile);
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

  // Behind the intermediate's columns its last tiles are zero.
  __device__ void clear_tails() const {
    if (int(p.problem.second.inputs) % Tile::kDepth == 0) return;
    for (int block = 0; block < group_.count; ++block) {
      Element* const tile = inner_ + ((block + 1) * depth_tiles_ - 1) * Tile::kTile;
      *reinterpret_cast<uint4*>(tile + int(threadIdx.x) * Tile::kVector) = uint4{};
    }
  }

  static __device__ void start_stages(Stream& stream) {
    CUTE_UNROLL
    for (int i = 0; i < Tile::kStages - 1; ++i) stream.start(), commit_copies();
  }

  // acc = the product of `steps` steps. A slot has kOfSlot operands A, of which the first tile lies at `a` + a_tiles[..]
  // tiles or, without `a`, in the stage; each has kPairs sixteens of columns.
  template <int kOfSlot, int kPairs>
  __device__ __forceinline__ void multiply(Stream& stream, Acc& acc, int steps, const Element* a,
                                           const int (&a_tiles)[kOfSlot]) {
    const RowOperand<Element, true> rows_operand(first_row_of_warp());
    const RowOperand<Element, false> columns_operand(0);
    cute::clear(acc);
    with_arithmetic<Element>(allow_tf32_, [&](auto arithmetic) __attribute__((always_inline)) {
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        wait_for_copies<Tile::kStages - 2>();
        __syncthreads();  // the stage is there, and all reads of the one before are done
        stream.start();
        commit_copies();
        const Element* const stage = stages_ + stage_ * Tile::kStage;
        const Element* const columns_tile = stage + (1 + slot()) * Tile::kTile;
        constexpr int kUnrolled = sizeof(Element) == 2 ? kSteps : 1;  // of float, code grows and registers run out
#pragma unroll kUnrolled
        for (int k = 0; k < kSteps; ++k) {
          CUTE_UNROLL
          for (int i = 0; i < kOfSlot; ++i) {
            const Element* const rows_tile = a ? a + (a_tiles[i] + step) * Tile::kTile : stage;
            uint32_t rows[2][4];
            CUTE_UNROLL
            for (int m = 0; m < 2; ++m) rows_operand.read(rows[m], rows_tile, m, k);
            CUTE_UNROLL
            for (int j = 0; j < kPairs; ++j) {
              const int pair = i * (4 / kOfSlot) + j;
              uint32_t columns[4];
              columns_operand.read(columns, columns_tile, pair, k);
              multiply_pair<Element>(arithmetic, acc, rows, columns, pair);
            }
          }
        }
        stage_ = stage_ + 1 == Tile::kStages ? 0 : stage_ + 1;
      }
    });
  }

  template <int kPairs>
  __device__ __forceinline__ void first_product(Stream& stream, const MonarchCursor& tile, int steps) {
    Acc acc;
    multiply<1, kPairs>(stream, acc, steps, nullptr, {0});
    CUTE_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      CUTE_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int column = tile.first + slot() * tile.width + pair * 16 + column_of(c);
        if (column >= tile.end) continue;
        const MonarchGroup::Place at = group_.place(tile.block, column);
        if (at.block >= group_.count) continue;
        if (p.is_inner_shared) {
          Element* const to = inner_ + (at.block * depth_tiles_ + at.depth / Tile::kDepth) * Tile::kTile;
          CUTE_UNROLL
          for (int r = 0; r < 4; ++r) {
            to[typename Tile::Shared::Layout{}(row_of(r), at.depth % Tile::kDepth)] = Element(sum_at(acc, r, pair, c));
          }
        } else {
          const int64_t inner_column = int64_t(group_.first + at.block) * p.problem.second.inputs + at.depth;
          CUTE_UNROLL
          for (int r = 0; r < 4; ++r) {
            if (row_of(r) >= num_rows_) continue;
            p.inner.row<Element>(first_row_ + row_of(r))[inner_column] = Element(sum_at(acc, r, pair, c));
          }
        }
      }
    }
  }

  // From shared memory to its rows in memory.
  __device__ void store_inner() const {
    const int inputs = int(p.problem.second.inputs), vectors = depth_tiles_ * (Tile::kDepth / Tile::kVector);
    for (int row = int(threadIdx.x) / kWarpSize; row < num_rows_; row += kThreads / kWarpSize) {
      Element* const to = p.inner.row<Element>(first_row_ + row) + int64_t(group_.first) * inputs;
      for (int i = lane_index(); i < group_.count * vectors; i += kWarpSize) {
        const int block = i / vectors, depth = (i - block * vectors) * Tile::kVector;
        const Element* const tile = inner_ + (block * depth_tiles_ + depth / Tile::kDepth) * Tile::kTile;
        store_vector(to + block * inputs + depth, tile + typename Tile::Shared::Layout{}(row, depth % Tile::kDepth),
                     inputs - depth, p.is_inner_aligned);
      }
    }
  }

  static __device__ void store_vector(Element* to, const Element* from, int count, bool is_aligned) {
    if (is_aligned && count >= Tile::kVector) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int i = 0; i < Tile::kVector && i < count; ++i) to[i] = from[i];
    }
  }

  template <int kPairs>
  __device__ __forceinline__ void second_product(Stream& stream, const MonarchCursor& tile) {
    int a_tiles[kBlocks];
    CUTE_UNROLL
    for (int i = 0; i < kBlocks; ++i) a_tiles[i] = min(slots_.block(slot(), i), group_.count - 1) * depth_tiles_;
    Acc acc;
    multiply<kBlocks, kPairs>(stream, acc, ceil_div(int(p.problem.second.inputs), Tile::kDepth),
                              p.is_inner_shared ? inner_ : nullptr, a_tiles);
    const int count = min(slots_.parts * tile.width, tile.end - tile.first);  // of outputs of each block
    for (int first = 0; first < Tile::kRows; first += Tile::kStagedRows) {
      if (first > 0) __syncthreads();  // all reads of the rows before are done
      if (Tile::kStagedRows == Tile::kRows || first_row_of_warp() == first) {
        CUTE_UNROLL
        for (int i = 0; i < kBlocks; ++i) {
          CUTE_UNROLL
          for (int j = 0; j < kPairs; ++j) stage_pair(acc, i * (4 / kBlocks) + j, i, j, tile, count, first);
        }
      }
      __syncthreads();
      store_outputs(tile, count, first);
    }
  }

  // Outputs of sixteen columns of a block, with the epilogue, on their way to memory.
  __device__ __forceinline__ void stage_pair(Acc& acc, int pair, int of_slot, int j, const MonarchCursor& tile,
                                             int count, int first) {
    const int block = slots_.block(slot(), of_slot), part = slots_.part(slot());
    if (block >= group_.count || part >= slots_.parts) return;
    const int blocks = int(p.problem.second.blocks);
    CUTE_UNROLL
    for (int c = 0; c < 4; ++c) {
      const int of_tile = part * tile.width + j * 16 + column_of(c);
      if (of_tile >= count) continue;
      const int column = (tile.first + of_tile) * blocks + group_.first + block;
      const float bias = p.bias ? p.bias[column] : 0.0f;
      Element* const to =
          staged_ + (p.is_interleaved ? of_tile * group_.count + block : block * slots_.parts * tile.width + of_tile);
      CUTE_UNROLL
      for (int r = 0; r < 4; ++r) {
        float x = sum_at(acc, r, pair, c) + bias;
        if (p.epilogue == MonarchEpilogue::kGelu) x = gelu(x);
        if (p.epilogue == MonarchEpilogue::kGradGelu) {
          const bool exists = row_of(r) < num_rows_;
          const float grad = exists ? float(p.grad_out.row<const Element>(first_row_ + row_of(r))[column]) : 0.0f;
          x = grad * gelu_derivative(x);
        }
        to[(row_of(r) - first) * Tile::kPitch] = Element(x);
      }
    }
  }

  // The staged rows, in runs of columns that lie beside each other in memory.
  __device__ void store_outputs(const MonarchCursor& tile, int count, int first) const {
    const int blocks = int(p.problem.second.blocks);
    const bool is_whole = p.is_interleaved && group_.count == blocks;
    const int runs = is_whole ? 1 : p.is_interleaved ? count : group_.count;
    const int length = is_whole ? count * blocks : p.is_interleaved ? group_.count : count;
    const int pitch = p.is_interleaved ? length : slots_.parts * tile.width;
    const int64_t stride = p.is_interleaved ? blocks : p.problem.second.outputs;
    const int64_t column = p.is_interleaved ? int64_t(tile.first) * blocks + group_.first
                                            : group_.first * p.problem.second.outputs + tile.first;
    Element* const out = p.out.row<Element>(first_row_) + column;
    const bool is_aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0 && p.out.row_stride % Tile::kVector == 0 &&
                            (runs == 1 || (stride % Tile::kVector == 0 && pitch % Tile::kVector == 0));
    const int vectors = ceil_div(length, Tile::kVector);
    for (int i = lane_index(); i < runs * vectors; i += kWarpSize) {
      const int run = i / vectors, at = (i - run * vectors) * Tile::kVector;
      for (int row = int(threadIdx.x) / kWarpSize; row < Tile::kStagedRows; row += kThreads / kWarpSize) {
        if (first + row >= num_rows_) break;
        store_vector(out + (first + row) * p.out.row_stride + run * stride + at,
                     staged_ + row * Tile::kPitch + run * pitch + at, length - at, is_aligned);
      }
    }
  }

  const MonarchCudaParams& p;
  const bool allow_tf32_;
  Element* const stages_;
  Element* const staged_;
  Element* const inner_;  // [blocks of the group, tiles of the depth] of Shared
  const MonarchGroup group_;
  const Slots slots_;
  const int64_t first_row_;
  const int num_rows_, depth_tiles_;
  int stage_ = 0;
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
  if (p.group <= 8) return launch<Element, 2>(p, allow_tf32, stream);
  return launch<Element, 4>(p, allow_tf32, stream);
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
