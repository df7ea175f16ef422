// Backward of LayerNorm and RMSNorm, with or without the gradient of the residual sum. Arithmetic: math/norm.h.
// Reference: fastllm/reference/_norm.py.
//
// One read of x and dy gives dx and the sums over rows: blocks stay, walk over the rows, and keep the dweight and dbias
// of their columns in registers. Each block writes one row of partial sums, and a second kernel adds those in order and
// casts, so the result is the same bits every time. Rows too long for registers take two kernels that read from the
// cache: dx row by row, then the sums column by column.
#include "norm.h"

#include "../math/norm.h"
#include "device.cuh"

namespace fastllm {

namespace {

constexpr int kMaxThreads = 512;  // 128 registers a thread: the partial sums of 32 columns and the row's packs
constexpr int kRowsPerBlock = 8;  // where a row is one warp's
constexpr int kColumnRows = 32;   // of the column kernels: threads along the rows
constexpr int kMaxParts = 256;    // of the column kernels: blocks along the rows

template <class T, int kVec, bool kCentered>
__device__ __forceinline__ void store_dx(
    const NormBwd& a,
    int64_t row,
    int64_t col,
    const Packed<T, kVec>& x,
    const Packed<T, kVec>& dy,
    float mean,
    float rstd,
    float mean_g,
    float mean_gx) {
  float weight[kVec];
  load_param<T>(weight, a.weight, a.weight_is_float, col, 1.0f);
  Packed<T, kVec> dsum, dx;
  if (a.dsum != nullptr) {
    dsum = load_packed<T, kVec>(static_cast<const T*>(a.dsum) + row * a.dsum_stride + col);
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float xhat = norm_xhat<kCentered>(x.get(i), mean, rstd);
    float value = norm_dx<kCentered>(dy.get(i) * weight[i], xhat, mean_g, mean_gx, rstd);
    if (a.dsum != nullptr) {
      value += dsum.get(i);
    }
    dx.set(i, value);
  }
  store_packed<T, kVec>(static_cast<T*>(a.dx) + row * a.n + col, dx);
}

// Adds a pack's part to the row's sums of g and g * xhat.
template <class T, int kVec, bool kCentered>
__device__ __forceinline__ void add_row_sums(
    float (&sums)[2],
    const NormBwd& a,
    int64_t col,
    const Packed<T, kVec>& x,
    const Packed<T, kVec>& dy,
    float mean,
    float rstd) {
  float weight[kVec];
  load_param<T>(weight, a.weight, a.weight_is_float, col, 1.0f);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float g = dy.get(i) * weight[i];
    sums[0] += g;
    sums[1] += g * norm_xhat<kCentered>(x.get(i), mean, rstd);
  }
}

// Adds the warps' sums, in order, into those of warp 0.
template <int kColumns>
__device__ __forceinline__ void sum_warps(float (&values)[kColumns], float (*shared)[kWarp * kColumns]) {
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    shared[threadIdx.y][i * kWarp + threadIdx.x] = values[i];
  }
  __syncthreads();
  if (threadIdx.y == 0) {
#pragma unroll 1
    for (int warp = 1; warp < kRowsPerBlock; ++warp) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        values[i] += shared[warp][i * kWarp + threadIdx.x];
      }
    }
  }
}

template <int kVec, int kColumns>
__device__ __forceinline__ void store_parts(float* parts, int64_t n, const float (&values)[kColumns]) {
  if (parts == nullptr || threadIdx.y > 0) {
    return;
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int64_t col = (static_cast<int64_t>(i / kVec) * blockDim.x + threadIdx.x) * kVec + i % kVec;
    if (col < n) {
      parts[blockIdx.x * n + col] = values[i];
    }
  }
}

