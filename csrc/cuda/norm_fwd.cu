// Forward of LayerNorm and RMSNorm, with or without a residual addition before it. Arithmetic: math/norm.h. Reference:
// fastllm/reference/_norm.py.
//
// A row belongs to one warp (up to 1,024 elements of 16 bits) or to one block. Its elements stay in registers between
// the passes, so that x is read once; rows too long for that (over 16,384 elements, or ragged ones over 4,096) are read
// again from the cache. Bytes that must move: x (and residual) once in, y (and sum) once out.
#include "norm.h"

#include "../math/norm.h"
#include "candidates.h"
#include "device.cuh"

#include <stdexcept>

namespace fastllm {

namespace {

constexpr int kMaxThreads = 512;
constexpr int kRowsPerBlock = 4;  // where a row is one warp's

// Launch bounds by the bytes that a thread keeps of a row, so that a multiprocessor holds 1,024 threads or more, whose
// loads cover memory's latency: 48 registers a thread, or 64.
template <class T, int kVec, int kPacks>
struct Bounds {
  static constexpr int kBytes = sizeof(T) * kVec * kPacks;
  static constexpr bool kSmall = kVec > 1 && kBytes <= 32;
  static constexpr int kThreads = kSmall ? 256 : kMaxThreads;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000  // where nvcc 13 spills what sm_80 and sm_90 hold
  static constexpr int kBlocks = kSmall ? 3 : 1;
#else
  static constexpr int kBlocks = kSmall ? (kBytes <= 16 ? 5 : 4) : kVec > 1 && kBytes <= 64 ? 2 : 1;
#endif
};

// A thread's packs of x, `step` elements apart, with the residual added, rounded and stored as the sum. Stores hold up
// the loads behind them: x is loaded first, and of the residual as much at a time as the registers allow. kWhole: all
// packs are of the row.
template <bool kWhole, class T, int kVec, int kPacks, class Index>
__device__ __forceinline__ void load_input(
    Packed<T, kVec> (&x)[kPacks], const NormFwd& a, int64_t row, Index col, Index step) {
  constexpr int kMost = kVec == 1 ? 4 : 2, kGroup = kMost < kPacks ? kMost : kPacks;
  const Index n = static_cast<Index>(a.n);
  const T* const x_row = static_cast<const T*>(a.x) + row * a.x_stride;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (kWhole || col + p * step < n) {
      x[p] = load_packed<T, kVec>(x_row + col + p * step);
    }
  }
  if (a.residual == nullptr) {
    return;
  }
  const T* const residual_row = static_cast<const T*>(a.residual) + row * a.residual_stride;
  T* const sum_row = static_cast<T*>(a.sum) + row * a.n;
#pragma unroll
  for (int first = 0; first < kPacks; first += kGroup) {
    Packed<T, kVec> residual[kGroup];
#pragma unroll
    for (int p = 0; p < kGroup; ++p) {
      if (kWhole || col + (first + p) * step < n) {
        residual[p] = load_packed<T, kVec>(residual_row + col + (first + p) * step);
      }
    }
#pragma unroll
    for (int p = 0; p < kGroup; ++p) {
      if (kWhole || col + (first + p) * step < n) {
        float sum[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          sum[i] = x[first + p].get(i) + residual[p].get(i);
        }
        x[first + p].set(sum);
        store_packed<T, kVec>(sum_row + col + (first + p) * step, x[first + p]);
      }
    }
  }
}

// The row's first element, as load_input gives it: the mean is summed from there (math/norm.h).
template <class T>
__device__ __forceinline__ float load_first(const NormFwd& a, int64_t row) {
  const float x = to_float(static_cast<const T*>(a.x)[row * a.x_stride]);
  if (a.residual == nullptr) {
    return x;
  }
  return to_float(from_float<T>(x + to_float(static_cast<const T*>(a.residual)[row * a.residual_stride])));
}

template <class T, int kVec, bool kCentered>
__device__ __forceinline__ void store_output(
    const NormFwd& a, int64_t row, int64_t col, const Packed<T, kVec>& x, float mean, float rstd) {
  float weight[kVec], bias[kVec];
  load_param<T>(weight, a.weight, a.weight_is_float, col, 1.0f);
  load_param<T>(bias, a.bias, a.bias_is_float, col, 0.0f);
  float y[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    y[i] = norm_xhat<kCentered>(x.get(i), mean, rstd) * weight[i] + bias[i];
  }
  Packed<T, kVec> packed;
  packed.set(y);
  store_packed<T, kVec>(static_cast<T*>(a.y) + row * a.n + col, packed);
}

// As math/norm.h, without branches: the root's reciprocal is an approximation that one step of Newton's makes as good
// as a division of a root. Where that step makes no sense, of 0 and infinity, the approximation is exact.
__device__ __forceinline__ float row_rstd(float sum_of_squares, float inverse_n, float eps) {
  const float variance = sum_of_squares * inverse_n + eps;
  const float r = rsqrtf(variance);
  const float better = r + 0.5f * r * (1.0f - variance * r * r);
  return variance > 0.0f && variance <= 3.402823466e+38f ? better : r;
}

template <bool kCentered>
__device__ __forceinline__ void store_statistics(const NormFwd& a, int64_t row, float mean, float rstd) {
  if (threadIdx.x == 0) {
    if constexpr (kCentered) {
      a.mean[row] = mean;
    }
    a.rstd[row] = rstd;
  }
}

// Whether weight and bias are what most models have: of type T, and no bias where the row is not centered.
template <class T, bool kCentered>
bool plain_params(const NormFwd& a) {
  constexpr bool kFloat = sizeof(T) == 4;
  return a.weight != nullptr && a.weight_is_float == kFloat &&
         (kCentered ? a.bias != nullptr && a.bias_is_float == kFloat : a.bias == nullptr);
}

// Rows in registers: kPacks packs of kVec elements a thread. kPlain: all of them are of the row, and weight and bias
// are plain. It spares a fifth of the instructions and more: without branches, the compiler keeps what it computed of
// one pass for the next.
template <class T, int kVec, int kPacks, bool kCentered, bool kPlain>
__global__ void __launch_bounds__(Bounds<T, kVec, kPacks>::kThreads, Bounds<T, kVec, kPacks>::kBlocks)
    norm_fwd_registers(NormFwd a, float inverse_n) {
  if constexpr (kPlain) {
    constexpr bool kFloat = sizeof(T) == 4;  // one condition each: the compiler makes nothing of a conjunction
    __builtin_assume(a.weight != nullptr);
    __builtin_assume(a.weight_is_float == kFloat);
    if constexpr (kCentered) {
      __builtin_assume(a.bias != nullptr);
      __builtin_assume(a.bias_is_float == kFloat);
    } else {
      __builtin_assume(a.bias == nullptr);
    }
  }
  __shared__ float scratch[2][1][kMaxWarps];
  const int n = static_cast<int>(a.n), col = threadIdx.x * kVec, step = blockDim.x * kVec;
  const auto inside = [&](int p) { return kPlain || col + p * step < n; };
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < a.rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    Packed<T, kVec> x[kPacks];
    load_input<kPlain>(x, a, row, col, step);
    float mean = 0.0f;
    if constexpr (kCentered) {
      const float first = load_first<T>(a, row);
      float total[1] = {};
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        if (inside(p)) {
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            total[0] += x[p].get(i) - first;
          }
        }
      }
      row_sum(total, scratch[0]);
      mean = first + total[0] * inverse_n;
    }
    float squares[1] = {};
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (inside(p)) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const float d = norm_center<kCentered>(x[p].get(i), mean);
          squares[0] += d * d;
        }
      }
    }
    row_sum(squares, scratch[1]);
    const float rstd = row_rstd(squares[0], inverse_n, a.eps);
    store_statistics<kCentered>(a, row, mean, rstd);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (inside(p)) {
        store_output<T, kVec, kCentered>(a, row, col + p * step, x[p], mean, rstd);
      }
    }
    if constexpr (!kCentered) {
      // Only one of the two scratch rows is in use: the next row must not overwrite it while a warp still reads.
      if (blockDim.x > kWarp) {
        __syncthreads();
      }
    }
  }
}

