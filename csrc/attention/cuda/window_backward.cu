// The backward of attention in windows of at most 64 tokens on a GPU, for 16-bit elements.
//
// As window_forward.cu. The rows of logits are whole, so that softmax and delta are computed again from the operands
// alone. A warp sums for its sixteen slots: dQ as queries, and once P and dS of all queries are in shared memory, dK and
// dV as keys. The gradient of the bias adds up in registers over a block's windows.

#include "attention/cuda/tokens.h"
#include "attention/cuda/window_tile.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

template <class T, int kDim>
struct WindowBackwardKernel : WindowTile<T, kDim> {
  using Element = T;
  using Tile = WindowTile<T, kDim>;
  using Tile::kRows, Tile::kSlots, Tile::kThreads;
  using typename Tile::Logits, typename Tile::Mma, typename Tile::Share, typename Tile::SharedTokens,
      typename Tile::Softmax;
  enum Operand { kQuery, kKey, kValue, kGradOut, kGradQuery, kGradKey, kGradValue, kOperands };
  using Window = cuda::Window<kOperands>;
  using SharedLogits = SharedTile<Element, kSlots, kSlots>;  // (queries,keys)
  static constexpr int kStages = 2, kMinBlocks = kDim <= 32 ? 3 : 2;
  static constexpr int kStageElements = 4 * SharedTokens::kElements, kFirstLogits = kStages * kStageElements;
  static constexpr int kTileBytes = (kFirstLogits + 2 * SharedLogits::kElements) * int(sizeof(Element));
  static constexpr int kSharedBytes = kTileBytes + Tile::template kTaskBytes<Window>;
  static_assert(kSlots * kSlots * int(sizeof(float)) <= kTileBytes, "the bias' gradient, at the end");

  static __device__ __forceinline__ void run(const WindowBackwardCudaParams& p, const WindowTasks& tasks,
                                             Element* shared) {
    const WindowCudaParams& f = p.forward;
    const int group = tasks.by_heads.divide(int(blockIdx.x)), head = int(blockIdx.x) - group * tasks.heads;
    const int begin = group * tasks.windows_of_block, count = min(tasks.num_windows - begin, tasks.windows_of_block);
    Window* const windows = reinterpret_cast<Window*>(reinterpret_cast<char*>(shared) + kTileBytes);
    Tile::prepare(f, tasks, shared, kTileBytes, windows, count, [&](Window& window, int i) {
      const int batch = window.find(f, tasks, begin + i, head);
      const TokenTensor* const tensors[] = {&f.query,      &f.key,      &f.value,     &p.grad_out,
                                            &p.grad_query, &p.grad_key, &p.grad_value};
      CUTE_UNROLL
      for (int t = 0; t < kOperands; ++t) window.rows[t] = tensors[t]->template at<char>(2 * batch, 0, 2 * head);
    });
    const Share share(f, tasks, shared);
    const auto tokens_of = [&](const Window& window, int(&tokens)[kRows]) {
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) tokens[r] = window.token_of(f, share.slot[r]);
    };
    const auto start = [&](int i) {
      if (i < count) {
        Element* const stage = shared + i % kStages * kStageElements;
        const Window& window = windows[i];
        int tokens[kRows];
        tokens_of(window, tokens);
        share.start(window.rows[kQuery], f.query, tokens, f.head_dim, stage);
        share.start(window.rows[kKey], f.key, tokens, f.head_dim, stage + SharedTokens::kElements);
        share.start(window.rows[kValue], f.value, tokens, f.value_dim, stage + 2 * SharedTokens::kElements);
        share.start(window.rows[kGradOut], p.grad_out, tokens, f.value_dim, stage + 3 * SharedTokens::kElements);
      }
      commit_copies();
    };
    start(0);

