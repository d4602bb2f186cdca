// Backward of softmax attention over a map with any pattern on a GPU, accumulated in float32, the same bits in every
// run.
//
// With P = exp(S - lse) and dS = P * (dP - delta), dP being the product of the output's gradient and the values, blocks
// own queries and accumulate dS K, or own keys and accumulate dS^T Q and P^T dO; each recomputes the logits. What a token
// gets, it gets from one block, in a fixed order. Blocks that own queries also sum the gradients of tables, each warp
// for itself.

#include "attention/cuda/differentiate.h"
#include "attention/cuda/owned_tokens.h"
#include "attention/cuda/spatial_score.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

// Of the rows of queries besides: their statistics, and where their rows of dO lie.
template <int kRows>
struct BackwardRows : QueryRows<kRows> {
  float lse[kRows], delta[kRows];
  int64_t out[kRows];
};

template <class T, Side kOwner>
struct SpatialBackwardKernel {
  using Element = T;
  static constexpr bool kOwnsKeys = kOwner == Side::kKeys;
  static constexpr int kDim = kMaxSpatialBackwardDim, kStages = 2;
  static constexpr SpatialTile kTile = spatial_backward_tile(sizeof(Element));
  static constexpr int kQueries = kOwnsKeys ? kTile.streamed : kTile.owned;
  static constexpr int kKeys = kOwnsKeys ? kTile.owned : kTile.streamed;
  static constexpr int kWarps = kTile.owned / 16, kThreads = kWarps * kWarpSize;
  using Owned = SharedTile<Element, kTile.owned, kDim>;
  using Streamed = SharedTile<Element, kTile.streamed, kDim>;
  using Mma = TileMma<Element, kWarps>;
  using Queries = BackwardRows<kQueries>;
  using Keys = KeyRows<kKeys>;
  using LogitShape = Shape<Int<kTile.owned>, Int<kTile.streamed>>;
  using GradShape = Shape<Int<kTile.owned>, Int<kDim>>;

  // First queries or keys, then dO or values. Rows of the streamed side are found two steps before they are read.
  struct Shared {
    Element owned[2][Owned::kElements];
    Element streamed[kStages][2][Streamed::kElements];
    Queries queries[kOwnsKeys ? kStages + 1 : 1];
    Keys keys[kOwnsKeys ? 1 : kStages + 1];
    int key_tokens[kKeys];                              // of owned keys, on the map; -1 if none
    float logit_grads[kWarps][16][kTile.streamed + 1];  // of a warp's queries, on the way to tables
    BoxOfTask boxes[kMaxAxes];
  };
  static constexpr int kSharedBytes = int(sizeof(Shared));

  using Params = SpatialBackwardCudaParams;

  static __device__ __forceinline__ void run(const Params& p, Shared& shared) {
    if constexpr (kOwnsKeys) {
      SpatialTask task(p.keys, p.forward.kv_heads, blockIdx.x);
      own_keys(p, task, shared);
    } else {
      const SpatialCut& cut = p.forward.cut;
      const int64_t head = blockIdx.x % p.forward.heads, block = blockIdx.x / p.forward.heads;
      const Range tasks = part_of(p.forward.batch * cut.num_tiles(), block, p.blocks_of_head);
      for (int64_t i = tasks.begin; i < tasks.end; ++i) {
        const SpatialTask task(cut, p.forward.heads, unsigned(i * p.forward.heads + head));
        own_queries(p, task, block, shared);
      }
    }
  }