// Rows of any length, one block each, read once a pass.
template <class T, int kVec, bool kCentered>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_fwd_loop(NormFwd a, float inverse_n) {
  __shared__ float scratch[2][1][kMaxWarps];
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kVec, step = static_cast<int64_t>(blockDim.x) * kVec;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    // With a residual, the first pass writes the sum and the later ones read it: each thread what it wrote itself.
    const bool summed = a.residual != nullptr;
    const T* x = summed ? static_cast<const T*>(a.sum) + row * a.n : static_cast<const T*>(a.x) + row * a.x_stride;
    float mean = 0.0f;
    if (kCentered || summed) {
      const float origin = load_first<T>(a, row);
      float total[1] = {};
      for (int64_t col = first; col < a.n; col += step) {
        Packed<T, kVec> packed[1];
        load_input<false>(packed, a, row, col, step);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          total[0] += packed[0].get(i) - origin;
        }
      }
      if constexpr (kCentered) {
        row_sum(total, scratch[0]);
        mean = origin + total[0] * inverse_n;
      }
    }
    float squares[1] = {};
    for (int64_t col = first; col < a.n; col += step) {
      const auto packed = load_packed<T, kVec>(x + col);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float d = norm_center<kCentered>(packed.get(i), mean);
        squares[0] += d * d;
      }
    }
    row_sum(squares, scratch[1]);
    const float rstd = row_rstd(squares[0], inverse_n, a.eps);
    store_statistics<kCentered>(a, row, mean, rstd);
    for (int64_t col = first; col < a.n; col += step) {
      store_output<T, kVec, kCentered>(a, row, col, load_packed<T, kVec>(x + col), mean, rstd);
    }
    if (blockDim.x > kWarp) {
      __syncthreads();
    }
  }
}

