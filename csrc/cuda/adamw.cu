// AdamW on the GPU: one pass over every parameter of a call. Arithmetic: math/adamw.h.
//
// A launch takes as many tensors as its arguments hold. A block updates a chunk of one tensor, found by bisection; a
// thread takes eight elements at a time, 16 bytes or more of each tensor that is aligned for it, single elements of one
// that is not and at the ragged end.
#include "adamw.cuh"

namespace fastllm {

namespace {

// Which pointers of an entry are aligned for vectors.
enum Aligned : uint32_t { kParam = 1, kGrad = 2, kExpAvg = 4, kExpAvgSq = 8, kMax = 16, kMaster = 32 };

struct Entry {
  void* param;
  void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;
  void* master;
  float* exp_avg_scale;
  float* exp_avg_sq_scale;
  int64_t numel;
  int32_t first_chunk;
  uint32_t index;
  uint32_t aligned;
  int32_t scalars;  // its place in Launch::scalars
};

struct LaunchHeader {
  const AdamwScalars* scalars;
  const AdamwFactors* factors;
  uint64_t seed;
  int32_t count;
  bool unscale, stochastic, remainder;
};

constexpr int kEntries = (kAdamwArgumentBytes - sizeof(LaunchHeader)) / sizeof(Entry);

struct Launch {
  LaunchHeader header;
  Entry entries[kEntries];
};
static_assert(sizeof(Launch) <= kAdamwArgumentBytes);

// A moment: T, or Code with a scale for the warp's elements.
template <class T, bool kSigned>
struct Moment {
  Raw<T> raw;
  float scale;

  __device__ __forceinline__ void load(const void* base, const float* scales, int64_t offset, bool vector, int count) {
    raw.load(static_cast<const T*>(base) + offset, vector, count);
    if constexpr (sizeof(T) == 1) {
      scale = count > 0 ? scales[offset / kAdamwBlock] : 0.0f;
    }
  }

  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(T) == 1) {
      return adamw_decode<Ops, kSigned>(raw.get(i), scale);
    } else {
      return decode_float<T>(raw.get(i));
    }
  }

  // All lanes of a warp must call this.
  __device__ __forceinline__ void store(
      const float (&values)[kVec], void* base, float* scales, int64_t offset, bool vector, int count) {
    if constexpr (sizeof(T) == 1) {
      // The largest finite magnitude, and whether there are others: that is 1 here, and 0 where all are finite.
      float largest = 0.0f, special = 0.0f;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float magnitude = values[i] < 0.0f ? -values[i] : values[i];
        const bool finite = magnitude <= kAdamwLargest;
        largest = i < count && finite && magnitude > largest ? magnitude : largest;
        special = i < count && !finite ? 1.0f : special;
      }
#pragma unroll
      for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, mask));
        special = fmaxf(special, __shfl_xor_sync(0xffffffffu, special, mask));
      }
      const float scale = adamw_block_scale(largest, special == 0.0f);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        raw.set(i, adamw_encode<Ops, kSigned>(values[i], scale));
      }
      if (threadIdx.x % kWarp == 0) {
        scales[offset / kAdamwBlock] = scale;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        raw.set(i, encode_float<T>(values[i]));
      }
    }
    raw.store(static_cast<T*>(base) + offset, vector, count);
  }
};

