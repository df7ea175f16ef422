// Forward of LayerNorm and RMSNorm, with or without a residual addition before it. Arithmetic: math/norm.h. Reference:
// fastllm/reference/_norm.py.
//
// A row belongs to one warp (up to 1024 elements) or to one block. Its elements stay in registers between the passes,
// so that x is read once; rows too long for that (over 16,384 elements, or ragged ones over 4,096) are read again from
// the cache. Bytes that must move: x (and residual) once in, y (and sum) once out.
#include "norm.h"

#include "../math/norm.h"
#include "device.cuh"

namespace fastllm {

namespace {

constexpr int kMaxThreads = 512;
constexpr int kRowsPerBlock = 4;  // where a row is one warp's

// A pack of x, with the residual added, rounded and stored as the sum.
template <class T, int kVec>
__device__ __forceinline__ Packed<T, kVec> load_input(const NormFwd& a, int64_t row, int64_t col) {
  const auto x = load_packed<T, kVec>(static_cast<const T*>(a.x) + row * a.x_stride + col);
  if (a.residual == nullptr) {
    return x;
  }
  const auto residual = load_packed<T, kVec>(static_cast<const T*>(a.residual) + row * a.residual_stride + col);
  Packed<T, kVec> sum;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    sum.set(i, x.get(i) + residual.get(i));
  }
  store_packed<T, kVec>(static_cast<T*>(a.sum) + row * a.n + col, sum);
  return sum;
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
  Packed<T, kVec> y;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    y.set(i, norm_xhat<kCentered>(x.get(i), mean, rstd) * weight[i] + bias[i]);
  }
  store_packed<T, kVec>(static_cast<T*>(a.y) + row * a.n + col, y);
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

// Rows in registers: kPacks packs of kVec elements a thread.
template <class T, int kVec, int kPacks, bool kCentered>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_fwd_registers(NormFwd a) {
  __shared__ float scratch[2][1][kMaxWarps];
  const float n = static_cast<float>(a.n);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < a.rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    Packed<T, kVec> x[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int64_t col = (static_cast<int64_t>(p) * blockDim.x + threadIdx.x) * kVec;
      if (col < a.n) {
        x[p] = load_input<T, kVec>(a, row, col);
      }
    }
    float mean = 0.0f;
    if constexpr (kCentered) {
      const float first = load_first<T>(a, row);
      float total[1] = {};
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        if ((static_cast<int64_t>(p) * blockDim.x + threadIdx.x) * kVec < a.n) {
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            total[0] += x[p].get(i) - first;
          }
        }
      }
      row_sum(total, scratch[0]);
      mean = first + total[0] / n;
    }
    float squares[1] = {};
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if ((static_cast<int64_t>(p) * blockDim.x + threadIdx.x) * kVec < a.n) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const float d = norm_center<kCentered>(x[p].get(i), mean);
          squares[0] += d * d;
        }
      }
    }
    row_sum(squares, scratch[1]);
    const float rstd = norm_rstd(squares[0], n, a.eps);
    store_statistics<kCentered>(a, row, mean, rstd);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int64_t col = (static_cast<int64_t>(p) * blockDim.x + threadIdx.x) * kVec;
      if (col < a.n) {
        store_output<T, kVec, kCentered>(a, row, col, x[p], mean, rstd);
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
__global__ void __launch_bounds__(kMaxThreads, 1) norm_fwd_loop(NormFwd a) {
  __shared__ float scratch[2][1][kMaxWarps];
  const float n = static_cast<float>(a.n);
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
        const auto packed = load_input<T, kVec>(a, row, col);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          total[0] += packed.get(i) - origin;
        }
      }
      if constexpr (kCentered) {
        row_sum(total, scratch[0]);
        mean = origin + total[0] / n;
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
    const float rstd = norm_rstd(squares[0], n, a.eps);
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
  const int threads = warps_for(ceil_div(a.n, static_cast<int64_t>(kVec) * kPacks));
  const int rows = threads == kWarp ? kRowsPerBlock : 1;
  launch(
      norm_fwd_registers<T, kVec, kPacks, kCentered>,
      dim3(grid_for((a.rows + rows - 1) / rows)),
      dim3(threads, rows),
      stream,
      a);
}

template <class T, int kVec, bool kCentered>
void launch_loop(const NormFwd& a, cudaStream_t stream) {
  launch(norm_fwd_loop<T, kVec, kCentered>, dim3(grid_for(a.rows)), dim3(kMaxThreads), stream, a);
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
  // Elements a thread: as few as let one warp hold the row, else 16, else 32.
  if (a.n <= 8 * kWarp) {
    return launch_registers<T, kVec, 8 / kVec, kCentered>(a, stream);
  } else if (a.n <= 16 * kWarp || (a.n > 32 * kWarp && a.n <= 4096)) {
    return launch_registers<T, kVec, 16 / kVec, kCentered>(a, stream);
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