// kWarpRows: a row is one warp's, kRowsPerBlock of them a block; else it is a block's.
template <class T, int kVec, int kPacks, bool kCentered, bool kWarpRows>
__global__ void __launch_bounds__(kWarpRows ? kWarp * kRowsPerBlock : kMaxThreads, 1)
    norm_bwd_registers(NormBwd a, float* dweight, float* dbias) {
  constexpr int kColumns = kVec * kPacks;
  const int n = static_cast<int>(a.n);
  float dw[kColumns] = {};
  float db[kCentered ? kColumns : 1] = {};
  int parity = 0;
  const int64_t first = kWarpRows ? static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y : blockIdx.x;
  const int64_t step = kWarpRows ? static_cast<int64_t>(gridDim.x) * kRowsPerBlock : gridDim.x;
  for (int64_t row = first; row < a.rows; row += step) {
    const T* x_row = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* dy_row = static_cast<const T*>(a.dy) + row * a.dy_stride;
    Packed<T, kVec> x[kPacks], dy[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int col = (p * blockDim.x + threadIdx.x) * kVec;
      if (col < n) {
        x[p] = load_packed<T, kVec>(x_row + col);
        dy[p] = load_packed<T, kVec>(dy_row + col);
      }
    }
    const float mean = kCentered ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    float sums[2] = {};
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int col = (p * blockDim.x + threadIdx.x) * kVec;
      if (col < n) {
        add_row_sums<T, kVec, kCentered>(sums, a, col, x[p], dy[p], mean, rstd);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          dw[p * kVec + i] += dy[p].get(i) * norm_xhat<kCentered>(x[p].get(i), mean, rstd);
          if constexpr (kCentered) {
            db[p * kVec + i] += dy[p].get(i);
          }
        }
      }
    }
    if constexpr (kWarpRows) {
      sums[0] = warp_sum(sums[0]);
      sums[1] = warp_sum(sums[1]);
    } else {
      __shared__ float scratch[2][2][kMaxWarps];
      row_sum(sums, scratch[parity]);
      parity ^= 1;
    }
    sums[0] /= static_cast<float>(n);
    sums[1] /= static_cast<float>(n);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int col = (p * blockDim.x + threadIdx.x) * kVec;
      if (col < n) {
        store_dx<T, kVec, kCentered>(a, row, col, x[p], dy[p], mean, rstd, sums[0], sums[1]);
      }
    }
  }
  if constexpr (kWarpRows) {
    __shared__ float shared[kRowsPerBlock][kWarp * kColumns];
    sum_warps(dw, shared);
    if constexpr (kCentered) {
      sum_warps(db, shared);
    }
  }
  store_parts<kVec>(dweight, a.n, dw);
  if constexpr (kCentered) {
    store_parts<kVec>(dbias, a.n, db);
  }
}

template <class T, int kVec, bool kCentered>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_bwd_loop(NormBwd a) {
  __shared__ float scratch[2][2][kMaxWarps];
  const float n = static_cast<float>(a.n);
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kVec, step = static_cast<int64_t>(blockDim.x) * kVec;
  int parity = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    const float mean = kCentered ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    float sums[2] = {};
    for (int64_t col = first; col < a.n; col += step) {
      const auto x_pack = load_packed<T, kVec>(x + col);
      const auto dy_pack = load_packed<T, kVec>(dy + col);
      add_row_sums<T, kVec, kCentered>(sums, a, col, x_pack, dy_pack, mean, rstd);
    }
    row_sum(sums, scratch[parity]);
    parity ^= 1;
    for (int64_t col = first; col < a.n; col += step) {
      const auto x_pack = load_packed<T, kVec>(x + col);
      const auto dy_pack = load_packed<T, kVec>(dy + col);
      store_dx<T, kVec, kCentered>(a, row, col, x_pack, dy_pack, mean, rstd, sums[0] / n, sums[1] / n);
    }
  }
}

// Adds up to two values over threadIdx.y, in order; the result is right where threadIdx.y == 0.
__device__ __forceinline__ void column_sum(float& a, float& b, float (*shared)[kColumnRows][kWarp]) {
  shared[0][threadIdx.y][threadIdx.x] = a;
  shared[1][threadIdx.y][threadIdx.x] = b;
  __syncthreads();
  if (threadIdx.y == 0) {
    for (int i = 1; i < kColumnRows; ++i) {
      a += shared[0][i][threadIdx.x];
      b += shared[1][i][threadIdx.x];
    }
  }
}