template <class P, class G, class M>
__global__ void __launch_bounds__(kThreads, 2) adamw_step_kernel(const __grid_constant__ Launch launch) {
  const LaunchHeader& header = launch.header;
  const AdamwFactors factors = *header.factors;
  if (factors.skip != 0.0f) {
    return;
  }
  const int32_t chunk = blockIdx.x;
  const Entry& e = launch.entries[find_entry(launch.entries, header.count, chunk)];
  const AdamwScalars s = header.scalars[e.scalars];
  const int lane = threadIdx.x % kWarp;
  int64_t offset = (chunk - e.first_chunk) * kChunk + threadIdx.x * kVec;
  for (int step = 0; step < kSteps; ++step, offset += kStride) {
    if (offset - lane * kVec >= e.numel) {  // the whole warp is past the end
      return;
    }
    const int64_t rest = e.numel - offset;
    const int count = rest >= kVec ? kVec : rest > 0 ? static_cast<int>(rest) : 0;
    const bool whole = count == kVec;
    const auto vector = [&](uint32_t which) { return whole && (e.aligned & which) != 0; };

    Raw<P> param;
    Raw<G> grad;
    Moment<M, true> exp_avg;
    Moment<M, false> exp_avg_sq;
    Raw<float> master;
    Raw<uint16_t> remainder;
    param.load(static_cast<const P*>(e.param) + offset, vector(kParam), count);
    grad.load(static_cast<const G*>(e.grad) + offset, vector(kGrad), count);
    exp_avg.load(e.exp_avg, e.exp_avg_scale, offset, vector(kExpAvg), count);
    exp_avg_sq.load(e.exp_avg_sq, e.exp_avg_sq_scale, offset, vector(kExpAvgSq), count);
    const bool has_master = sizeof(P) == 2 && e.master != nullptr;
    if (has_master) {
      if (header.remainder) {
        remainder.load(static_cast<const uint16_t*>(e.master) + offset, vector(kMaster), count);
      } else {
        master.load(static_cast<const float*>(e.master) + offset, vector(kMaster), count);
      }
    }
    uint32_t random[4];
    if (header.stochastic && sizeof(P) == 2) {
      const uint64_t counter = static_cast<uint64_t>(offset) / kVec;
      random[0] = static_cast<uint32_t>(counter);
      random[1] = static_cast<uint32_t>(counter >> 32);
      random[2] = e.index;
      random[3] = static_cast<uint32_t>(s.step);
      philox<Ops>(random, header.seed);
    }

    float new_exp_avg[kVec], new_exp_avg_sq[kVec];
    Moment<M, false> max_exp_avg_sq;
    float new_max[kVec];
    const bool amsgrad = sizeof(M) > 1 && e.max_exp_avg_sq != nullptr;
    if (amsgrad) {
      max_exp_avg_sq.load(e.max_exp_avg_sq, nullptr, offset, vector(kMax), count);
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      float g = decode_float<G>(grad.get(i));
      if (header.unscale) {
        grad.set(i, encode_float<G>(Ops::div(g, factors.grad_scale)));
        g = decode_float<G>(grad.get(i));
      }
      g = Ops::mul(g, factors.clip);
      AdamwElement<Ops> x{decode_float<P>(param.get(i)), exp_avg.get(i), exp_avg_sq.get(i), 0.0f};
      if (has_master) {
        x.param = header.remainder ? adamw_join<Ops>(param.get(i), remainder.get(i)) : bits_as<float>(master.get(i));
      }
      if (amsgrad) {
        x.max_exp_avg_sq = max_exp_avg_sq.get(i);
        adamw_update<Ops, true>(x, g, s);
        new_max[i] = x.max_exp_avg_sq;
      } else {
        adamw_update<Ops, false>(x, g, s);
      }
      new_exp_avg[i] = sizeof(M) == 1 ? adamw_first_moment<Ops>(x.exp_avg, x.exp_avg_sq) : x.exp_avg;
      new_exp_avg_sq[i] = x.exp_avg_sq;
      if constexpr (sizeof(P) == 4) {
        param.set(i, bits_as<uint32_t>(x.param));
      } else {
        constexpr bool kIsBFloat16 = std::is_same_v<P, __nv_bfloat16>;
        uint32_t bits, rest16 = 0;
        if (has_master && kIsBFloat16) {
          adamw_split<Ops>(x.param, bits, rest16);
        } else if (header.stochastic && !has_master) {
          const uint32_t half = random[i / 2] >> (i % 2 * 16) & 0xffffu;
          bits = kIsBFloat16 ? adamw_round_bfloat16<Ops>(x.param, half) : adamw_round_half<Ops>(x.param, half);
        } else {
          bits = encode_float<P>(x.param);
        }
        param.set(i, bits);
        if (has_master) {
          header.remainder ? remainder.set(i, rest16) : master.set(i, bits_as<uint32_t>(x.param));
        }
      }
    }

    param.store(static_cast<P*>(e.param) + offset, vector(kParam), count);
    exp_avg.store(new_exp_avg, e.exp_avg, e.exp_avg_scale, offset, vector(kExpAvg), count);
    exp_avg_sq.store(new_exp_avg_sq, e.exp_avg_sq, e.exp_avg_sq_scale, offset, vector(kExpAvgSq), count);
    if (amsgrad) {
      max_exp_avg_sq.store(new_max, e.max_exp_avg_sq, nullptr, offset, vector(kMax), count);
    }
    if (header.unscale) {
      grad.store(static_cast<G*>(e.grad) + offset, vector(kGrad), count);
    }
    if (has_master) {
      if (header.remainder) {
        remainder.store(static_cast<uint16_t*>(e.master) + offset, vector(kMaster), count);
      } else {
        master.store(static_cast<float*>(e.master) + offset, vector(kMaster), count);
      }
    }
  }
}

