// Attention in windows of at most 64 tokens on a GPU, for 16-bit elements.
//
// A block keeps a head and its bias, in registers, and walks through windows, whose tokens it copies straight from the
// map while it multiplies the ones before.

#include "attention/cuda/tokens.h"
#include "attention/cuda/window_scale.h"

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
  static constexpr int kTensorBytes = SharedTokens::kElements * int(sizeof(Element));
  static constexpr int kStageBytes = 3 * kTensorBytes, kTileBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kTileBytes + Tile::template kTaskBytes<Window>;

  static __device__ __forceinline__ void run(const WindowCudaParams& p, const WindowTasks& tasks, Element* shared) {
    const int group = tasks.by_heads.divide(int(blockIdx.x)), head = int(blockIdx.x) - group * tasks.heads;
    const int begin = group * tasks.windows_of_block, count = min(tasks.num_windows - begin, tasks.windows_of_block);
    Window* const windows = reinterpret_cast<Window*>(reinterpret_cast<char*>(shared) + kTileBytes);
    Tile::prepare(p, tasks, windows, count, [&](Window& window, int i) {
      const int batch = window.find(p, tasks, begin + i, head), kv_head = head / int(p.heads / p.kv_heads);
      window.rows[kQuery] = p.query.at<char>(2 * batch, 0, 2 * head);
      window.rows[kKey] = p.key.at<char>(2 * batch, 0, 2 * kv_head);
      window.rows[kValue] = p.value.at<char>(2 * batch, 0, 2 * kv_head);
      window.rows[kOut] = p.out.at<char>(2 * batch, 0, 2 * head);
    });
    const Share share(p, tasks);
    const int head_dim = int(p.head_dim), value_dim = int(p.value_dim);
    const auto start = [&](int i, unsigned stage) {
      if (i < count) {
        const Window& window = windows[i];
        char* rows[kOperands];
        window.find_rows(rows);
        int tokens[kRows];
        window.find_tokens(p, share.slot, tokens);
        share.start(rows[kQuery], tasks.row_bytes[kQuery], tokens, head_dim, stage);
        share.start(rows[kKey], tasks.row_bytes[kKey], tokens, head_dim, stage + kTensorBytes);
        share.start(rows[kValue], tasks.row_bytes[kValue], tokens, value_dim, stage + 2 * kTensorBytes);
      }
      commit_copies();
    };
    const unsigned tiles = cast_smem_ptr_to_uint(shared);
    CUTE_UNROLL
    for (int i = 0; i < kStages - 1; ++i) start(i, tiles + i * kStageBytes);

    const auto at = Tile::coordinates();  // (rows,columns)
    const WindowScale scale(p, head);
    const Logits bias = Tile::bias_of(p, Tile::slots_of(windows), head, at, scale.size);  // (MMA,MMA_M,MMA_N)
    unsigned differ[kMaxAxes];
    Tile::find_differing(Tile::slots_of(windows), at, differ);

    unsigned stage = tiles, next = tiles + (kStages - 1) * kStageBytes;
    for (int i = 0; i < count; ++i) {
      wait_for_copies<kStages - 2>();
      if (p.changes_rows()) {
        RowFactors<Tile>().apply(share, stage, scale.sign, p.qk_norm);
        RowFactors<Tile>().apply(share, stage + kTensorBytes, 1.0f, p.qk_norm);
      }
      __syncthreads();  // this window has arrived, and all reads of the one before are done
      start(i + kStages - 1, next);
      Logits logits;                     // (MMA,MMA_M,MMA_N)
      Tensor numbers = by_rows(logits);  // (rows,columns)
      Tile::multiply_rows(logits, bias, stage, stage + kTensorBytes);
      const Window& window = windows[i];
      if (window.is_last) Tile::hide(numbers, differ, window.is_last);
      const Softmax softmax = Tile::exponentiate(numbers, scale.size);
      auto out = Tile::multiply_values(convert<Element>(logits), stage + 2 * kTensorBytes);  // (MMA,MMA_M,MMA_N)
      Tensor out_rows = by_rows(out);                                                        // (rows,columns)
      int tokens[kRows];
      window.find_tokens(p, share.slot, tokens);
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float factor = Softmax::factor_of(softmax.sum[r]);
        CUTE_UNROLL
        for (int c = 0; c < size<1>(out_rows); ++c) out_rows(r, c) *= factor;
        float* const lse = p.lse + window.statistics + int64_t(tokens[r]) * tasks.heads;
        if (share.exists[r] && share.column == 0) *lse = Softmax::lse_of(softmax.max[r], softmax.sum[r]);
      }
      // Only this warp has read its queries.
      share.store(out, window.rows[kOut], tasks.row_bytes[kOut], tokens, value_dim, stage);
      next = stage;
      stage = stage == tiles + (kStages - 1) * kStageBytes ? tiles : stage + kStageBytes;
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
    const WindowTasks tasks(p, {&p.query, &p.key, &p.value, &p.out});
    return launch_tasks(window_attention<Kernel>, p.heads * window_parts(p), Kernel::kThreads, Kernel::kSharedBytes,
                        stream, p, tasks);
  };
  return std::max(p.head_dim, p.value_dim) <= 32 ? launch(Int<32>{}) : launch(Int<64>{});
}

template cudaError_t WindowLaunches<DType::VK_DTYPE>::forward(const WindowCudaParams&, cudaStream_t);

}  // namespace vitkernels
