// The forward's fast path over maps, for 16-bit elements whose score has a scale and at most a bias table
// (spatial_path.h).
//
// As forward_plain.cu: 32 queries a warp and straight-line code. The pattern is added to the products of a tile by
// matrix instructions (pattern_mask.h). A warp skips tiles of keys that none of its queries sees.

#include "attention/cuda/box_stream.h"
#include "attention/cuda/pattern_mask.h"
#include "attention/cuda/spatial_path.h"
#include "attention/cuda/spatial_store.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

template <class T, int kDim>
struct SpatialPlainForwardKernel {
  using Element = T;
  static constexpr SpatialTile kTile = spatial_plain_tile(kDim);
  static constexpr int kQueries = kTile.owned, kKeys = kTile.streamed;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize, kMinBlocks = 2;
  static constexpr bool kHoldsQueries = kDim <= 32;  // in registers; else they are read for each tile of keys
  static_assert(kQueries == kThreads && kKeys * 2 <= kThreads, "a thread finds a query, two a key");
  using SharedQueries = SharedTile<Element, kQueries, kDim>;
  using SharedKeys = SharedTile<Element, kKeys, kDim>;
  using Mma = TileMma<Element, kWarps>;
  using Mask = PatternMask<kQueries, kKeys, kWarps>;

  enum Tensor { kKey, kValue };

  struct Shared {
    Element queries[SharedQueries::kElements];
    Element rows[2][SharedKeys::kElements];  // keys, values
    typename Mask::Shared mask;
    int offset[2][2][kKeys];  // of two tiles: of keys, values
    BoxWalk walk[2];          // of keys, values
    int query_token[kQueries], query_offset[kQueries];
    int2 seen[kQueries];  // from the first key in the box that a query sees to the last one
    float table[kMaxSpatialTable];
    int query_entry[kQueries], key_entry[2][kKeys];  // in bytes; a pair's entry is their difference
    BoxOfTask boxes[kMaxAxes];
  };
  static constexpr int kSharedBytes = int(sizeof(Shared));

  // Neighbouring queries belong to a warp, which has sixteen of each half of the rows.
  static __device__ int query_of_row(int row) {
    return (row % (kQueries / 2) / 16 * 2 + row / (kQueries / 2)) * 16 + row % 16;
  }

