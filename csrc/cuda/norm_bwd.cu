// Backward of LayerNorm and RMSNorm, with or without the gradient of the residual sum. Arithmetic: math/norm.h.
// Reference: fastllm/reference/_norm.py.
//
// One read of x and dy gives dx and the sums over rows: blocks stay, walk over the rows, and keep the dweight and dbias
// of their columns in registers, while the next rows are on their way into shared memory, where each thread reads what
// it asked for itself. Each block writes one row of partial sums, and a second kernel adds those in order and casts, so
// the result is the same bits every time. Rows too long for registers take two kernels that read from the cache: dx row
// by row, then the sums column by column.
#include "norm.h"

#include "../math/norm.h"
#include "candidates.h"
#include "device.cuh"

namespace fastllm {

namespace {

constexpr int kMaxThreads = 512;  // 128 registers a thread: the partial sums of 32 columns and the row's packs
constexpr int kColumnRows = 32;   // of the column kernels: threads along the rows
constexpr int kMaxParts = 256;    // of the column kernels: blocks along the rows

// The sums that a row's gradient needs: of g * xhat, and of g where it is centered.
template <bool kCentered>
constexpr int kSums = kCentered ? 2 : 1;

// `dsum`: where the pack of that gradient is, or null.
template <class T, int kVec, bool kCentered>
__device__ __forceinline__ void store_dx(
    const NormBwd& a,
    int64_t row,
    int64_t col,
    const Packed<T, kVec>& x,
    const Packed<T, kVec>& dy,
    const T* dsum,
    float mean,
    float rstd,
    const float (&means)[kSums<kCentered>]) {
  float weight[kVec], values[kVec];
  load_param<T>(weight, a.weight, a.weight_is_float, col, 1.0f);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float xhat = norm_xhat<kCentered>(x.get(i), mean, rstd);
    values[i] = norm_dx<kCentered>(dy.get(i) * weight[i], xhat, means[kSums<kCentered> - 1], means[0], rstd);
  }
  if (dsum != nullptr) {
    const auto packed = load_packed<T, kVec>(dsum);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      values[i] += packed.get(i);
    }
  }
  Packed<T, kVec> dx;
  dx.set(values);
  store_packed<T, kVec>(static_cast<T*>(a.dx) + row * a.n + col, dx);
}

// Adds a pack's part to the row's sums. use(i, dy, xhat) is called for each element.
template <class T, int kVec, bool kCentered, class Use>
__device__ __forceinline__ void add_row_sums(
    float (&sums)[kSums<kCentered>],
    const NormBwd& a,
    int64_t col,
    const Packed<T, kVec>& x,
    const Packed<T, kVec>& dy,
    float mean,
    float rstd,
    Use use) {
  float weight[kVec];
  load_param<T>(weight, a.weight, a.weight_is_float, col, 1.0f);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float xhat = norm_xhat<kCentered>(x.get(i), mean, rstd), g = dy.get(i) * weight[i];
    sums[0] += g * xhat;
    if constexpr (kCentered) {
      sums[1] += g;
    }
    use(i, dy.get(i), xhat);
  }
}

// Where a thread of so many columns is in its block. A row is the threads' of one threadIdx.y; one of 32 columns a
// thread is the whole block's, which has all its threads then: what is constant needs no registers.
template <int kColumns>
struct Place {
  static constexpr bool kOneRow = kColumns > 16;
  using Row = std::conditional_t<kOneRow, int, int64_t>;  // no memory holds 2^31 rows of more than 8,192 elements
  static __device__ __forceinline__ int row() {
    return kOneRow ? 0 : threadIdx.y;
  }
  static __device__ __forceinline__ int rows() {
    return kOneRow ? 1 : blockDim.y;
  }
  static __device__ __forceinline__ int row_threads() {
    return kOneRow ? kMaxThreads : blockDim.x;
  }
  static __device__ __forceinline__ int thread() {
    return row() * row_threads() + threadIdx.x;
  }
};

// A block's rows on their way: for each thread its packs of x, dy and dsum, in shared memory that it shares with none.
// Of x and dy there is room for the next two rows, or for one where that is as much memory as some chips have.
template <class T, int kVec, int kPacks>
struct Staged {
  static constexpr int kAhead = sizeof(T) * kVec * kPacks <= 32 ? 2 : 1;
  static constexpr int kX = 0, kDy = kAhead, kDsum = 2 * kAhead;  // and which of the rows
  static constexpr int kBytes = (kDsum + 1) * kPacks * kMaxThreads * sizeof(Packed<T, kVec>);
  static_assert(kBytes <= 96 << 10);
  Packed<T, kVec>* packs = static_cast<Packed<T, kVec>*>(shared_bytes());