// dweight and dbias of 32 columns over a share of the rows; blockIdx.y is the share.
template <class T, bool kCentered>
__global__ void __launch_bounds__(kWarp* kColumnRows) norm_bwd_columns(NormBwd a, float* dweight, float* dbias) {
  __shared__ float shared[2][kColumnRows][kWarp];
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  float dw = 0.0f, db = 0.0f;
  if (col < a.n) {
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * kColumnRows + threadIdx.y; row < a.rows;
         row += static_cast<int64_t>(gridDim.y) * kColumnRows) {
      const float x = to_float(static_cast<const T*>(a.x)[row * a.x_stride + col]);
      const float dy = to_float(static_cast<const T*>(a.dy)[row * a.dy_stride + col]);
      dw += dy * norm_xhat<kCentered>(x, kCentered ? a.mean[row] : 0.0f, a.rstd[row]);
      db += dy;
    }
  }
  column_sum(dw, db, shared);
  if (threadIdx.y == 0 && col < a.n) {
    if (dweight != nullptr) {
      dweight[blockIdx.y * a.n + col] = dw;
    }
    if (dbias != nullptr) {
      dbias[blockIdx.y * a.n + col] = db;
    }
  }
}

__device__ __forceinline__ void store_as(void* out, DType dtype, int64_t i, float value) {
  switch (dtype) {
    case DType::kFloat:
      static_cast<float*>(out)[i] = value;
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(out)[i] = from_float<__nv_bfloat16>(value);
      break;
    case DType::kHalf:
      static_cast<__half*>(out)[i] = from_float<__half>(value);
      break;
  }
}

// Second stage: adds the rows of partial sums, 32 columns a block, and casts.
__global__ void __launch_bounds__(kWarp* kColumnRows) norm_bwd_reduce(NormParamGrads grads, int64_t parts, int64_t n) {
  __shared__ float shared[2][kColumnRows][kWarp];
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  float dw = 0.0f, db = 0.0f;
  if (col < n) {
    for (int64_t part = threadIdx.y; part < parts; part += kColumnRows) {
      dw += grads.dweight_parts != nullptr ? grads.dweight_parts[part * n + col] : 0.0f;
      db += grads.dbias_parts != nullptr ? grads.dbias_parts[part * n + col] : 0.0f;
    }
  }
  column_sum(dw, db, shared);
  if (threadIdx.y == 0 && col < n) {
    if (grads.dweight_parts != nullptr) {
      store_as(grads.dweight, grads.dweight_dtype, col, dw);
    }
    if (grads.dbias_parts != nullptr) {
      store_as(grads.dbias, grads.dbias_dtype, col, db);
    }
  }
}

// What runs for these arguments. One description serves the launch and the count of partial sums.
struct Plan {
  void (*registers)(NormBwd, float*, float*);  // null: the loop and column kernels
  int (*registers_blocks)(int threads);        // how many of its blocks a multiprocessor holds
  void (*loop)(NormBwd);
  void (*columns)(NormBwd, float*, float*);
  dim3 block;
};

template <class T, int kVec, int kPacks, bool kCentered>
Plan plan_warp_rows() {
  constexpr auto kKernel = norm_bwd_registers<T, kVec, kPacks, kCentered, true>;
  return {kKernel, blocks_per_multiprocessor<kKernel>, nullptr, nullptr, dim3(kWarp, kRowsPerBlock)};
}

template <class T, int kVec, int kPacks, bool kCentered>
Plan plan_block_rows(const NormBwd& a) {
  const int threads = warps_for(ceil_div(a.n, static_cast<int64_t>(kVec) * kPacks));
  constexpr auto kKernel = norm_bwd_registers<T, kVec, kPacks, kCentered, false>;
  return {kKernel, blocks_per_multiprocessor<kKernel>, nullptr, nullptr, dim3(threads)};
}