  static __device__ __forceinline__ void run(const SpatialCudaParams& p, Shared& shared) {
    const SpatialCut& cut = p.cut;
    const SpatialTask task(cut, p.heads, blockIdx.x);
    const int64_t own_kv_head = p.kv_head(task.head), kv_head = own_kv_head < 0 ? 0 : own_kv_head;
    const auto& boxes = shared.boxes;
    find_boxes(p, cut, task, shared.boxes);
    const int count = own_kv_head < 0 ? 0 : boxes[0].keys * boxes[1].keys * boxes[2].keys;
    const int tiles = cuda::ceil_div(count, kKeys);
    const Mask mask{shared.mask, cut.mask};

    const bool sees_all = __syncthreads_and(find_query(p, cut, mask, shared));
    mask.set_table([&](int axis, int coordinate) { return seen_on_axis(cut, boxes[axis], axis, coordinate); });
    const int which = int(threadIdx.x) % 2, row = int(threadIdx.x) / 2;
    const MapTensor& walked = which == kKey ? p.key : p.value;
    const int stride[kMaxAxes] = {stride_of(cut, walked, 0), stride_of(cut, walked, 1), stride_of(cut, walked, 2)};
    if (row == 0) shared.walk[which] = BoxWalk(boxes, stride, kKeys);
    BoxCursor cursor(boxes, stride, first_offset(walked, boxes), row);
    const auto find_keys = [&](int tile) {
      if (kKeys * 2 < kThreads && row >= kKeys) return;
      const bool exists = tile * kKeys + row < count, is_on_map = !p.has_outside || cursor.is_on_map(boxes);
      shared.offset[tile % 2][which][row] = exists && is_on_map ? cursor.offset : -1;
      if (which == 0) {
        shared.key_entry[tile % 2][row] =
            p.score.by_offset.small.entry({{cursor.at[0], cursor.at[1], cursor.at[2]}}) * int(sizeof(float));
      }
      mask.set_streamed(tile % 2, row, which, cursor.at, exists);
      cursor.advance(shared.walk[which]);
    };
    __syncthreads();  // the walks are known
    find_keys(0);
    const int2 seen = seen_by_warp(shared);
    read_table(p, task.head, shared);

    const int dim = int(p.head_dim), value_dim = int(p.value_dim);
    const Element* const key = p.key.at<const Element>(task.batch, Coord{}, kv_head);
    const Element* const value = p.value.at<const Element>(task.batch, Coord{}, kv_head);
    auto sQ = shared_tile<SharedQueries>(shared.queries);    // (queries,dim)
    auto sK = shared_tile<SharedKeys>(shared.rows[kKey]);    // (keys,dim)
    auto sV = shared_tile<SharedKeys>(shared.rows[kValue]);  // (keys,dim)
    __syncthreads();                                         // the first keys are known
    start_vectors<kThreads>(sQ, p.query.at<const Element>(task.batch, Coord{}, task.head), shared.query_offset, dim);
    start_vectors<kThreads>(sK, key, shared.offset[0][kKey], dim);
    commit_copies();

    wait_for_copies<0>();
    __syncthreads();
    const Mma mma(false);
    const auto rQ = read_operand_a(mma, sQ);                                  // (MMA,MMA_M,MMA_K), unused unless held
    auto out = partition_fragment_C(mma, Shape<Int<kQueries>, Int<kDim>>{});  // (MMA,MMA_M,MMA_N)
    auto out_rows = by_rows(out);                                             // (rows,columns)
    clear(out);
    const auto walk = [&]<bool kHasTable>(std::bool_constant<kHasTable>) __attribute__((always_inline)) {
      const float scale = p.score.scale.template as<float>();
      MaskedOnlineSoftmax<decltype(size<0>(out_rows))::value> softmax((kHasTable ? 1.0f : scale) * kLog2e);
      for (int tile = 0; tile < tiles; ++tile) {
        wait_for_copies<0>();
        __syncthreads();  // the keys have arrived, and all reads of the previous values are done
        start_vectors<kThreads>(sV, value, shared.offset[tile % 2][kValue], value_dim);
        commit_copies();
        find_keys(tile + 1);
        const auto start_next_keys = [&] {
          wait_for_copies<0>();
          __syncthreads();  // the values have arrived, the next keys are known, and all reads of the keys are done
          start_vectors<kThreads>(sK, key, shared.offset[(tile + 1) % 2][kKey], dim);
          commit_copies();
        };
        if (tile * kKeys > seen.y || (tile + 1) * kKeys <= seen.x) {  // for all queries of the warp
          start_next_keys();
          continue;
        }
        auto logits = partition_fragment_C(mma, Shape<Int<kQueries>, Int<kKeys>>{});  // (MMA,MMA_M,MMA_N)
        auto logit_rows = by_rows(logits);                                            // (rows,columns)
        clear(logits);
        if constexpr (kHoldsQueries) {
          multiply_held_tile(mma, logits, rQ, sK);
        } else {
          multiply_whole_tile(mma, logits, sQ, sK);
        }
        if constexpr (kHasTable) {
          add_table(shared, mma, logit_rows, scale, tile % 2, num_table_entries(p.score.by_offset.small));
        }
        if (!sees_all || (tile + 1) * kKeys > count) mask.add(logits, tile % 2);
        start_next_keys();
        softmax.exponentiate(logit_rows, [&](int r, float factor) {
          CUTE_UNROLL
          for (int c = 0; c < size<1>(out_rows); ++c) out_rows(r, c) *= factor;
        });
        multiply_whole_operand<StepOrder::kByColumns>(mma, out, as_operand_a(convert<Element>(logits)), sV);
      }
      wait_for_copies<0>();
      softmax.total(kHasTable ? 1.0f : scale);
      store_map<kThreads>(p, SpatialTask(cut, p.heads, block_index()), shared.query_token, mma, out, softmax, sQ);
    };
    p.score.by_offset.bias.data ? walk(std::true_type{}) : walk(std::false_type{});
  }

  // Products times `scale`, and entries of the table. Pairs that the pattern hides may have none: they read another's.
  template <class Logits>
  static __device__ __forceinline__ void add_table(const Shared& shared, const Mma& mma, Logits& logits, float scale,
                                                   int buffer, int entries) {
    const char* const table = reinterpret_cast<const char*>(shared.table);
    const unsigned last = unsigned(entries - 1) * unsigned(sizeof(float));
    const auto at =
        by_rows(mma.get_slice(threadIdx.x)
                    .partition_C(make_identity_tensor(Shape<Int<kQueries>, Int<kKeys>>{})));  // (rows,columns)
    int of_query[decltype(size<0>(logits))::value];
    CUTE_UNROLL
    for (int r = 0; r < size<0>(logits); ++r) of_query[r] = shared.query_entry[get<0>(at(r, 0))];
    CUTE_UNROLL
    for (int c = 0; c < size<1>(logits); ++c) {
      const int of_key = shared.key_entry[buffer][get<1>(at(0, c))];
      CUTE_UNROLL
      for (int r = 0; r < size<0>(logits); ++r) {
        const unsigned entry = min(unsigned(of_query[r] - of_key), last);
        logits(r, c) = fmaf(logits(r, c), scale, *reinterpret_cast<const float*>(table + entry));
      }
    }
  }

  // Of a tensor, between neighbouring tokens of a class.
  static __device__ int stride_of(const SpatialCut& cut, const MapTensor& t, int axis) {
    return int(t.axis_stride[axis] / kVector) * int(cut.axis[axis].rule.step);
  }
  // Of the first key in the box, on the map or not.
  static __device__ int first_offset(const MapTensor& t, const BoxOfTask (&boxes)[kMaxAxes]) {
    const int token[kMaxAxes] = {boxes[0].token(boxes[0].first_key), boxes[1].token(boxes[1].first_key),
                                 boxes[2].token(boxes[2].first_key)};
    return int(offset_of(t, token) / kVector);
  }

