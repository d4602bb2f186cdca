// Forward of softmax attention over a map with any pattern on a GPU, accumulated in float32.
//
// A block takes a tile of queries of one head, sixteen a warp, and walks through the box of their keys. Tokens come
// straight from the map: a thread finds a row of the tile after the next, whose copy overlaps the products of this one.

#include "attention/cuda/spatial_score.h"
#include "attention/cuda/spatial_store.h"
#include "cuda/fragments.h"
#include "cuda/mma.h"
#include "cuda/online_softmax.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

template <class T, int kDim>
struct SpatialForwardKernel {
  using Element = T;
  static constexpr SpatialTile kTile = spatial_tile(kDim, sizeof(Element));
  static constexpr int kQueries = kTile.owned, kKeys = kTile.streamed;
  static constexpr int kWarps = kQueries / 16, kThreads = kWarps * kWarpSize, kStages = 2;
  static constexpr int kMinBlocks = kDim <= 64 ? 2 : 1;  // of a multiprocessor, which bounds the registers
  using SharedQueries = SharedTile<Element, kQueries, kDim>;
  using SharedKeys = SharedTile<Element, kKeys, kDim>;
  using Mma = TileMma<Element, kWarps, std::min(16, kKeys)>;
  using Queries = QueryRows<kQueries>;
  using Keys = KeyRows<kKeys>;

  // Of a tile of keys, rows are found two steps and copied one step before they are read.
  struct Shared {
    Element queries[SharedQueries::kElements];
    Element keys[kStages][SharedKeys::kElements], values[kStages][SharedKeys::kElements];
    Keys key_rows[kStages + 1];
    Queries query_rows;
    BoxOfTask boxes[kMaxAxes];
  };
  static constexpr int kSharedBytes = int(sizeof(Shared));

