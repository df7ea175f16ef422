// The norm of all gradients, which clipping needs: partial sums of squares, then the root of their sum. Each sum has
// one order, so the result is the same at every run.
#include "adamw.cuh"

namespace fastllm {

namespace {

constexpr int kSteps = 4;
constexpr int64_t kChunk = kSteps * kStride;

struct NormEntry {
  const void* grad;
  int64_t numel;
  int32_t first_chunk;
  int16_t dtype;
  int16_t aligned;
};

struct NormHeader {
  float* parts;
  int32_t count;
};

constexpr int kNormEntries = (kAdamwArgumentBytes - sizeof(NormHeader)) / sizeof(NormEntry);

struct Norm {
  NormHeader header;
  NormEntry entries[kNormEntries];
};
static_assert(sizeof(Norm) <= kAdamwArgumentBytes);

// Of a thread's elements of a chunk, all of which are loaded before the first is used.
template <class T>
__device__ __forceinline__ float square_sum(const NormEntry& e, int64_t chunk) {
  const int64_t first = chunk * kChunk + threadIdx.x / kWarp * kAdamwBlock + threadIdx.x % kWarp * kPack;
  const T* grad = static_cast<const T*>(e.grad) + first;
  Raw<T> raw[kSteps];
  if (e.aligned != 0 && (chunk + 1) * kChunk <= e.numel) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      raw[step].load(grad + step * kStride, true, 0);
    }
  } else {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      raw[step].load(grad + step * kStride, false, e.numel - first - step * kStride);
    }
  }
  float sum = 0.0f;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    float x[kVec];
    raw[step].get(x);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      sum = Ops::fma(x[i], x[i], sum);
    }
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) adamw_norm_kernel(const __grid_constant__ Norm norm) {
  __shared__ float scratch[1][kMaxWarps];
  const int32_t chunk = blockIdx.x;
  const NormEntry& e = norm.entries[find_entry(norm.entries, norm.header.count, chunk)];
  const int64_t own = chunk - e.first_chunk;
  float sum[1];
  switch (static_cast<DType>(e.dtype)) {
    case DType::kFloat:
      sum[0] = square_sum<float>(e, own);
      break;
    case DType::kBFloat16:
      sum[0] = square_sum<__nv_bfloat16>(e, own);
      break;
    default:
      sum[0] = square_sum<__half>(e, own);
  }
  row_sum(sum, scratch);
  if (threadIdx.x == 0) {
    norm.header.parts[chunk] = sum[0];
  }
}

// One block, in a fixed order and in double.
__global__ void __launch_bounds__(1024) adamw_root_kernel(const float* parts, int64_t count, float* norm) {
  __shared__ double sums[1024];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += 1024) {
    sum += parts[i];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = 512; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    *norm = static_cast<float>(sqrt(sums[0]));
  }
}

int64_t chunks(int64_t numel) {
  return (numel + kChunk - 1) / kChunk;
}

}  // namespace

int64_t adamw_norm_parts(const AdamwTensor* tensors, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    total += chunks(tensors[i].numel);
  }
  return total;
}

void launch_adamw_norm(
    const AdamwTensor* tensors, int64_t count, float* parts, int64_t part_count, float* norm, cudaStream_t stream) {
  Norm args;
  args.header = {parts, 0};
  int64_t total = 0;
  const auto flush = [&] {
    if (total > 0) {
      launch(adamw_norm_kernel, dim3(static_cast<unsigned>(total)), dim3(kThreads), stream, args);
    }
    args.header.parts += total;
    args.header.count = 0;
    total = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    const AdamwTensor& t = tensors[i];
    if (t.numel == 0) {
      continue;
    }
    if (args.header.count == kNormEntries || total + chunks(t.numel) > 0x7fffffff) {
      flush();
    }
    args.entries[args.header.count++] = {
        t.grad,
        t.numel,
        static_cast<int32_t>(total),
        static_cast<int16_t>(t.types.grad),
        static_cast<int16_t>(aligned(t.grad, bytes(t.types.grad)))};
    total += chunks(t.numel);
  }
  flush();
  launch(adamw_root_kernel, dim3(1), dim3(1024), stream, static_cast<const float*>(parts), part_count, norm);
}

}  // namespace fastllm