int grid_for(int64_t blocks) {
  return static_cast<int>(blocks < (int64_t{1} << 30) ? blocks : int64_t{1} << 30);
}

template <class T, int kVec, int kPacks, bool kCentered>
void launch_registers(const NormFwd& a, cudaStream_t stream) {
  constexpr int kColumns = kVec * kPacks;
  const int threads = warps_for(ceil_div(a.n, static_cast<int64_t>(kColumns)));
  const int rows = threads == kWarp ? kRowsPerBlock : 1;
  if (threads * rows > Bounds<T, kVec, kPacks>::kThreads) {
    throw std::logic_error("norm_fwd: more threads than the kernel may have");
  }
  int64_t blocks = (a.rows + rows - 1) / rows;
  if (candidate(Tuned::kNormFwd) == kStaying) {
    const int64_t resident = 1024 / (threads * rows) * multiprocessors();
    blocks = blocks < resident ? blocks : resident;
  }
  constexpr bool kMayBePlain = kVec > 1;  // single elements are too slow to be worth a kernel more
  const bool plain = kMayBePlain && a.n == int64_t{threads} * kColumns && plain_params<T, kCentered>(a);
  launch(
      plain ? norm_fwd_registers<T, kVec, kPacks, kCentered, kMayBePlain>
            : norm_fwd_registers<T, kVec, kPacks, kCentered, false>,
      dim3(grid_for(blocks)),
      dim3(threads, rows),
      stream,
      a,
      1.0f / static_cast<float>(a.n));
}

template <class T, int kVec, bool kCentered>
void launch_loop(const NormFwd& a, cudaStream_t stream) {
  const float inverse_n = 1.0f / static_cast<float>(a.n);
  launch(norm_fwd_loop<T, kVec, kCentered>, dim3(grid_for(a.rows)), dim3(kMaxThreads), stream, a, inverse_n);
}

template <class T, bool kCentered>
void launch_typed(const NormFwd& a, cudaStream_t stream) {
  constexpr int kVec = kFullVec<T>;
  const bool packs = a.n % kVec == 0 && a.x_stride % kVec == 0 && is_aligned<T, kVec>(a.x) &&
                     a.residual_stride % kVec == 0 && is_aligned<T, kVec>(a.residual) && is_aligned<T, kVec>(a.y) &&
                     is_aligned<T, kVec>(a.sum) && is_aligned<float, 4>(a.weight) && is_aligned<float, 4>(a.bias);
  if (!packs) {
    return a.n <= 8 * kMaxThreads ? launch_registers<T, 1, 8, kCentered>(a, stream)
                                  : launch_loop<T, 1, kCentered>(a, stream);
  }
  // Elements a thread: as few as let one warp hold the row, else 64 bytes, else 32. What a thread does once for a row
  // takes as many instructions as 16 elements; what fills its threads takes a fifth less.
  constexpr int kMost = 64 / sizeof(T), kHalfThreads = Bounds<T, kVec, 16 / kVec>::kThreads;
  const bool filled_by_half =
      a.n > kMost * kWarp && a.n <= 16 * kHalfThreads && a.n % (kMost * kWarp) != 0 && a.n % (16 * kWarp) == 0;
  if (a.n <= 8 * kWarp) {
    return launch_registers<T, kVec, 8 / kVec, kCentered>(a, stream);
  } else if (a.n <= 16 * kWarp || filled_by_half || (a.n <= 4096 && candidate(Tuned::kNormFwd) == kManyThreads)) {
    return launch_registers<T, kVec, 16 / kVec, kCentered>(a, stream);
  } else if (a.n <= kMost * kMaxThreads) {
    return launch_registers<T, kVec, kMost / kVec, kCentered>(a, stream);
  } else if (a.n <= 32 * kMaxThreads) {
    return launch_registers<T, kVec, 32 / kVec, kCentered>(a, stream);
  }
  return launch_loop<T, kVec, kCentered>(a, stream);
}

template <bool kCentered>
void launch_centered(const NormFwd& a, cudaStream_t stream) {
  switch (a.dtype) {
    case DType::kFloat:
      return launch_typed<float, kCentered>(a, stream);
    case DType::kBFloat16:
      return launch_typed<__nv_bfloat16, kCentered>(a, stream);
    case DType::kHalf:
      return launch_typed<__half, kCentered>(a, stream);
  }
}

}  // namespace

void launch_norm_fwd(const NormFwd& a, cudaStream_t stream) {
  a.centered ? launch_centered<true>(a, stream) : launch_centered<false>(a, stream);
}

}  // namespace fastllm