  // What a mask could not be told from, or could not hide, is taken for less; -inf hides a key.
  static __device__ void read_table(const SpatialCudaParams& p, int64_t head, Shared& shared) {
    const OffsetTerms& terms = p.score.by_offset;
    if (!terms.bias.data) return;
    const float* const table = static_cast<const float*>(terms.bias.data) + head * terms.bias.head_stride;
    for (int i = int(threadIdx.x); i < num_table_entries(terms.small); i += kThreads) {
      const float x = table[i];
      const bool is_finite = fabsf(x) <= std::numeric_limits<float>::max();
      shared.table[i] = is_finite ? fminf(fmaxf(x, kNothing / 2), -kNothing / 2) : x;
    }
  }

  // The keys in the box that a query of the tile sees.
  static __device__ int2 seen_on_axis(const SpatialCut& cut, const BoxOfTask& box, int axis, int at) {
    if (at >= box.queries) return {0, 0};
    const Range keys = cut.axis[axis].rule.of_class(box.residue).keys(box.first_query + at);
    const Range seen = intersect(relative_to(keys, box.first_key), {0, box.keys});
    return {int(seen.begin), int(seen.end)};
  }

  // Each thread for a row of queries. Returns whether it sees the whole box, or does not exist.
  static __device__ bool find_query(const SpatialCudaParams& p, const SpatialCut& cut, const Mask& mask,
                                    Shared& shared) {
    const auto& boxes = shared.boxes;
    const int row = int(threadIdx.x);
    int at[kMaxAxes];
    bool exists = find_coordinates<Rows::kOwned>(cut, query_of_row(row), at), sees_all = true, sees_any = true;
    CUTE_UNROLL
    for (int a = 0; a < kMaxAxes; ++a) exists = exists && at[a] < boxes[a].queries;
    int token = 0, own[kMaxAxes], coord[kMaxAxes], first = 0, last = 0;
    CUTE_UNROLL
    for (int a = 0; a < kMaxAxes; ++a) {
      const BoxOfTask& box = boxes[a];
      const int2 seen = exists ? seen_on_axis(cut, box, a, at[a]) : int2{0, 0};
      sees_all = sees_all && seen.x == 0 && seen.y == box.keys;
      sees_any = sees_any && seen.x < seen.y;
      first = first * box.keys + seen.x, last = last * box.keys + seen.y - 1;
      const int of_map = box.token(box.first_query + (exists ? at[a] : 0));
      token = token * int(cut.axis[a].rule.num_queries) + of_map;
      own[a] = box.window > 0 ? of_map % box.window : of_map;
      coord[a] =
          exists ? int(cut.axis[a].rule.of_class(box.residue).coord(box.first_query + at[a])) - box.first_key : 0;
    }
    const DeviceOffsetGrid& grid = p.score.by_offset.small;
    shared.query_entry[row] = (grid.entry({{coord[0], coord[1], coord[2]}}) + grid.center()) * int(sizeof(float));
    shared.query_token[row] = exists ? token : -1;
    shared.query_offset[row] = exists ? int(offset_of(p.query, own) / kVector) : -1;
    shared.seen[row] = exists && sees_any ? int2{first, last} : int2{std::numeric_limits<int>::max(), -1};
    mask.set_owned(row, at, exists);
    return sees_all || !exists;
  }

  // From the first key in the box that a query of the warp sees to the last one.
  static __device__ int2 seen_by_warp(const Shared& shared) {
    const int warp = int(threadIdx.x) / kWarpSize;
    int2 seen = shared.seen[lane_index() / 16 * (kQueries / 2) + warp * 16 + lane_index() % 16];
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      seen.x = min(seen.x, __shfl_xor_sync(kAllLanes, seen.x, distance));
      seen.y = max(seen.y, __shfl_xor_sync(kAllLanes, seen.y, distance));
    }
    return seen;
  }

  static constexpr int kVector = 16 / int(sizeof(Element));
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    spatial_attention_plain(const __grid_constant__ SpatialCudaParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel::run(p, *reinterpret_cast<typename Kernel::Shared*>(shared));
}

}  // namespace

template <DType kDType>
cudaError_t SpatialPlainLaunches<kDType>::forward(const SpatialCudaParams& p, cudaStream_t stream) {
  return dispatch_spatial_plain_dim(p.head_dim, p.value_dim, [&]<int kDim>(std::integral_constant<int, kDim>) {
    using Kernel = SpatialPlainForwardKernel<ElementOf<kDType>, kDim>;
    return launch_tasks(spatial_attention_plain<Kernel>, p.batch * p.heads * p.cut.num_tiles(), Kernel::kThreads,
                        Kernel::kSharedBytes, stream, p);
  });
}

template cudaError_t SpatialPlainLaunches<DType::VK_DTYPE>::forward(const SpatialCudaParams&, cudaStream_t);

}  // namespace vitkernels