  // Row i of some queries: those that do not exist, or saw no key, have zero probabilities.
  template <Rows kAre>
  static __device__ void find_queries(const Params& p, const SpatialCut& cut, const BoxOfTask (&boxes)[kMaxAxes],
                                      int64_t batch, int64_t head, int first, Queries& rows) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const int i = int(threadIdx.x);
    if (i >= kQueries) return;
    const SpatialCudaParams& f = p.forward;
    find_query<kAre>(f, cut, boxes, first + i, i, rows);
    const int token = rows.token[i];
    const int64_t row = (batch * f.num_queries() + token) * f.heads + head;
    const float lse = token < 0 ? -kInfinity : p.lse[row];
    rows.lse[i] = lse == -kInfinity ? kInfinity : lse;
    rows.delta[i] = token < 0 ? 0.0f : p.delta[row];
    rows.out[i] = token < 0 ? kNoRow : int64_t(token) * f.heads * f.value_dim;
  }

  // Starts the copies of rows of both tensors of a side.
  template <class Tile, class Rows>
  static __device__ void start_queries(const Params& p, int64_t batch, int64_t head, const Rows& rows,
                                       Element (&to)[2][Tile::kElements]) {
    const SpatialCudaParams& f = p.forward;
    const Element* const out =
        static_cast<const Element*>(p.grad_out) + (batch * f.num_queries() * f.heads + head) * f.value_dim;
    const Element* const none = nullptr;
    start_rows<kThreads>(shared_tile<Tile>(to[0]), f.query.at<const Element>(batch, Coord{}, head), rows.query, none,
                         int(f.head_dim), f.is_aligned);
    start_rows<kThreads>(shared_tile<Tile>(to[1]), out, rows.out, none, int(f.value_dim), f.is_aligned);
  }
  template <class Tile>
  static __device__ void start_keys(const Params& p, int64_t batch, int64_t kv_head, const Keys& rows,
                                    Element (&to)[2][Tile::kElements]) {
    const SpatialCudaParams& f = p.forward;
    const auto fill = [&](const void* data, int64_t dim) {
      return data ? static_cast<const Element*>(data) + kv_head * dim : nullptr;
    };
    start_rows<kThreads>(shared_tile<Tile>(to[0]), f.key.at<const Element>(batch, Coord{}, kv_head), rows.key,
                         fill(f.key_fill, f.head_dim), int(f.head_dim), f.is_aligned);
    start_rows<kThreads>(shared_tile<Tile>(to[1]), f.value.at<const Element>(batch, Coord{}, kv_head), rows.value,
                         fill(f.value_fill, f.value_dim), int(f.value_dim), f.is_aligned);
  }

  // Walks through the tiles of a box: finds rows and copies them ahead, and calls f(tile) when one has arrived.
  template <class Find, class Start, class Function>
  static __device__ __forceinline__ void walk(int tiles, Find&& find, Start&& start, Function&& f) {
    find(0);
    __syncthreads();  // of the owned side, rows and boxes are known too
    if (tiles > 0) start(0);
    commit_copies();
    if (tiles > 1) find(1);
    for (int tile = 0; tile < tiles; ++tile) {
      wait_for_copies<0>();
      __syncthreads();  // this tile has arrived, the rows of the next are known, and all reads of the last are done
      if (tile + 1 < tiles) start(tile + 1);
      commit_copies();
      if (tile + 2 < tiles) find(tile + 2);
      f(tile);
    }
    wait_for_copies<0>();
    __syncthreads();  // all reads are done
  }

  // P and dS, both (queries,keys), from the tiles in shared memory.
  template <class Probs, class Grads, class At>
  static __device__ __forceinline__ void differentiate(const Params& p, const Mma& mma, Shared& shared, int stage,
                                                       const SpatialScore<kQueries, kKeys>& score,
                                                       const Queries& queries, Probs& probs, Grads& grads,
                                                       const At& at) {
    clear(probs);
    clear(grads);
    multiply_tile(mma, probs, shared_tile<Owned>(shared.owned[0]), shared_tile<Streamed>(shared.streamed[stage][0]),
                  int(p.forward.head_dim));
    multiply_tile(mma, grads, shared_tile<Owned>(shared.owned[1]), shared_tile<Streamed>(shared.streamed[stage][1]),
                  int(p.forward.value_dim));
    Tensor logits = queries_by_keys<kOwner>(by_rows(probs));       // (queries,keys)
    Tensor logit_grads = queries_by_keys<kOwner>(by_rows(grads));  // (queries,keys)
    score.apply(logits, at, false);
    CUTE_UNROLL
    for (int r = 0; r < size<0>(logits); ++r) {
      const int row = get<0>(at(r, 0));
      const float lse = queries.lse[row], delta = queries.delta[row];
      CUTE_UNROLL
      for (int c = 0; c < size<1>(logits); ++c) {
        logits(r, c) = exp_from(logits(r, c), lse);
        logit_grads(r, c) = logits(r, c) * (logit_grads(r, c) - delta);
      }
    }
  }

  // The number of tiles of a box, whose tokens on the first axis are `first`.
  static __device__ int tiles_of(const SpatialCut& cut, int first) {
    return cuda::ceil_div(first * cut.axis[1].streamed * cut.axis[2].streamed, int{kTile.streamed});
  }

  static __device__ __forceinline__ void own_queries(const Params& p, const SpatialTask& task, int64_t block,
                                                     Shared& shared) {
    const SpatialCudaParams& f = p.forward;
    const SpatialCut& cut = f.cut;
    find_boxes(f, cut, task, shared.boxes);
    const auto& boxes = shared.boxes;
    const int64_t own = f.kv_head(task.head), kv_head = own < 0 ? 0 : own;
    Queries& queries = shared.queries[0];
    find_queries<Rows::kOwned>(p, cut, boxes, task.batch, task.head, 0, queries);
    const auto keys_of = [&](int tile) -> Keys& { return shared.keys[tile % (kStages + 1)]; };

    const Mma mma(f.allow_tf32);
    const auto at = coordinates_of<kOwner, kTile.owned, kTile.streamed>(mma);  // (queries,keys)
    Tensor grad = partition_fragment_C(mma, GradShape{});                      // (MMA,MMA_M,MMA_N)
    clear(grad);
    walk(
        own < 0 ? 0 : tiles_of(cut, boxes[0].keys),
        [&](int tile) {
          if (threadIdx.x >= kKeys) return;
          find_key<Rows::kStreamed>(f, cut, boxes, task.batch, task.head, tile * kKeys + int(threadIdx.x),
                                    int(threadIdx.x), keys_of(tile));
        },
        [&](int tile) {
          if (tile == 0) start_queries<Owned>(p, task.batch, task.head, queries, shared.owned);
          start_keys<Streamed>(p, task.batch, kv_head, keys_of(tile), shared.streamed[tile % kStages]);
        },
        [&](int tile) {
          const SpatialScore<kQueries, kKeys> score(f, cut, queries, keys_of(tile), task.batch, task.head);
          Tensor probs = partition_fragment_C(mma, LogitShape{});  // (MMA,MMA_M,MMA_N)
          Tensor grads = partition_fragment_C(mma, LogitShape{});  // (MMA,MMA_M,MMA_N)
          differentiate(p, mma, shared, tile % kStages, score, queries, probs, grads, at);
          Tensor logit_grads = by_rows(grads);  // (queries,keys)
          if (p.relative_grad) sum_relative(p, task, shared, score, logit_grads, at);
          if (p.bias_table.data) sum_table(p.bias_table, p, block, shared, score, logit_grads, at);
          if (p.multiplier_table.data) {
            Tensor products = partition_fragment_C(mma, LogitShape{});  // (MMA,MMA_M,MMA_N)
            clear(products);
            multiply_tile(mma, products, shared_tile<Owned>(shared.owned[0]),
                          shared_tile<Streamed>(shared.streamed[tile % kStages][0]), int(f.head_dim));
            CUTE_UNROLL
            for (int i = 0; i < size(products); ++i) products(i) *= grads(i) * score.scale;
            sum_table(p.multiplier_table, p, block, shared, score, by_rows(products), at);
          }
          score.multiply(logit_grads, at);
          multiply_operand(mma, grad, as_operand_a(convert<Element>(grads)),
                           shared_tile<Streamed>(shared.streamed[tile % kStages][0]), int(f.head_dim));
        });
    store_queries(p, task, shared, mma, grad, own >= 0 && boxes[0].keys > 0);
  }

  // Writes (queries,keys) of a warp to shared memory, for its lanes to read as rows.
  template <class Grads, class At>
  static __device__ auto& share_rows(Shared& shared, const Grads& grads, const At& at) {
    auto& of_warp = shared.logit_grads[int(threadIdx.x) / kWarpSize];
    __syncwarp();  // all reads of the last are done
    CUTE_UNROLL
    for (int r = 0; r < size<0>(grads); ++r) {
      CUTE_UNROLL
      for (int c = 0; c < size<1>(grads); ++c) of_warp[get<0>(at(r, 0)) % 16][get<1>(at(r, c))] = grads(r, c);
    }
    __syncwarp();
    return of_warp;
  }

  static __device__ bool is_seen_by(const SpatialScore<kQueries, kKeys>& score, int query, int key) {
    return is_seen(score.packed.guards, score.queries.before_first[query], score.queries.last[query],
                   score.keys.packed[key]);
  }

  // Adds the gradients of a warp's logits to those of the relative logits. A lane has a coordinate of the keys.
  template <class Grads, class At>
  static __device__ void sum_relative(const Params& p, const SpatialTask& task, Shared& shared,
                                      const SpatialScore<kQueries, kKeys>& score, const Grads& grads, const At& at) {
    const auto& rows = share_rows(shared, grads, at);
    const OffsetTerms& terms = p.forward.score.by_offset;
    float* const sums =
        p.relative_grad + task.batch * terms.relative.batch_stride + task.head * terms.relative.head_stride;
    for (int row = 0; row < 16; ++row) {
      const int query = int(threadIdx.x) / kWarpSize * 16 + row;
      if (score.queries.token[query] < 0) continue;
      CUTE_UNROLL
      for (int axis = 0; axis < kMaxAxes; ++axis) {
        if (!terms.rel_pos[axis].data) continue;
        const int count = p.forward.cut.axis[axis].streamed;
        for (int coord = lane_index(); coord < count; coord += kWarpSize) {
          float sum = 0.0f;
          bool is_any = false;
          for (int key = 0; key < kKeys; ++key) {
            if (score.packed.coord(axis, score.keys.packed[key]) != coord || !is_seen_by(score, query, key)) continue;
            sum += rows[row][key], is_any = true;
          }
          if (is_any) sums[score.relative_place(axis, query, coord)] += sum;
        }
      }
    }
  }

  // Adds the gradients of a warp's logits to its part of a table's. The keys of one query have different entries.
  template <class Grads, class At>
  static __device__ void sum_table(const PartialSums& sums, const Params& p, int64_t block, Shared& shared,
                                   const SpatialScore<kQueries, kKeys>& score, const Grads& grads, const At& at) {
    const int warp = int(threadIdx.x) / kWarpSize;
    const auto& rows = share_rows(shared, grads, at);
    const DeviceOffsetGrid& grid = p.forward.score.by_offset.small;
    const int entries = num_table_entries(grid);
    const int head = int(blockIdx.x % unsigned(p.forward.heads));
    float* const table = sums.part(block * kWarps + warp) + int64_t(head) * entries + grid.center();
    for (int row = 0; row < 16; ++row) {
      __syncwarp();  // the row before has been added
      const int query = warp * 16 + row;
      for (int key = lane_index(); key < kKeys; key += kWarpSize) {
        if (!is_seen_by(score, query, key)) continue;
        table[score.queries.entry[query] - score.keys.entry[key]] += rows[row][key];
      }
    }
  }

  template <class Grad>
  static __device__ void store_queries(const Params& p, const SpatialTask& task, Shared& shared, const Mma& mma,
                                       Grad& grad, bool has_arrived) {
    const SpatialCudaParams& f = p.forward;
    const Queries& queries = shared.queries[0];
    Tensor sQ = shared_tile<Owned>(shared.owned[0]);      // (queries,dim)
    const auto at = owned_coordinates(mma, GradShape{});  // (rows,columns)
    Tensor rows = by_rows(grad);                          // (rows,columns)
    const int64_t first = task.batch * f.num_queries();
    const int dim = int(f.head_dim);
    if (p.dots) {
      CUTE_UNROLL
      for (int r = 0; r < size<0>(rows); ++r) {
        const int row = get<0>(at(r, 0)), token = queries.token[row];
        float dot = 0.0f;
        CUTE_UNROLL
        for (int c = 0; c < size<1>(rows); ++c) {
          const int column = get<1>(at(r, c));
          if (has_arrived && column < dim) dot += rows(r, c) * float(sQ(row, column));
        }
        dot = combine_quad(dot, [](float a, float b) { return a + b; });
        if (get<1>(at(r, 0)) == 0 && token >= 0) p.dots[(first + token) * f.heads + task.head] = dot;
      }
    }
    const float scale = f.score.scale_of<float>(task.head);
    CUTE_UNROLL
    for (int i = 0; i < size(grad); ++i) grad(i) *= scale;
    if (p.float_grad_query) {
      CUTE_UNROLL
      for (int r = 0; r < size<0>(rows); ++r) {
        const int token = queries.token[get<0>(at(r, 0))];
        float* const to = p.float_grad_query + ((first + token) * f.heads + task.head) * dim;
        CUTE_UNROLL
        for (int c = 0; c < size<1>(rows); ++c) {
          if (token >= 0 && get<1>(at(r, c)) < dim) to[get<1>(at(r, c))] = rows(r, c);
        }
      }
      __syncthreads();  // before the next task
      return;
    }
    store_tokens(mma, grad, sQ, queries.token,
                 static_cast<Element*>(p.grad_query) + (first * f.heads + task.head) * dim, f.heads * dim, dim);
  }

  // Rounds accumulators and stores them at their tokens, through shared memory.
  template <class Grad, class Tile>
  static __device__ void store_tokens(const Mma& mma, const Grad& grad, Tile& sT, const int* tokens, Element* target,
                                      int64_t stride, int columns) {
    __syncthreads();  // all reads of the tile are done
    cute::copy(AutoVectorizingCopy{}, convert<Element>(grad), mma.get_slice(threadIdx.x).partition_C(sT));
    __syncthreads();
    store_rows<kThreads>(sT, tokens, target, stride, columns);
    __syncthreads();
  }

  static __device__ __forceinline__ void own_keys(const Params& p, const SpatialTask& task, Shared& shared) {
    const SpatialCudaParams& f = p.forward;
    const SpatialCut& cut = p.keys;
    find_boxes(f, cut, task, shared.boxes);
    const auto& boxes = shared.boxes;
    const int64_t kv_head = task.head;
    Keys& keys = shared.keys[0];
    const auto queries_of = [&](int tile) -> Queries& { return shared.queries[tile % (kStages + 1)]; };

    const Mma mma(f.allow_tf32);
    const auto at = coordinates_of<kOwner, kTile.owned, kTile.streamed>(mma);  // (queries,keys)
    Tensor grad = partition_fragment_C(mma, GradShape{});                      // (MMA,MMA_M,MMA_N)
    Tensor grad_value = make_fragment_like(grad);                              // (MMA,MMA_M,MMA_N)
    clear(grad);
    clear(grad_value);
    const HeadFactors factors(f.score, f, {0, f.heads}, kv_head);
    bool is_first = true;
    for (int64_t head = 0; head < f.heads; ++head) {
      if (f.kv_head(head) != kv_head && !(is_first && head + 1 == f.heads)) continue;
      const bool is_read = f.kv_head(head) == kv_head;  // else rows are found once all the same
      if (threadIdx.x < kKeys) {
        shared.key_tokens[threadIdx.x] =
            find_key<Rows::kOwned>(f, cut, boxes, task.batch, head, int(threadIdx.x), int(threadIdx.x), keys);
      }
      float sums[2] = {};  // of the logits' gradients of each key
      walk(
          is_read ? tiles_of(cut, boxes[0].queries) : 0,
          [&](int tile) {
            find_queries<Rows::kStreamed>(p, cut, boxes, task.batch, head, tile * kQueries, queries_of(tile));
          },
          [&](int tile) {
            if (is_first) start_keys<Owned>(p, task.batch, kv_head, keys, shared.owned);
            is_first = false;
            start_queries<Streamed>(p, task.batch, head, queries_of(tile), shared.streamed[tile % kStages]);
          },
          [&](int tile) {
            const SpatialScore<kQueries, kKeys> score(f, cut, queries_of(tile), keys, task.batch, head);
            Tensor probs = partition_fragment_C(mma, LogitShape{});  // (MMA,MMA_M,MMA_N)
            Tensor grads = partition_fragment_C(mma, LogitShape{});  // (MMA,MMA_M,MMA_N)
            differentiate(p, mma, shared, tile % kStages, score, queries_of(tile), probs, grads, at);
            Tensor logit_grads = queries_by_keys<kOwner>(by_rows(grads));  // (queries,keys)
            CUTE_UNROLL
            for (int c = 0; c < size<1>(logit_grads); ++c) {
              CUTE_UNROLL
              for (int r = 0; r < size<0>(logit_grads); ++r) sums[c] += logit_grads(r, c);
            }
            score.multiply(logit_grads, at);
            const float factor = factors.relative(f.score, head);
            CUTE_UNROLL
            for (int i = 0; i < size(grads); ++i) grads(i) *= factor;
            multiply_operand(mma, grad, as_operand_a(convert<Element>(grads)),
                             shared_tile<Streamed>(shared.streamed[tile % kStages][0]), int(f.head_dim));
            multiply_operand(mma, grad_value, as_operand_a(convert<Element>(probs)),
                             shared_tile<Streamed>(shared.streamed[tile % kStages][1]), int(f.value_dim));
          });
      if (is_read && p.key_bias_grad) store_key_bias(p, task, shared, head, sums, at);
      __syncthreads();  // all reads of the rows are done
    }
    CUTE_UNROLL
    for (int i = 0; i < size(grad); ++i) grad(i) *= f.score.scale.template as<float>() * factors.largest;
    store_keys(p, task, shared, mma, grad, grad_value);
  }

  template <class At>
  static __device__ void store_key_bias(const Params& p, const SpatialTask& task, const Shared& shared, int64_t head,
                                        const float (&sums)[2], const At& at) {
    const SpatialCudaParams& f = p.forward;
    CUTE_UNROLL
    for (int c = 0; c < 2; ++c) {
      const float sum = combine_quad(sums[c], [](float a, float b) { return a + b; });
      const int token = shared.key_tokens[get<1>(at(0, c))];
      if (lane_index() % 4 == 0 && token >= 0) {
        p.key_bias_grad[(task.batch * f.heads + head) * f.num_keys() + token] = sum;
      }
    }
  }

  template <class Grad>
  static __device__ void store_keys(const Params& p, const SpatialTask& task, Shared& shared, const Mma& mma,
                                    Grad& grad, Grad& grad_value) {
    const SpatialCudaParams& f = p.forward;
    const int64_t first = task.batch * f.num_keys() * f.kv_heads + task.head;
    const auto store = [&](Grad& acc, int i, void* target, int64_t dim, const PartialSums& fill) {
      if (fill.data) sum_fill(fill, task, p, shared, mma, acc, int(dim));
      Tensor sT = shared_tile<Owned>(shared.owned[i]);  // (keys,dim)
      store_tokens(mma, acc, sT, shared.key_tokens, static_cast<Element*>(target) + first * dim, f.kv_heads * dim,
                   int(dim));
    };
    store(grad, 0, p.grad_key, f.head_dim, p.key_fill);
    store(grad_value, 1, p.grad_value, f.value_dim, p.value_fill);
  }

  // The sum of the rows outside the map, in their order, as this block's part.
  template <class Grad>
  static __device__ void sum_fill(const PartialSums& fill, const SpatialTask& task, const Params& p, Shared& shared,
                                  const Mma& mma, const Grad& grad, int dim) {
    static_assert(sizeof(shared.streamed) >= kTile.owned * kDim * sizeof(float));
    Tensor floats = make_tensor(make_smem_ptr(reinterpret_cast<float*>(shared.streamed)),
                                Layout<GradShape, Stride<Int<kDim>, _1>>{});  // (keys,dim)
    cute::copy(grad, mma.get_slice(threadIdx.x).partition_C(floats));
    __syncthreads();
    const int64_t part = blockIdx.x / unsigned(p.forward.kv_heads);
    for (int column = int(threadIdx.x); column < dim; column += kThreads) {
      float sum = 0.0f;
      for (int row = 0; row < kTile.owned; ++row) {
        if (shared.keys[0].key[row] == kRowOutside) sum += floats(row, column);
      }
      fill.part(part)[task.head * dim + column] = sum;
    }
    __syncthreads();
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads)
    spatial_attention_backward(const __grid_constant__ SpatialBackwardCudaParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel::run(p, *reinterpret_cast<typename Kernel::Shared*>(shared));
}

}  // namespace

template <DType kDType>
cudaError_t SpatialLaunches<kDType>::backward(const SpatialBackwardCudaParams& p, Side owner, cudaStream_t stream) {
  const auto launch = [&]<class Kernel>(Kernel, int64_t tasks) {
    return launch_tasks(spatial_attention_backward<Kernel>, tasks, Kernel::kThreads, Kernel::kSharedBytes, stream, p);
  };
  using Element = ElementOf<kDType>;
  if (owner == Side::kQueries) {
    return launch(SpatialBackwardKernel<Element, Side::kQueries>{}, p.forward.heads * p.blocks_of_head);
  }
  return launch(SpatialBackwardKernel<Element, Side::kKeys>{},
                p.forward.batch * p.forward.kv_heads * p.keys.num_tiles());
}

template cudaError_t SpatialLaunches<DType::VK_DTYPE>::backward(const SpatialBackwardCudaParams&, Side, cudaStream_t);

}  // namespace vitkernels