    const Mma mma(false);
    const auto thread = mma.get_slice(threadIdx.x);
    const auto at = Tile::coordinates();  // (rows,columns)
    const float scale = f.scale;
    const Logits bias = Tile::bias_of(f, Tile::slots_of(windows), head, at, scale);  // (MMA,MMA_M,MMA_N)
    unsigned differ[kMaxAxes];
    Tile::find_differing(Tile::slots_of(windows), at, differ);
    Tensor sP = shared_tile<SharedLogits>(shared + kFirstLogits);                            // (queries,keys)
    Tensor sS = shared_tile<SharedLogits>(shared + kFirstLogits + SharedLogits::kElements);  // (queries,keys)
    Logits grad_bias;                                                                        // (MMA,MMA_M,MMA_N)
    clear(grad_bias);

    for (int i = 0; i < count; ++i) {
      wait_for_copies<0>();
      __syncthreads();  // this window has arrived, and all reads of the one before are done
      start(i + 1);
      Element* const stage = shared + i % kStages * kStageElements;
      Element* const keys = stage + SharedTokens::kElements;
      Element* const values = stage + 2 * SharedTokens::kElements;
      Tensor sQ = shared_tile<SharedTokens>(stage);                                // (slots,dim)
      Tensor sK = shared_tile<SharedTokens>(keys);                                 // (slots,dim)
      Tensor sV = shared_tile<SharedTokens>(values);                               // (slots,dim)
      Tensor sD = shared_tile<SharedTokens>(stage + 3 * SharedTokens::kElements);  // (slots,dim)
      const Window& window = windows[i];
      int tokens[kRows];
      tokens_of(window, tokens);

      Logits probs, grads;                                            // (MMA,MMA_M,MMA_N)
      Tensor prob_rows = by_rows(probs), grad_rows = by_rows(grads);  // (rows,columns)
      multiply_whole_tile(mma, probs, bias, sQ, sK);
      if (window.is_last) Tile::hide(prob_rows, differ, window.is_last);
      const Softmax softmax = Tile::exponentiate(prob_rows, scale);
      clear(grads);
      multiply_whole_tile(mma, grads, sD, sV);
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float factor = Softmax::factor_of(softmax.sum[r]);
        float delta = 0.0f;
        CUTE_UNROLL
        for (int c = 0; c < size<1>(prob_rows); ++c) {
          prob_rows(r, c) *= factor;
          delta = fmaf(prob_rows(r, c), grad_rows(r, c), delta);
        }
        delta = combine_quad(delta, [](float a, float b) { return a + b; });
        if (p.grad_lse && share.exists[r]) delta -= p.grad_lse[window.statistics + int64_t(tokens[r]) * tasks.heads];
        CUTE_UNROLL
        for (int c = 0; c < size<1>(prob_rows); ++c) grad_rows(r, c) = prob_rows(r, c) * (grad_rows(r, c) - delta);
      }
      CUTE_UNROLL
      for (int j = 0; j < size(grads); ++j) grad_bias(j) += grads(j);
      const auto rP = convert<Element>(probs), rS = convert<Element>(grads);  // (MMA,MMA_M,MMA_N)
      cute::copy(AutoVectorizingCopy{}, rP, thread.partition_C(sP));
      cute::copy(AutoVectorizingCopy{}, rS, thread.partition_C(sS));
      Tensor grad_query = partition_fragment_C(mma, Shape<Int<kSlots>, Int<kDim>>{});  // (MMA,MMA_M,MMA_N)
      clear(grad_query);
      multiply_whole_operand<StepOrder::kByColumns>(mma, grad_query, as_operand_a(rS), sK);
      __syncthreads();  // P and dS are there, and all reads of keys and values are done

