// Spectral gating on a GPU, and its gradients.
//
// A thread block has a group of channels and a share of the batch. A map goes through its rows, through its columns,
// there and back, and through its rows again: between reading x and writing out, it stays in shared memory, next to the
// weight where both fit. The gradient of x is the same operator with the conjugate weight; on the way, the products of
// both spectra are added up over the share in order.

#include "cuda/parts.h"
#include "monarch/cuda/spectral_block.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kMaxThreads = kMaxSpectralThreads;
constexpr int kMaxLogGroup = 4;

template <DType kDType>
using SpectralElement = std::conditional_t<kDType == DType::kFloat32, float,
                                           std::conditional_t<kDType == DType::kBFloat16, BFloat16, Float16>>;

// Points of shared memory, in the order in which they lie there.
struct SharedPoints {
  int tables, maps, weights;

  VK_HOST_DEVICE explicit SharedPoints(const SpectralGatingCudaParams& p)
      : tables(p.rows + p.columns + (2 * p.frequencies() + p.rows + 1) / 2),
        maps((p.pairs() * p.line) << p.log_group),
        weights((p.rows * p.frequencies()) << p.log_group) {}
};

template <class Element, bool kHasX>
class SpectralGatingKernel {
  using Params = SpectralGatingCudaParams;

 public:
  static __device__ __forceinline__ void run(const Params& p, float2* shared) {
    TaskIndex<unsigned> index(block_index());
    const int64_t group = index.take(p.groups()), share = index.rest();
    const SharedPoints points(p);
    SpectralGatingKernel kernel(p, group, share, shared, points);
    float2* const map = kernel.block_.own(shared + points.tables);
    float2* const x_map = map + points.maps;
    if (p.is_resident) kernel.keep_weight();
    const Range batches = part_of(p.batch, share, p.shares);
    for (int64_t b = batches.begin; b < batches.end; ++b) {
#pragma unroll 1
      for (int is_x = kHasX; is_x >= 0; --is_x) {
        kernel.block_.forward(is_x ? p.saved_x : p.x, b, is_x ? x_map : map, is_x);
      }
      kernel.gate(map, points.maps, b == batches.begin);
      kernel.block_.inverse(p.out, b, map);
    }
    if (kHasX && p.is_resident) kernel.give_sums();
  }

 private:
  __device__ SpectralGatingKernel(const Params& p, int64_t group, int64_t share, float2* shared,
                                  const SharedPoints& points)
      : p(p),
        share_(share),
        block_(p, group, shared),
        weight_(block_.own(shared + points.tables + (kHasX ? 2 : 1) * points.maps)),
        sums_(weight_ + points.weights),
        scale_(0.5f / (float(p.rows) * float(p.columns))) {}

  // The weight of a column's frequency, divided by what the transforms multiply by.
  __device__ __forceinline__ float2 read_weight(int h, int k) const {
    const int64_t at = h * p.weight.row_stride + k * p.weight.column_stride + block_.channel * p.weight.channel_stride;
    const auto read = [&]<class From>(From) __attribute__((always_inline)) {
      const From* from = static_cast<const From*>(p.weight.data) + at;
      if (p.is_weight_packed) {
        const auto parts = load_elements<2, From>(from, 0);
        return float2{widen(parts.values[0]) * scale_, widen(parts.values[1]) * scale_};
      }
      return float2{widen(*from) * scale_, widen(from[p.weight.part_stride]) * scale_};
    };
    const float2 weight = p.is_weight_wide ? read(float{}) : read(Element{});
    return {weight.x, p.is_conjugate ? -weight.y : weight.y};
  }
  __device__ __forceinline__ int weight_at(int place, int k) const {
    return (place * p.frequencies() + k) << p.log_group;
  }

