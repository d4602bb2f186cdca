// Attention in windows of at most 64 tokens on a GPU, for 16-bit elements.
//
// A block keeps a head and its bias, in registers, and walks through windows, whose tokens it copies straight from the
// map while it multiplies the ones before.

#include "attention/cuda/tokens.h"
#include "attention/cuda/window_tile.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

template <class T, int kDim>
struct WindowForwardKernel : WindowTile<T, kDim> {
  using Element = T;
  using Tile = WindowTile<T, kDim>;
  using Tile::kRows, Tile::kSlots;
  using typename Tile::Logits, typename Tile::Mma, typename Tile::Share, typename Tile::SharedTokens,
      typename Tile::Softmax;
  enum Operand { kQuery, kKey, kValue, kOut, kOperands };
  using Window = cuda::Window<kOperands>;
  static constexpr int kStages = 3, kMinBlocks = kDim <= 32 ? 4 : 2;
  static constexpr int kStageElements = 3 * SharedTokens::kElements;
  static constexpr int kTileBytes = kStages * kStageElements * int(sizeof(Element));
  static constexpr int kSharedBytes = kTileBytes + Tile::template kTaskBytes<Window>;

  static __device__ __forceinline__ void run(const WindowCudaParams& p, const WindowTasks& tasks, Element* shared) {
    const int group = tasks.by_heads.divide(int(blockIdx.x)), head = int(blockIdx.x) - group * tasks.heads;
    const int begin = group * tasks.windows_of_block, count = min(tasks.num_windows - begin, tasks.windows_of_block);
    Window* const windows = reinterpret_cast<Window*>(reinterpret_cast<char*>(shared) + kTileBytes);
    Tile::prepare(p, tasks, shared, kTileBytes, windows, count, [&](Window& window, int i) {
      const int batch = window.find(p, tasks, begin + i, head), kv_head = head / int(p.heads / p.kv_heads);
      window.rows[kQuery] = p.query.at<char>(2 * batch, 0, 2 * head);
      window.rows[kKey] = p.key.at<char>(2 * batch, 0, 2 * kv_head);
      window.rows[kValue] = p.value.at<char>(2 * batch, 0, 2 * kv_head);
      window.rows[kOut] = p.out.at<char>(2 * batch, 0, 2 * head);
    });
    const Share share(p, tasks, shared);
    const auto tokens_of = [&](const Window& window, int(&tokens)[kRows]) {
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) tokens[r] = window.token_of(p, share.slot[r]);
    };
    const auto start = [&](int i, Element* stage) {
      if (i < count) {
        const Window& window = windows[i];
        int tokens[kRows];
        tokens_of(window, tokens);
        share.start(window.rows[kQuery], p.query, tokens, p.head_dim, stage);
        share.start(window.rows[kKey], p.key, tokens, p.head_dim, stage + SharedTokens::kElements);
        share.start(window.rows[kValue], p.value, tokens, p.value_dim, stage + 2 * SharedTokens::kElements);
      }
      commit_copies();
    };
    CUTE_UNROLL
    for (int i = 0; i < kStages - 1; ++i) start(i, shared + i * kStageElements);

    const Mma mma(false);
    const auto at = Tile::coordinates();  // (rows,columns)
    const float scale = p.scale;
    const Logits bias = Tile::bias_of(p, Tile::slots_of(windows), head, at, scale);  // (MMA,MMA_M,MMA_N)
    unsigned differ[kMaxAxes];
    Tile::find_differing(Tile::slots_of(windows), at, differ);

    int stage_index = 0;
    for (int i = 0; i < count; ++i) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // this window has arrived, and all reads of the one before are done
      Element* const stage = shared + stage_index * kStageElements;
      start(i + kStages - 1, stage_index == 0 ? stage + (kStages - 1) * kStageElements : stage - kStageElements);
      stage_index = stage_index == kStages - 1 ? 0 : stage_index + 1;
      Tensor sQ = shared_tile<SharedTokens>(stage);                                // (slots,dim)
      Tensor sK = shared_tile<SharedTokens>(stage + SharedTokens::kElements);      // (slots,dim)
      Tensor sV = shared_tile<SharedTokens>(stage + 2 * SharedTokens::kElements);  // (slots,dim)
      Logits logits;                                                               // (MMA,MMA_M,MMA_N)
      Tensor numbers = by_rows(logits);                                            // (rows,columns)
      multiply_whole_tile(mma, logits, bias, sQ, sK);
      const Window& window = windows[i];
      if (window.is_last) Tile::hide(numbers, differ, window.is_last);
      const Softmax softmax = Tile::exponentiate(numbers, scale);
      Tensor out = partition_fragment_C(mma, Shape<Int<kSlots>, Int<kDim>>{});  // (MMA,MMA_M,MMA_N)
      clear(out);
      multiply_whole_operand<StepOrder::kByColumns>(mma, out, as_operand_a(convert<Element>(logits)), sV);
      Tensor out_rows = by_rows(out);  // (rows,columns)
      int tokens[kRows];
      tokens_of(window, tokens);
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float factor = Softmax::factor_of(softmax.sum[r]);
        CUTE_UNROLL
        for (int c = 0; c < size<1>(out_rows); ++c) out_rows(r, c) *= factor;
        float* const lse = p.lse + window.statistics + int64_t(tokens[r]) * tasks.heads;
        if (share.exists[r] && share.column == 0) *lse = Softmax::lse_of(softmax.max[r], softmax.sum[r]);
      }
      // Only this warp has read its queries.
      share.store(out, window.rows[kOut], p.out, tokens, p.value_dim, stage);
    }
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    window_attention(const __grid_constant__ WindowCudaParams p, const __grid_constant__ WindowTasks tasks) {
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel::run(p, tasks, reinterpret_cast<typename Kernel::Element*>(shared));
}

}  // namespace

template <DType kDType>
cudaError_t WindowLaunches<kDType>::forward(const WindowCudaParams& p, cudaStream_t stream) {
  const auto launch = [&]<int kDim>(Int<kDim>) {
    using Kernel = WindowForwardKernel<ElementOf<kDType>, kDim>;
    const WindowTasks tasks(p);
    return launch_tasks(window_attention<Kernel>, p.heads * window_parts(p), Kernel::kThreads, Kernel::kSharedBytes,
                        stream, p, tasks);
  };
  return std::max(p.head_dim, p.value_dim) <= 32 ? launch(Int<32>{}) : launch(Int<64>{});
}

template cudaError_t WindowLaunches<DType::VK_DTYPE>::forward(const WindowCudaParams&, cudaStream_t);

}  // namespace vitkernels