      share.store(scaled(grad_query, scale), window.rows[kGradQuery], p.grad_query, tokens, f.head_dim, keys);
      share.store(scaled(sum_over_queries(sS, sQ), scale), window.rows[kGradKey], p.grad_key, tokens, f.head_dim, keys);
      share.store(sum_over_queries(sP, sD), window.rows[kGradValue], p.grad_value, tokens, f.value_dim, values);
    }
    if (p.table.data) {
      store_table(p, tasks, grad_bias, p.table.part(group) + head * num_entries(f), reinterpret_cast<float*>(shared));
    }
  }

  static __device__ int num_entries(const WindowCudaParams& f) {
    return f.grid.num_offsets(0) * f.grid.num_offsets(1) * f.grid.num_offsets(2);
  }

  template <class Acc>
  static __device__ Acc& scaled(Acc& acc, float factor) {
    CUTE_UNROLL
    for (int i = 0; i < size(acc); ++i) acc(i) *= factor;
    return acc;
  }
  template <class Acc>
  static __device__ Acc scaled(Acc&& acc, float factor) {
    return scaled(acc, factor);
  }

  // Of a warp's slots as keys: the product of the transposed logits' (queries,keys) with the tokens of the queries.
  template <class Logits, class Tokens>
  static __device__ __forceinline__ auto sum_over_queries(const Logits& sL, const Tokens& sT) {
    const TileMma<Element, 1> mma(false);
    Tensor sum = partition_fragment_C(mma, Shape<_16, Int<kDim>>{});  // (MMA,MMA_M,MMA_N)
    clear(sum);
    const int warp = int(threadIdx.x) / kWarpSize;
    multiply_transposed(mma, lane_index(), sum,
                        local_tile(transposed(sL), Shape<_16, Int<kSlots>>{}, make_coord(warp, 0)), transposed(sT),
                        kSlots);
    return sum;
  }

  // A thread owns some offsets between slots, and adds up the pairs of each.
  static __device__ void store_table(const WindowBackwardCudaParams& p, const WindowTasks& tasks,
                                     const Logits& grad_bias, float* table, float* shared) {
    const WindowCudaParams& f = p.forward;
    Tensor sB = make_tensor(make_smem_ptr(shared), Layout<typename Tile::LogitShape, Stride<Int<kSlots>, _1>>{});
    __syncthreads();  // all reads of the last window are done
    cute::copy(grad_bias, Mma(false).get_slice(threadIdx.x).partition_C(sB));
    __syncthreads();
    const int depth = f.axis[0].size, height = f.axis[1].size, width = f.axis[2].size;
    for (int i = threadIdx.x; i < (2 * depth - 1) * (2 * height - 1) * (2 * width - 1); i += kThreads) {
      const int line = i / (2 * width - 1), plane = line / (2 * height - 1);
      const int x = i - line * (2 * width - 1) - (width - 1), y = line - plane * (2 * height - 1) - (height - 1);
      const int z = plane - (depth - 1);  // of the query from the key
      float sum = 0.0f;
      for (int qz = max(0, z); qz < depth + min(0, z); ++qz) {
        for (int qy = max(0, y); qy < height + min(0, y); ++qy) {
          for (int qx = max(0, x); qx < width + min(0, x); ++qx) {
            const int query = (qz * height + qy) * width + qx;
            sum += shared[query * kSlots + query - ((z * height + y) * width + x)];
          }
        }
      }
      table[f.grid.entry({{z, y, x}}) + f.grid.center()] = sum;
    }
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    window_attention_backward(const __grid_constant__ WindowBackwardCudaParams p,
                              const __grid_constant__ WindowTasks tasks) {
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel::run(p, tasks, reinterpret_cast<typename Kernel::Element*>(shared));
}

}  // namespace

template <DType kDType>
cudaError_t WindowLaunches<kDType>::backward(const WindowBackwardCudaParams& p, cudaStream_t stream) {
  const auto launch = [&]<int kDim>(Int<kDim>) {
    using Kernel = WindowBackwardKernel<ElementOf<kDType>, kDim>;
    const WindowTasks tasks(p.forward);
    return launch_tasks(window_attention_backward<Kernel>, p.forward.heads * window_parts(p.forward), Kernel::kThreads,
                        Kernel::kSharedBytes, stream, p, tasks);
  };
  return std::max(p.forward.head_dim, p.forward.value_dim) <= 32 ? launch(Int<32>{}) : launch(Int<64>{});
}

template cudaError_t WindowLaunches<DType::VK_DTYPE>::backward(const WindowBackwardCudaParams&, cudaStream_t);

}  // namespace vitkernels