// Steps, bias corrections and factors.

struct PrepareHeader {
  AdamwHyper hyper;
  AdamwInputs inputs;
  AdamwScalars* scalars;
  AdamwFactors* factors;
  float sign;
  int32_t count;
  bool on_host, first;
};

union Step {
  float* device;
  float host;
};

constexpr int kPrepared = (kAdamwArgumentBytes - sizeof(PrepareHeader)) / sizeof(Step);

struct Prepare {
  PrepareHeader header;
  Step steps[kPrepared];
};
static_assert(sizeof(Prepare) <= kAdamwArgumentBytes);

__global__ void __launch_bounds__(kThreads) adamw_prepare_kernel(const __grid_constant__ Prepare prepare) {
  const PrepareHeader& header = prepare.header;
  const AdamwInputs& inputs = header.inputs;
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const float skip = inputs.found_inf != nullptr ? *inputs.found_inf : 0.0f;
  if (header.first && i == 0) {
    const float clip = inputs.grad_norm != nullptr ? adamw_clip(*inputs.grad_norm, inputs.max_norm) : 1.0f;
    *header.factors = {clip * header.sign, inputs.grad_scale != nullptr ? *inputs.grad_scale : 1.0f, skip};
  }
  if (i < header.count && skip == 0.0f) {
    AdamwHyper hyper = header.hyper;
    if (inputs.lr != nullptr) {
      hyper.lr = *inputs.lr;
    }
    const float step = header.on_host ? prepare.steps[i].host : (*prepare.steps[i].device += 1.0f);
    header.scalars[i] = adamw_scalars(hyper, step);
  }
}

using Kernel = void (*)(Launch);

// The mixes of types that are compiled; ops/adamw.py says the same to `explain`.
Kernel find_kernel(const AdamwTypes& t) {
  const auto is = [&](DType param, DType grad, DType moment) {
    return t.param == param && t.grad == grad && !t.quantized && t.moment == moment;
  };
  constexpr DType f = DType::kFloat, b = DType::kBFloat16, h = DType::kHalf;
  if (t.quantized && t.param == t.grad) {
    switch (t.param) {
      case f:
        return adamw_step_kernel<float, float, Code>;
      case b:
        return adamw_step_kernel<__nv_bfloat16, __nv_bfloat16, Code>;
      case h:
        return adamw_step_kernel<__half, __half, Code>;
    }
  }
  if (is(f, f, f)) {
    return adamw_step_kernel<float, float, float>;
  }
  if (is(f, f, b)) {
    return adamw_step_kernel<float, float, __nv_bfloat16>;
  }
  if (is(b, b, b)) {
    return adamw_step_kernel<__nv_bfloat16, __nv_bfloat16, __nv_bfloat16>;
  }
  if (is(b, b, f)) {
    return adamw_step_kernel<__nv_bfloat16, __nv_bfloat16, float>;
  }
  if (is(b, f, f)) {
    return adamw_step_kernel<__nv_bfloat16, float, float>;
  }
  if (is(h, h, h)) {
    return adamw_step_kernel<__half, __half, __half>;
  }
  if (is(h, h, f)) {
    return adamw_step_kernel<__half, __half, float>;
  }
  return nullptr;
}

}  // namespace