  __device__ __forceinline__ Packed<T, kVec>* at(int which, int p) const {
    return packs + (which * kPacks + p) * kMaxThreads + Place<kVec * kPacks>::thread();
  }

  // Asks for a row's packs from `col` on, `step` elements apart.
  template <bool kWhole>
  __device__ __forceinline__ void fetch(int which, const T* row, int col, int step, int n) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (kWhole || col + p * step < n) {
        copy_async(at(which, p), reinterpret_cast<const Packed<T, kVec>*>(row + col + p * step));
      }
    }
  }
};

// Adds the sums of the block's other rows, in order, to those of the first. `shared`: floats for every thread's
// columns.
template <int kColumns>
__device__ __forceinline__ void sum_rows(float (&values)[kColumns], float* shared) {
  using Here = Place<kColumns>;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    shared[i * kMaxThreads + Here::thread()] = values[i];
  }
  __syncthreads();
  if (Here::row() == 0) {
#pragma unroll 1
    for (int row = 1; row < Here::rows(); ++row) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        values[i] += shared[i * kMaxThreads + row * Here::row_threads() + threadIdx.x];
      }
    }
  }
}

template <int kVec, int kColumns>
__device__ __forceinline__ void store_parts(float* parts, int n, const float (&values)[kColumns]) {
  using Here = Place<kColumns>;
  if (parts == nullptr || Here::row() > 0) {
    return;
  }
  constexpr int kStep = kVec < kFullVec<float> ? kVec : kFullVec<float>;
#pragma unroll
  for (int i = 0; i < kColumns; i += kStep) {
    const int col = (i / kVec * Here::row_threads() + threadIdx.x) * kVec + i % kVec;
    if (col < n) {
      float own[kStep];
#pragma unroll
      for (int j = 0; j < kStep; ++j) {
        own[j] = values[i + j];
      }
      Packed<float, kStep> packed;
      packed.set(own);
      store_packed<float, kStep>(parts + static_cast<int64_t>(blockIdx.x) * n + col, packed);
    }
  }
}