  template <class Function>
  __device__ __forceinline__ void for_each_weight(Function&& f) const {
    block_.for_each(p.rows * p.frequencies(), [&](int i) __attribute__((always_inline)) {
      const int place = p.by_frequencies.divide(i);
      f(place, i - place * p.frequencies());
    });
  }
  __device__ __forceinline__ void keep_weight() const {
    for_each_weight([&](int place, int k) __attribute__((always_inline)) {
      weight_[weight_at(place, k)] = read_weight(block_.frequency(place), k);
    });
    __syncthreads();
  }
  __device__ __forceinline__ void give_sums() const {
    __syncthreads();
    for_each_weight([&](int place, int k) __attribute__((always_inline)) {
      *part(block_.frequency(place), k) = sums_[weight_at(place, k)];
    });
  }
  __device__ __forceinline__ float2* part(int h, int k) const {
    return reinterpret_cast<float2*>(p.parts) + ((share_ * p.rows + h) * p.frequencies() + k) * p.channels +
           block_.channel;
  }

  __device__ __forceinline__ void gate(float2* map, int x_offset, bool is_first) const {
    block_.change_columns(map, [&]<int kCount>(Points<kCount>& points, int k, int place,
                                               const auto& load) __attribute__((always_inline)) {
      if constexpr (kHasX) {
        // Both spectra are times 2, and each frequency between the first and the last stands for two.
        const bool is_one = k == 0 || 2 * k == p.columns;
        const float scale = is_one ? 0.5f * scale_ : scale_;
        Points<kCount> x;
        load(x, x_offset);
#pragma unroll
        for (int q = 0; q < kCount; ++q) {
          float2 product = multiply<true>(points.get(q), x.get(q));
          product.x *= scale, product.y *= scale;
          float2* const sum = p.is_resident ? sums_ + weight_at(place + q, k) : part(block_.frequency(place + q), k);
          if (!is_first) product.x += sum->x, product.y += sum->y;
          *sum = product;
        }
      }
#pragma unroll
      for (int q = 0; q < kCount; ++q) {
        const float2 weight =
            p.is_resident ? weight_[weight_at(place + q, k)] : read_weight(block_.frequency(place + q), k);
        points.set(q, multiply<false>(points.get(q), weight));
      }
    });
  }

  const Params& p;
  const int64_t share_;
  const SpectralBlock<Element> block_;
  float2 *const weight_, *const sums_;  // [rows, frequencies, channels], rows by place
  const float scale_;
};

template <class Element>
__global__ void __launch_bounds__(kMaxThreads) spectral_gating(const __grid_constant__ SpectralGatingCudaParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  SpectralGatingKernel<Element, false>::run(p, reinterpret_cast<float2*>(shared));
}

template <class Element>
__global__ void __launch_bounds__(kMaxThreads)
    spectral_gating_grad(const __grid_constant__ SpectralGatingCudaParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  SpectralGatingKernel<Element, true>::run(p, reinterpret_cast<float2*>(shared));
}

// In a padded line, neighbours among butterflies of the last stage are an odd number of slots apart, and lines are.
void set_lines(SpectralGatingCudaParams& p) {
  RadixStages& rows = p.of_rows;
  const int last = rows.last().radix;
  const bool is_padded = p.log_group < kMaxLogGroup && rows.stages > 1 && last % 2 == 0;
  p.by_padding = Divisor(is_padded ? last : 1 << 30);
  for (int s = 0; s < rows.stages; ++s) {
    RadixStages::Stage& stage = rows.stage[s];
    stage.slot_step = stage.count + (is_padded && stage.count > 1 ? stage.count / last : 0);
  }
  p.line = p.columns + (is_padded ? p.columns / last : 0);
  if (!p.has_short_columns()) p.line += 1 + (p.columns % 2 == 0);
  if (p.log_group < kMaxLogGroup) p.line |= 1;
}