bool adamw_cuda_supports(const AdamwTypes& types) {
  return find_kernel(types) != nullptr;
}

void launch_adamw_prepare(
    const AdamwTensor* tensors,
    const float* host_steps,
    int64_t count,
    const AdamwCall& call,
    const AdamwInputs& inputs,
    AdamwScalars* scalars,
    AdamwFactors* factors,
    cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += kPrepared) {
    Prepare prepare;
    PrepareHeader& header = prepare.header;
    header = {
        call.hyper,
        inputs,
        scalars + first,
        factors,
        call.maximize ? -1.0f : 1.0f,
        0,
        host_steps != nullptr,
        first == 0};
    header.count = static_cast<int32_t>(count - first < kPrepared ? count - first : kPrepared);
    for (int i = 0; i < header.count; ++i) {
      if (host_steps != nullptr) {
        prepare.steps[i].host = host_steps[first + i];
      } else {
        prepare.steps[i].device = tensors[first + i].step;
      }
    }
    launch(adamw_prepare_kernel, dim3(ceil_div(header.count, kThreads)), dim3(kThreads), stream, prepare);
  }
}

void launch_adamw_step(
    const AdamwTensor* tensors,
    const int64_t* order,
    int64_t count,
    const AdamwCall& call,
    bool unscale,
    const AdamwScalars* scalars,
    const AdamwFactors* factors,
    cudaStream_t stream) {
  const AdamwTypes& types = tensors[order[0]].types;
  const Kernel kernel = find_kernel(types);
  const int moment_bytes = types.quantized ? 1 : bytes(types.moment);
  Launch args;
  args.header = {scalars, factors, call.seed, 0, unscale, call.stochastic, types.remainder};
  int64_t total = 0;
  const auto flush = [&] {
    if (total > 0) {
      launch(kernel, dim3(static_cast<unsigned>(total)), dim3(kThreads), stream, args);
    }
    args.header.count = 0;
    total = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    const AdamwTensor& t = tensors[order[i]];
    if (t.numel == 0) {
      continue;
    }
    if (args.header.count == kEntries || total + chunks(t.numel) > 0x7fffffff) {
      flush();
    }
    const uint32_t flags =
        (aligned(t.param, bytes(types.param)) ? kParam : 0) | (aligned(t.grad, bytes(types.grad)) ? kGrad : 0) |
        (aligned(t.exp_avg, moment_bytes) ? kExpAvg : 0) | (aligned(t.exp_avg_sq, moment_bytes) ? kExpAvgSq : 0) |
        (aligned(t.max_exp_avg_sq, moment_bytes) ? kMax : 0) |
        (aligned(t.master, types.remainder ? 2 : 4) ? kMaster : 0);
    args.entries[args.header.count++] = {
        t.param,
        t.grad,
        t.exp_avg,
        t.exp_avg_sq,
        t.max_exp_avg_sq,
        t.master,
        t.exp_avg_scale,
        t.exp_avg_sq_scale,
        t.numel,
        static_cast<int32_t>(total),
        t.index,
        flags,
        static_cast<int32_t>(order[i])};
    total += chunks(t.numel);
  }
  flush();
}

}  // namespace fastllm