// kPlain: all packs of a thread are of its row, and there is a weight of type T.
template <class T, int kVec, int kPacks, bool kCentered, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads, 1)
    norm_bwd_registers(NormBwd a, float inverse_n, float* dweight, float* dbias) {
  if constexpr (kPlain) {
    __builtin_assume(a.weight != nullptr);
    __builtin_assume(a.weight_is_float == (sizeof(T) == 4));
  }
  constexpr int kColumns = kVec * kPacks;
  using Here = Place<kColumns>;
  using Row = typename Here::Row;
  using Rows = Staged<T, kVec, kPacks>;
  static_assert(Rows::kBytes >= sizeof(float[kColumns][kMaxThreads]));  // for sum_rows
  __shared__ float scratch[2][kSums<kCentered>][kMaxWarps];
  const Rows staged;
  const int n = static_cast<int>(a.n), col = threadIdx.x * kVec, step = Here::row_threads() * kVec;
  const Row rows = static_cast<Row>(a.rows);
  const Row rows_apart = static_cast<Row>(gridDim.x) * Here::rows();
  // Of each warp's next row, for which its first lane asks: registers are short.
  __shared__ float statistics[kMaxThreads / kWarp][Rows::kAhead][2];
  float (*const own)[2] = statistics[Here::thread() / kWarp];
  const auto fetch_inputs = [&](Row row, int which) {
    if (row < rows) {
      staged.template fetch<kPlain>(
          Rows::kX + which, static_cast<const T*>(a.x) + static_cast<int64_t>(row) * a.x_stride, col, step, n);
      staged.template fetch<kPlain>(
          Rows::kDy + which, static_cast<const T*>(a.dy) + static_cast<int64_t>(row) * a.dy_stride, col, step, n);
      if (threadIdx.x % kWarp == 0) {
        if constexpr (kCentered) {
          copy_async(&own[which][0], a.mean + row);
        }
        copy_async(&own[which][1], a.rstd + row);
      }
    }
    end_group_of_copies();
  };
  const auto fetch_dsum = [&](Row row) {
    if (a.dsum != nullptr && row < rows) {
      staged.template fetch<kPlain>(
          Rows::kDsum, static_cast<const T*>(a.dsum) + static_cast<int64_t>(row) * a.dsum_stride, col, step, n);
    }
    end_group_of_copies();
  };

  float dw[kColumns] = {};
  float db[kCentered ? kColumns : 1] = {};
  int parity = 0;  // of the rows so far
  const Row first = static_cast<Row>(blockIdx.x) * Here::rows();
#pragma unroll
  for (int i = 0; i < Rows::kAhead; ++i) {
    fetch_inputs(first + i * rows_apart + Here::row(), i);
  }
  fetch_dsum(first + Here::row());
  // As often for all threads of a block, which meet in row_sum: the last rows of some may not exist.
  for (Row block = first; block < rows; block += rows_apart) {
    const Row row = block + Here::row();
    const bool exists = Here::kOneRow || row < rows;
    const int end = exists ? n : 0;  // of the columns
    const auto inside = [&](int p) { return kPlain ? exists : col + p * step < end; };
    const int which = Rows::kAhead == 2 ? parity : 0;
    wait_for_copies<Rows::kAhead>();  // of x, dy and the statistics
    __syncwarp();
    Packed<T, kVec> x[kPacks], dy[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (inside(p)) {
        x[p] = *staged.at(Rows::kX + which, p);
        dy[p] = *staged.at(Rows::kDy + which, p);
      }
    }
    const float mean = kCentered ? own[which][0] : 0.0f, rstd = own[which][1];
    __syncwarp();
    fetch_inputs(row + Rows::kAhead * rows_apart, which);
    float sums[kSums<kCentered>] = {};
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (inside(p)) {
        const auto add_columns = [&](int i, float dy, float xhat) {
          dw[p * kVec + i] += dy * xhat;
          if constexpr (kCentered) {
            db[p * kVec + i] += dy;
          }
        };
        add_row_sums<T, kVec, kCentered>(sums, a, col + p * step, x[p], dy[p], mean, rstd, add_columns);
      }
    }
    row_sum(sums, scratch[Here::kOneRow ? 0 : parity]);
    if constexpr (Here::kOneRow) {  // a barrier more, for want of a register
      __syncthreads();
    }
    parity ^= 1;
#pragma unroll
    for (int i = 0; i < kSums<kCentered>; ++i) {
      sums[i] *= inverse_n;
    }
    if (a.dsum != nullptr) {
      wait_for_copies<1>();
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (inside(p)) {
        const T* const dsum = a.dsum == nullptr ? nullptr : reinterpret_cast<const T*>(staged.at(Rows::kDsum, p));
        store_dx<T, kVec, kCentered>(a, row, col + p * step, x[p], dy[p], dsum, mean, rstd, sums);
      }
    }
    fetch_dsum(row + rows_apart);
  }
  if (!Here::kOneRow && Here::rows() > 1) {
    wait_for_copies<0>();
    float* const shared = static_cast<float*>(shared_bytes());
    sum_rows(dw, shared);
    if constexpr (kCentered) {
      sum_rows(db, shared);
    }
  }
  store_parts<kVec>(dweight, n, dw);
  if constexpr (kCentered) {
    store_parts<kVec>(dbias, n, db);
  }
}