bool is_weight_packed(const SpectralGatingCudaParams& p) {
  const SpectralWeight& weight = p.weight;
  return weight.part_stride == 1 && (weight.row_stride | weight.column_stride | weight.channel_stride) % 2 == 0 &&
         is_aligned(weight.data);
}

int64_t shared_bytes(const SpectralGatingCudaParams& p) {
  const SharedPoints points(p);
  const int copies = p.saved_x.data ? 2 : 1;
  return int64_t(sizeof(float2)) *
         (points.tables + copies * (int64_t(points.maps) + (p.is_resident ? points.weights : 0)));
}

// One of most passes for each thread, and of each of a prime's outputs.
bool set_threads(SpectralGatingCudaParams& p, int most) {
  const RadixStages &of_columns = p.of_columns, &of_rows = p.of_rows;
  const int outputs = std::max(of_columns.max_prime, of_rows.max_prime) / 2 + 1;
  const int items =
      std::max({p.pairs() * of_rows.stage[0].butterflies, p.frequencies() * of_columns.last().butterflies, outputs});
  p.threads = std::min(ceil_div(items << p.log_group, kWarpSize) * kWarpSize, most);
  return outputs << p.log_group <= most;
}

// The most channels for which maps fit, with or without the weight, which may be read again for each map before there
// are fewer.
bool set_group(SpectralGatingCudaParams& p, int min_log_group, int budget, int threads) {
  for (p.log_group = kMaxLogGroup; p.log_group >= min_log_group; --p.log_group) {
    if (p.log_group > 0 && int64_t(1) << (p.log_group - 1) >= p.channels) continue;
    set_lines(p);
    if (!set_threads(p, threads)) continue;
    for (const bool is_resident : {true, false}) {
      p.is_resident = is_resident;
      p.shared_bytes = int(shared_bytes(p));
      if (p.shared_bytes <= budget) return true;
    }
  }
  return false;
}

}  // namespace

template <DType kDType>
int64_t SpectralGatingLaunches<kDType>::shares(const SpectralGatingCudaParams& p) {
  return parts_for(ceil_div<int64_t>(p.channels, 1 << kMaxLogGroup), p.batch, p.saved_x.data ? p.weight_elements() : 1);
}

template <DType kDType>
cudaError_t SpectralGatingLaunches<kDType>::plan(SpectralGatingCudaParams& p) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&p.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  p.of_columns = RadixStages(MixedRadix(p.rows)), p.of_rows = RadixStages(MixedRadix(p.columns));
  p.by_frequencies = Divisor(p.frequencies());
  p.is_weight_packed = is_weight_packed(p);
  // Two blocks to a multiprocessor, so that one computes while the other waits; or a large one with the same registers
  // before loads are shorter than 16 bytes of float32.
  constexpr int kMinLogGroup = 2, kReserved = 1024;  // by the driver, for a block
  set_group(p, kMinLogGroup, (p.shared_limit - kReserved) / 2, kMaxThreads / 2) ||
      set_group(p, kMinLogGroup, p.shared_limit, kMaxThreads) || set_group(p, 0, p.shared_limit, kMaxThreads);
  return cudaSuccess;
}

template <DType kDType>
cudaError_t SpectralGatingLaunches<kDType>::run(const SpectralGatingCudaParams& p, cudaStream_t stream) {
  using Element = SpectralElement<kDType>;
  const auto kernel = p.saved_x.data ? spectral_gating_grad<Element> : spectral_gating<Element>;
  return launch_tasks(kernel, p.groups() * p.shares, p.threads, p.shared_bytes, stream, p);
}

template int64_t SpectralGatingLaunches<DType::VK_DTYPE>::shares(const SpectralGatingCudaParams&);
template cudaError_t SpectralGatingLaunches<DType::VK_DTYPE>::plan(SpectralGatingCudaParams&);
template cudaError_t SpectralGatingLaunches<DType::VK_DTYPE>::run(const SpectralGatingCudaParams&, cudaStream_t);

}  // namespace vitkernels