template <class T, bool kCentered>
Plan plan_typed(const NormBwd& a) {
  constexpr int kVec = kFullVec<T>;
  const bool packs = a.n % kVec == 0 && a.x_stride % kVec == 0 && a.dy_stride % kVec == 0 &&
                     a.dsum_stride % kVec == 0 && is_aligned<T, kVec>(a.x) && is_aligned<T, kVec>(a.dy) &&
                     is_aligned<T, kVec>(a.dsum) && is_aligned<T, kVec>(a.dx) && is_aligned<float, 4>(a.weight);
  // Elements a thread: as few as let one warp hold the row, else 16; 32 where 16 bits each leave the registers for it.
  if (!packs && a.n <= 8 * kWarp) {
    return plan_warp_rows<T, 1, 8, kCentered>();
  } else if (!packs && a.n <= 4 * kMaxThreads) {
    return plan_block_rows<T, 1, 4, kCentered>(a);
  } else if (packs && a.n <= 8 * kWarp) {
    return plan_warp_rows<T, kVec, 8 / kVec, kCentered>();
  } else if (packs && a.n <= 16 * kWarp) {
    return plan_warp_rows<T, kVec, 16 / kVec, kCentered>();
  } else if (packs && sizeof(T) == 2 && a.n <= 32 * kWarp) {
    return plan_warp_rows<T, kVec, 32 / kVec, kCentered>();
  } else if (packs && a.n <= 16 * kMaxThreads) {
    return plan_block_rows<T, kVec, 16 / kVec, kCentered>(a);
  }
  if constexpr (sizeof(T) == 2) {
    if (packs && a.n <= 32 * kMaxThreads) {
      return plan_block_rows<T, kVec, 32 / kVec, kCentered>(a);
    }
  }
  return {
      nullptr,
      nullptr,
      packs ? norm_bwd_loop<T, kVec, kCentered> : norm_bwd_loop<T, 1, kCentered>,
      norm_bwd_columns<T, kCentered>,
      dim3(kMaxThreads)};
}

template <bool kCentered>
Plan plan_centered(const NormBwd& a) {
  switch (a.dtype) {
    case DType::kFloat:
      return plan_typed<float, kCentered>(a);
    case DType::kBFloat16:
      return plan_typed<__nv_bfloat16, kCentered>(a);
    default:
      return plan_typed<__half, kCentered>(a);
  }
}

Plan make_plan(const NormBwd& a) {
  return a.centered ? plan_centered<true>(a) : plan_centered<false>(a);
}

int64_t at_most(int64_t value, int64_t limit) {
  return value < limit ? value : limit;
}

}  // namespace

int64_t norm_bwd_parts(const NormBwd& a) {
  const Plan plan = make_plan(a);
  if (plan.registers == nullptr) {
    return at_most(ceil_div(a.rows, kColumnRows), kMaxParts);
  }
  const int resident = plan.registers_blocks(plan.block.x * plan.block.y) * multiprocessors();
  return at_most(ceil_div(a.rows, plan.block.y), resident);
}

void launch_norm_bwd(const NormBwd& a, const NormParamGrads& grads, int64_t parts, cudaStream_t stream) {
  const Plan plan = make_plan(a);
  const bool any = grads.dweight_parts != nullptr || grads.dbias_parts != nullptr;
  const dim3 column_block(kWarp, kColumnRows);
  if (plan.registers != nullptr) {
    launch(plan.registers, dim3(parts), plan.block, stream, a, grads.dweight_parts, grads.dbias_parts);
  } else {
    launch(plan.loop, dim3(at_most(a.rows, int64_t{1} << 30)), plan.block, stream, a);
    if (any) {
      const dim3 grid(ceil_div(a.n, kWarp), parts);
      launch(plan.columns, grid, column_block, stream, a, grads.dweight_parts, grads.dbias_parts);
    }
  }
  if (any) {
    launch(norm_bwd_reduce, dim3(ceil_div(a.n, kWarp)), column_block, stream, grads, parts, a.n);
  }
}

}  // namespace fastllm