template <class T, int kVec, bool kCentered>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_bwd_loop(NormBwd a, float inverse_n) {
  __shared__ float scratch[2][kSums<kCentered>][kMaxWarps];
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kVec, step = static_cast<int64_t>(blockDim.x) * kVec;
  int parity = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    const float mean = kCentered ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    float sums[kSums<kCentered>] = {};
    for (int64_t col = first; col < a.n; col += step) {
      const auto x_pack = load_packed<T, kVec>(x + col);
      const auto dy_pack = load_packed<T, kVec>(dy + col);
      add_row_sums<T, kVec, kCentered>(sums, a, col, x_pack, dy_pack, mean, rstd, [](int, float, float) {});
    }
    row_sum(sums, scratch[parity]);
    parity ^= 1;
#pragma unroll
    for (int i = 0; i < kSums<kCentered>; ++i) {
      sums[i] *= inverse_n;
    }
    const T* dsum = static_cast<const T*>(a.dsum) + row * a.dsum_stride;
    for (int64_t col = first; col < a.n; col += step) {
      const auto x_pack = load_packed<T, kVec>(x + col);
      const auto dy_pack = load_packed<T, kVec>(dy + col);
      store_dx<T, kVec, kCentered>(
          a, row, col, x_pack, dy_pack, a.dsum == nullptr ? nullptr : dsum + col, mean, rstd, sums);
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

int64_t at_most(int64_t value, int64_t limit) {
  return value < limit ? value : limit;
}

// What runs for these arguments. One description serves the launch and the count of partial sums.
struct Plan {
  void (*registers)(NormBwd, float, float*, float*);  // null: the loop and column kernels
  int (*registers_blocks)(int threads);               // how many of its blocks a multiprocessor holds
  int bytes;                                          // of shared memory that its blocks get
  void (*loop)(NormBwd, float);
  void (*columns)(NormBwd, float*, float*);
  dim3 block;
};

template <class T, int kVec, int kPacks, bool kCentered, bool kPlain>
Plan plan_threads(const NormBwd& a, int threads) {
  constexpr auto kKernel = norm_bwd_registers<T, kVec, kPacks, kCentered, kPlain>;
  constexpr int kBytes = Staged<T, kVec, kPacks>::kBytes;
  // As many rows as a block has the threads for, so that there are few rows of partial sums; but work for all.
  const int most = kNormBwdThreads[candidate(Tuned::kNormBwd)];
  const int64_t rows = at_most(a.rows / multiprocessors(), most / threads);
  return {
      kKernel,
      blocks_per_multiprocessor<kKernel, kBytes>,
      kBytes,
      nullptr,
      nullptr,
      dim3(threads, rows < 1 ? 1 : rows)};
}

template <class T, int kVec, int kPacks, bool kCentered>
Plan plan_registers(const NormBwd& a) {
  constexpr int64_t kColumns = kVec * kPacks;
  const int threads = Place<kColumns>::kOneRow ? kMaxThreads : warps_for(ceil_div(a.n, kColumns));
  if constexpr (kVec > 1 && !Place<kColumns>::kOneRow) {  // of 32 columns a thread it spills
    if (a.n == threads * kColumns && a.weight != nullptr && a.weight_is_float == (sizeof(T) == 4)) {
      return plan_threads<T, kVec, kPacks, kCentered, true>(a, threads);
    }
  }
  return plan_threads<T, kVec, kPacks, kCentered, false>(a, threads);
}

template <class T, bool kCentered>
Plan plan_typed(const NormBwd& a) {
  constexpr int kVec = kFullVec<T>;
  const bool packs = a.n % kVec == 0 && a.x_stride % kVec == 0 && a.dy_stride % kVec == 0 &&
                     a.dsum_stride % kVec == 0 && is_aligned<T, kVec>(a.x) && is_aligned<T, kVec>(a.dy) &&
                     is_aligned<T, kVec>(a.dsum) && is_aligned<T, kVec>(a.dx) && is_aligned<float, 4>(a.weight);
  // Elements a thread: 8 where one warp holds the row, else 16; 32 where 16 bits each leave the registers for it.
  if (!packs && a.n <= 8 * kMaxThreads) {
    return plan_registers<T, 1, 8, kCentered>(a);
  } else if (packs && a.n <= 8 * kWarp) {
    return plan_registers<T, kVec, 8 / kVec, kCentered>(a);
  } else if (packs && a.n <= 16 * kMaxThreads) {
    return plan_registers<T, kVec, 16 / kVec, kCentered>(a);
  }
  if constexpr (sizeof(T) == 2) {
    if (packs && a.n <= 32 * kMaxThreads) {
      return plan_registers<T, kVec, 32 / kVec, kCentered>(a);
    }
  }
  return {
      nullptr,
      nullptr,
      0,
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
  const float inverse_n = 1.0f / static_cast<float>(a.n);
  if (plan.registers != nullptr) {
    launch_shared(
        plan.registers,
        dim3(parts),
        plan.block,
        plan.bytes,
        stream,
        a,
        inverse_n,
        grads.dweight_parts,
        grads.dbias_parts);
  } else {
    launch(plan.loop, dim3(at_most(a.rows, int64_t{1} << 30)), plan.block, stream, a, inverse_n);
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
