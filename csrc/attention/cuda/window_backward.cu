// The backward of attention in windows of at most 64 tokens on a GPU, for 16-bit elements.
//
// As window_forward.cu. The rows of logits are whole, so that delta is computed again from P and dP. A warp sums for its
// sixteen slots: dQ as queries, and once P and dS of all queries are in shared memory, dK and dV as keys. The gradients
// of the bias and the scale add up in registers over a block's windows.

#include "attention/cuda/tokens.h"
#include "attention/cuda/window_scale.h"

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
      typename Tile::Sums;
  enum Operand { kQuery, kKey, kValue, kGradOut, kGradQuery, kGradKey, kGradValue, kOperands };
  using Window = cuda::Window<kOperands>;
  using SharedLogits = SharedTile<Element, kSlots, kSlots>;  // (queries,keys)
  // dS times the scale instead of dQ and dK: 32 products less. Not in float16, whose small numbers have few bits.
  static constexpr bool kScalesEarly = std::is_same_v<Element, cutlass::bfloat16_t>;
  static constexpr int kStages = 2, kMinBlocks = 2;  // with three, heads of 32 spill
  static constexpr int kTensorBytes = SharedTokens::kElements * int(sizeof(Element));
  static constexpr int kLogitBytes = SharedLogits::kElements * int(sizeof(Element));
  static constexpr int kStageBytes = 4 * kTensorBytes, kTileBytes = kStages * kStageBytes + 2 * kLogitBytes;
  static constexpr int kSharedBytes = kTileBytes + Tile::template kTaskBytes<Window>;
  static_assert(kSlots * kSlots * int(sizeof(float)) <= kTileBytes, "the bias' gradient, at the end");

  static __device__ __forceinline__ void run(const WindowBackwardCudaParams& p, const WindowTasks& tasks,
                                             Element* shared) {
    const WindowCudaParams& f = p.forward;
    const int group = tasks.by_heads.divide(int(blockIdx.x)), head = int(blockIdx.x) - group * tasks.heads;
    const int begin = group * tasks.windows_of_block, count = min(tasks.num_windows - begin, tasks.windows_of_block);
    Window* const windows = reinterpret_cast<Window*>(reinterpret_cast<char*>(shared) + kTileBytes);
    Tile::prepare(f, tasks, windows, count, [&](Window& window, int i) {
      const int batch = window.find(f, tasks, begin + i, head);
      const TokenTensor* const tensors[] = {&f.query,      &f.key,      &f.value,     &p.grad_out,
                                            &p.grad_query, &p.grad_key, &p.grad_value};
      CUTE_UNROLL
      for (int t = 0; t < kOperands; ++t) window.rows[t] = tensors[t]->template at<char>(2 * batch, 0, 2 * head);
    });
    const Share share(f, tasks);
    const int head_dim = int(f.head_dim), value_dim = int(f.value_dim);
    const unsigned tiles = cast_smem_ptr_to_uint(shared);
    float next_lse[kRows] = {};
    const auto start = [&](int i, unsigned stage) {
      if (i < count) {
        const Window& window = windows[i];
        char* rows[kGradOut + 1];
        window.find_rows(rows);
        int tokens[kRows];
        window.find_tokens(f, share.slot, tokens);
        CUTE_UNROLL
        for (int t = kQuery; t <= kGradOut; ++t) {
          share.start(rows[t], tasks.row_bytes[t], tokens, t <= kKey ? head_dim : value_dim, stage + t * kTensorBytes);
        }
        read_statistics(f.lse, tasks, share, window.statistics, tokens, next_lse);
      }
      commit_copies();
    };
    start(0, tiles);

    const auto at = Tile::coordinates();  // (rows,columns)
    const WindowScale head_scale(f, head);
    const float scale = head_scale.size;
    const Logits bias = Tile::bias_of(f, Tile::slots_of(windows), head, at, scale);  // (MMA,MMA_M,MMA_N)
    unsigned differ[kMaxAxes];
    Tile::find_differing(Tile::slots_of(windows), at, differ);
    const unsigned shared_probs = tiles + kStages * kStageBytes, shared_grads = shared_probs + kLogitBytes;
    const unsigned first_pair =
        bytes_to<SharedLogits>(int(threadIdx.x) / kWarpSize * 16 + lane_index() / 4, lane_index() % 4 * 2);
    Logits grad_bias, zeros;  // (MMA,MMA_M,MMA_N)
    clear(grad_bias);
    clear(zeros);
    float dots = 0.0f;  // of this quad's queries and their gradients

    for (int i = 0; i < count; ++i) {
      const unsigned stage = tiles + i % kStages * kStageBytes;
      const unsigned queries = stage, keys = stage + kKey * kTensorBytes, values = stage + kValue * kTensorBytes;
      const unsigned grad_outs = stage + kGradOut * kTensorBytes;
      wait_for_copies<0>();
      RowFactors<Tile> of_queries, of_keys;
      if (f.changes_rows()) {
        of_queries.apply(share, queries, head_scale.sign, f.qk_norm);
        of_keys.apply(share, keys, 1.0f, f.qk_norm);
      }
      __syncthreads();  // this window has arrived, and all reads of the one before are done
      const float lse[kRows] = {next_lse[0], next_lse[1]};
      start(i + 1, tiles + (i + 1) % kStages * kStageBytes);
      const Window& window = windows[i];
      int tokens[kRows];
      window.find_tokens(f, share.slot, tokens);

      Logits probs, grads;                                            // (MMA,MMA_M,MMA_N)
      Tensor prob_rows = by_rows(probs), grad_rows = by_rows(grads);  // (rows,columns)
      Tile::multiply_rows(probs, bias, queries, keys);
      if (window.is_last) Tile::hide(prob_rows, differ, window.is_last);
      Tile::exponentiate_from(lse, prob_rows, scale);
      Tile::multiply_rows(grads, zeros, grad_outs, values);
      float grad_lse[kRows] = {};
      if (p.grad_lse) {
        rarely();
        read_statistics(p.grad_lse, tasks, share, window.statistics, tokens, grad_lse);
      }
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        float delta = 0.0f;
        CUTE_UNROLL
        for (int c = 0; c < size<1>(prob_rows); ++c) delta = fmaf(prob_rows(r, c), grad_rows(r, c), delta);
        delta = combine_quad(delta, [](float a, float b) { return a + b; });
        delta -= grad_lse[r];
        // Times the scale, as queries and keys want it, where rounding keeps small numbers.
        const float early = kScalesEarly ? scale : 1.0f;
        delta *= -early;
        CUTE_UNROLL
        for (int c = 0; c < size<1>(prob_rows); ++c) {
          grad_rows(r, c) = prob_rows(r, c) * fmaf(grad_rows(r, c), early, delta);
        }
      }
      CUTE_UNROLL
      for (int j = 0; j < size(grads); ++j) grad_bias(j) += grads(j);
      const auto rP = convert<Element>(probs), rS = convert<Element>(grads);  // (MMA,MMA_M,MMA_N)
      store_logits(rP, shared_probs + first_pair);
      store_logits(rS, shared_grads + first_pair);
      Sums grad_query = scaled(Tile::multiply_values(rS, keys), scale);  // (MMA,MMA_M,MMA_N)
      if (f.changes_rows()) dots += of_queries.differentiate(share, queries, grad_query, f.qk_norm);
      __syncthreads();  // P and dS are there, and all reads of keys and values are done

      share.store(grad_query, window.rows[kGradQuery], tasks.row_bytes[kGradQuery], tokens, head_dim, values);
      Sums grad_key = scaled(sum_over_queries(shared_grads, queries), scale);  // (MMA,MMA_M,MMA_N)
      if (f.changes_rows()) of_keys.differentiate(share, keys, grad_key, f.qk_norm);
      share.store(grad_key, window.rows[kGradKey], tasks.row_bytes[kGradKey], tokens, head_dim, keys);
      share.store(sum_over_queries(shared_probs, grad_outs), window.rows[kGradValue], tasks.row_bytes[kGradValue],
                  tokens, value_dim, values);
    }
    if (p.head_scale.data) {
      const float sum = sum_of_quads(dots, reinterpret_cast<float*>(shared));
      if (threadIdx.x == 0) p.head_scale.part(group)[head] = head_scale.sign * f.scale * sum / scale;
    }
    if (p.table.data) {
      store_table(grad_bias, f, kScalesEarly ? 1.0f / scale : 1.0f,
                  p.table.part(group) + head * num_table_entries(f.grid), reinterpret_cast<float*>(shared));
    }
  }

  // Zeros for slots without a token.
  static __device__ void read_statistics(const float* data, const WindowTasks& tasks, const Share& share, int64_t first,
                                         const int (&tokens)[kRows], float (&statistics)[kRows]) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (share.exists[r]) statistics[r] = data[first + int64_t(tokens[r]) * tasks.heads];
    }
  }

  // Of numbers that each quad has in common.
  static __device__ float sum_of_quads(float x, float* shared) {
    CUTE_UNROLL
    for (int distance = 4; distance < kWarpSize; distance *= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    __syncthreads();  // all reads of the last window are done
    if (lane_index() == 0) shared[threadIdx.x / kWarpSize] = x;
    __syncthreads();
    float sum = 0.0f;
    CUTE_UNROLL
    for (int warp = 0; warp < Tile::kWarps; ++warp) sum += shared[warp];
    return sum;
  }

  static __device__ Sums scaled(Sums sums, float factor) {
    CUTE_UNROLL
    for (int i = 0; i < size(sums); ++i) sums(i) *= kScalesEarly ? 1.0f : factor;
    return sums;
  }

  // Rounded logits (queries,keys) of the warp's rows. `first` is where the thread's first pair lies.
  template <class Rounded>
  static __device__ __forceinline__ void store_logits(const Rounded& rounded, unsigned first) {
    const Tensor pairs = recast<const uint32_t>(rounded);  // (MMA,MMA_M,MMA_N)
    CUTE_UNROLL
    for (int n = 0; n < size<2>(pairs); ++n) {
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        store_shared((first ^ unsigned(n * 16)) + unsigned(r * 8 * kRowBytes<SharedLogits>), pairs(r, 0, n));
      }
    }
  }

  // Of a warp's slots as keys: the product of the transposed logits' (queries,keys) with the tokens of the queries.
  static __device__ __forceinline__ Sums sum_over_queries(unsigned logits, unsigned queries) {
    const FragmentAddress<SharedLogits, MatrixOrder::kByColumns> a(0, int(threadIdx.x) / kWarpSize * 16);
    const FragmentAddress<SharedTokens, MatrixOrder::kByRows> b;
    return Tile::sum_of_products([&](auto& to, int k) { load_transposed_matrices(to, a(logits, k, 0)); },
                                 [&](auto& to, int j, int k) { load_transposed_matrices(to, b(queries, k, j)); });
  }

  // A thread owns some offsets between slots, and adds up the pairs of each.
  static __device__ void store_table(const Logits& grad_bias, const WindowCudaParams& f, float factor, float* table,
                                     float* shared) {
    Tensor sB = make_tensor(make_smem_ptr(shared), Layout<typename Tile::LogitShape, Stride<Int<kSlots>, _1>>{});
    __syncthreads();  // all reads before are done
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
      table[f.grid.entry({{z, y, x}}) + f.grid.center()] = sum * factor;
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
    const WindowCudaParams& f = p.forward;
    const WindowTasks tasks(f, {&f.query, &f.key, &f.value, &p.grad_out, &p.grad_query, &p.grad_key, &p.grad_value});
    return launch_tasks(window_attention_backward<Kernel>, p.forward.heads * window_parts(p.forward), Kernel::kThreads,
                        Kernel::kSharedBytes, stream, p, tasks);
  };
  return std::max(p.forward.head_dim, p.forward.value_dim) <= 32 ? launch(Int<32>{}) : launch(Int<64>{});
}

template cudaError_t WindowLaunches<DType::VK_DTYPE>::backward(const WindowBackwardCudaParams&, cudaStream_t);

}  // namespace vitkernels