  static __device__ __forceinline__ void run(const SpatialCudaParams& p, Shared& shared) {
    const SpatialCut& cut = p.cut;
    const SpatialTask task(cut, p.heads, blockIdx.x);
    const int64_t own_kv_head = p.kv_head(task.head), kv_head = own_kv_head < 0 ? 0 : own_kv_head;
    const auto& boxes = shared.boxes;
    find_boxes(p, cut, task, shared.boxes);
    const auto find_keys = [&](int tile) {
      if (threadIdx.x >= kKeys) return;
      find_key<Rows::kStreamed>(p, cut, boxes, task.batch, task.head, tile * kKeys + int(threadIdx.x), int(threadIdx.x),
                                shared.key_rows[tile % (kStages + 1)]);
    };
    bool sees_all = true;
    if (threadIdx.x < kQueries) {
      sees_all = find_query<Rows::kOwned>(p, cut, boxes, int(threadIdx.x), int(threadIdx.x), shared.query_rows);
    }
    find_keys(0);
    sees_all = __syncthreads_and(sees_all);

    const int dim = int(p.head_dim), value_dim = int(p.value_dim);
    const Element* const key = p.key.at<const Element>(task.batch, Coord{}, kv_head);
    const Element* const value = p.value.at<const Element>(task.batch, Coord{}, kv_head);
    const Element* const key_fill = p.key_fill ? static_cast<const Element*>(p.key_fill) + kv_head * dim : nullptr;
    const Element* const value_fill =
        p.value_fill ? static_cast<const Element*>(p.value_fill) + kv_head * value_dim : nullptr;
    const auto start = [&](int tile) {
      const Keys& rows = shared.key_rows[tile % (kStages + 1)];
      Tensor sK = shared_tile<SharedKeys>(shared.keys[tile % kStages]);    // (keys,dim)
      Tensor sV = shared_tile<SharedKeys>(shared.values[tile % kStages]);  // (keys,dim)
      start_rows<kThreads>(sK, key, rows.key, key_fill, dim, p.is_aligned);
      start_rows<kThreads>(sV, value, rows.value, value_fill, value_dim, p.is_aligned);
      commit_copies();
    };
    Tensor sQ = shared_tile<SharedQueries>(shared.queries);  // (queries,dim)
    const int inner = cut.axis[1].streamed * cut.axis[2].streamed;
    const int count = own_kv_head < 0 ? 0 : boxes[0].keys * inner, tiles = cuda::ceil_div(count, kKeys);
    // Rows of a smaller box have gaps.
    sees_all = sees_all && boxes[1].keys == cut.axis[1].streamed && boxes[2].keys == cut.axis[2].streamed;
    if (tiles > 0) {
      start_rows<kThreads>(sQ, p.query.at<const Element>(task.batch, Coord{}, task.head), shared.query_rows.query,
                           static_cast<const Element*>(nullptr), dim, p.is_aligned);
      start(0);
    }
    if (tiles > 1) find_keys(1);

    const Mma mma(p.allow_tf32);
    const auto thread = mma.get_slice(threadIdx.x);
    Tensor out = partition_fragment_C(mma, Shape<Int<kQueries>, Int<kDim>>{});  // (MMA,MMA_M,MMA_N)
    Tensor at =
        by_rows(thread.partition_C(make_identity_tensor(Shape<Int<kQueries>, Int<kKeys>>{})));  // (rows,columns)
    Tensor out_rows = by_rows(out);                                                             // (rows,columns)
    OnlineSoftmax<decltype(size<0>(out_rows))::value> softmax;
    clear(out);
    for (int tile = 0; tile < tiles; ++tile) {
      wait_for_copies<0>();
      __syncthreads();  // this tile has arrived, the rows of the next are known, and all reads of the last are done
      if (tile + 1 < tiles) start(tile + 1);
      if (tile + 2 < tiles) find_keys(tile + 2);
      Tensor sK = shared_tile<SharedKeys>(shared.keys[tile % kStages]);               // (keys,dim)
      Tensor sV = shared_tile<SharedKeys>(shared.values[tile % kStages]);             // (keys,dim)
      Tensor logits = partition_fragment_C(mma, Shape<Int<kQueries>, Int<kKeys>>{});  // (MMA,MMA_M,MMA_N)
      Tensor logit_rows = by_rows(logits);                                            // (rows,columns)
      clear(logits);
      multiply_tile(mma, logits, sQ, sK, dim);
      const SpatialScore<kQueries, kKeys> score(p, cut, shared.query_rows, shared.key_rows[tile % (kStages + 1)],
                                                task.batch, task.head);
      score.apply(logit_rows, at, sees_all && (tile + 1) * kKeys <= count);
      softmax.exponentiate(logit_rows, [&](int r, float factor) {
        CUTE_UNROLL
        for (int c = 0; c < size<1>(out_rows); ++c) out_rows(r, c) *= factor;
      });
      multiply_operand(mma, out, as_operand_a(convert<Element>(logits)), sV, value_dim);
    }
    softmax.total();
    store_map<kThreads>(p, task, shared.query_rows.token, mma, out, softmax, sQ);
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    spatial_attention(const __grid_constant__ SpatialCudaParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel::run(p, *reinterpret_cast<typename Kernel::Shared*>(shared));
}

}  // namespace

template <DType kDType>
cudaError_t SpatialLaunches<kDType>::forward(const SpatialCudaParams& p, cudaStream_t stream) {
  return dispatch_spatial_dim(p.head_dim, p.value_dim, [&]<int kDim>(std::integral_constant<int, kDim>) {
    using Kernel = SpatialForwardKernel<ElementOf<kDType>, kDim>;
    return launch_tasks(spatial_attention<Kernel>, p.batch * p.heads * p.cut.num_tiles(), Kernel::kThreads,
                        Kernel::kSharedBytes, stream, p);
  });
}

template cudaError_t SpatialLaunches<DType::VK_DTYPE>::forward(const SpatialCudaParams&, cudaStream_t);

}  // namespace vitkernels
