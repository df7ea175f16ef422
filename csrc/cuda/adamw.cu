// AdamW on the GPU: one pass over every parameter of a call. Arithmetic: math/adamw.h.
//
// A launch takes as many tensors as its arguments hold. A block updates a chunk of one tensor, found by bisection; a
// thread takes eight elements at a time, in packs of four of each tensor that is aligned for them, single elements of
// one that is not and at the ragged end. What differs from call to call but not inside one (masters, amsgrad, ...) is
// asked once for the eight.
#include "adamw_moments.cuh"
#include "candidates.h"
#include "exact.cuh"

#include <algorithm>

namespace fastllm {

namespace {

// Which pointers of an entry are aligned for vectors.
enum Aligned : uint32_t { kParam = 1, kGrad = 2, kExpAvg = 4, kExpAvgSq = 8, kMax = 16, kMaster = 32, kAll = 63 };

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
  const uint32_t* codes;
  uint64_t seed;
  int32_t count;
  int32_t chunk;  // elements of a block
  bool unscale, stochastic, remainder;
};

constexpr int kEntries = (kAdamwArgumentBytes - sizeof(LaunchHeader)) / sizeof(Entry);

struct Launch {
  LaunchHeader header;
  Entry entries[kEntries];
};
static_assert(sizeof(Launch) <= kAdamwArgumentBytes);

// adamw_param of a thread's elements: without branches, where exact.cuh's ranges hold for all of them. A second moment
// of 2^-80 or more has a root of 2^-40, and 1 / correction2 can make that only larger.
__device__ __forceinline__ void update_params(
    float (&param)[kVec], const float (&exp_avg)[kVec], const float (&square)[kVec], const AdamwScalars& s) {
  const Divisor by_correction(s.correction2);
#pragma unroll
  for (int pack = 0; pack < kVec; pack += kPack) {
    bool exact = s.correction2 >= 0x1p-30f && s.eps <= 0x1p60f;
    float updated[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float root = exact_root(square[pack + i]);
      const Divisor by_denominator(Ops::add(by_correction.divide(root), s.eps));
      const float step = by_denominator.divide(Ops::mul(s.step_size, exp_avg[pack + i]));
      exact = exact && square[pack + i] >= 0x1p-80f && fabsf(step) >= 0x1p-60f && fabsf(step) <= 0x1p60f;
      updated[i] = Ops::add(Ops::mul(param[pack + i], s.decay), step);
    }
    if (!exact) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        updated[i] = adamw_param<Ops>(param[pack + i], exp_avg[pack + i], square[pack + i], s);
      }
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      param[pack + i] = updated[i];
    }
  }
}

// 16 random bits for each of a thread's elements, which are pairs of lanes' halves of two counters: each lane computes
// one of them. All lanes of a warp must call this.
__device__ __forceinline__ void draw(
    uint32_t (&random)[kVec / 2], uint64_t block, uint32_t index, float step, uint64_t seed) {
  const int lane = threadIdx.x % kWarp;
  const bool odd = lane % 2 != 0;
  const uint64_t counter = (block + (odd ? kApart : 0)) / 8 + lane / 2;
  uint32_t words[4] = {
      static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), index, static_cast<uint32_t>(step)};
  philox<Ops>(words, seed);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t received = __shfl_xor_sync(0xffffffffu, odd ? words[i] : words[i + 2], 1);
    random[i] = odd ? received : words[i];
    random[i + 2] = odd ? words[i + 2] : received;
  }
}

template <class P, class G, class M>
__global__ void __launch_bounds__(kThreads, 3) adamw_step_kernel(const __grid_constant__ Launch launch) {
  constexpr bool kHalf = sizeof(P) == 2, kIsBFloat16 = std::is_same_v<P, __nv_bfloat16>, kCodes = sizeof(M) == 1;
  const LaunchHeader& header = launch.header;
  const AdamwFactors factors = *header.factors;
  if (factors.skip != 0.0f) {
    return;
  }
  auto& codes = *static_cast<std::conditional_t<kCodes, Codes, NoCodes>*>(shared_bytes());
  if constexpr (kCodes) {
    start_copying_codes(codes, header.codes);
  }
  const int32_t chunk = blockIdx.x;
  const Entry& e = launch.entries[find_entry(launch.entries, header.count, chunk)];
  const AdamwScalars s = header.scalars[e.scalars];
  const bool has_master = kHalf && e.master != nullptr, amsgrad = !kCodes && e.max_exp_avg_sq != nullptr;
  const int64_t first = static_cast<int64_t>(chunk - e.first_chunk) * header.chunk;
  const int64_t end = first + header.chunk < e.numel ? first + header.chunk : e.numel;
  if constexpr (kCodes) {
    wait_for_codes();
  }
  for (int64_t block = first + threadIdx.x / kWarp * kAdamwBlock; block < end; block += kStride) {
    const int64_t offset = block + threadIdx.x % kWarp * kPack, rest = e.numel - offset;
    const bool whole = block + kAdamwBlock <= e.numel, fast = whole && e.aligned == kAll;
    const auto all = [](uint32_t) { return true; };
    const auto some = [&](uint32_t which) { return whole && (e.aligned & which) != 0; };

    Raw<P> param_raw;
    Raw<G> grad_raw;
    Moment<M, true> exp_avg_raw;
    Moment<M, false> exp_avg_sq_raw;
    Raw<float> master;
    Raw<uint16_t> remainder;
    const auto load = [&](auto vector) {
      param_raw.load(static_cast<const P*>(e.param) + offset, vector(kParam), rest);
      grad_raw.load(static_cast<const G*>(e.grad) + offset, vector(kGrad), rest);
      exp_avg_raw.load(e.exp_avg, e.exp_avg_scale, offset, vector(kExpAvg), rest);
      exp_avg_sq_raw.load(e.exp_avg_sq, e.exp_avg_sq_scale, offset, vector(kExpAvgSq), rest);
      if (has_master && header.remainder) {
        remainder.load(static_cast<const uint16_t*>(e.master) + offset, vector(kMaster), rest);
      } else if (has_master) {
        master.load(static_cast<const float*>(e.master) + offset, vector(kMaster), rest);
      }
    };
    fast ? load(all) : load(some);

    float param[kVec], grad[kVec], exp_avg[kVec], exp_avg_sq[kVec];
    grad_raw.get(grad);
    if (header.unscale) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        grad[i] = Ops::div(grad[i], factors.grad_scale);
      }
      grad_raw.set(grad);
      grad_raw.store(static_cast<G*>(e.grad) + offset, some(kGrad), rest);
      grad_raw.get(grad);
    }
    exp_avg_raw.get(exp_avg, codes);
    exp_avg_sq_raw.get(exp_avg_sq, codes);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      adamw_moments<Ops>(exp_avg[i], exp_avg_sq[i], Ops::mul(grad[i], factors.clip), s);
    }
    float square[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      square[i] = exp_avg_sq[i];
    }
    if (amsgrad) {
      Moment<M, false> max_raw;
      float so_far[kVec];
      max_raw.load(e.max_exp_avg_sq, nullptr, offset, some(kMax), rest);
      max_raw.get(so_far, codes);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        square[i] = adamw_largest<Ops>(so_far[i], exp_avg_sq[i]);
      }
      max_raw.set(square, codes);
      max_raw.store(e.max_exp_avg_sq, nullptr, offset, some(kMax), rest);
    }
    if (!has_master) {
      param_raw.get(param);
    } else if (header.remainder) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        param[i] = adamw_join<Ops>(param_raw.get(i), remainder.get(i));
      }
    } else {
      master.get(param);
    }
    update_params(param, exp_avg, square, s);

    exp_avg_sq_raw.set(exp_avg_sq, codes);
    if (kCodes && exp_avg_sq_raw.scale < 0.0f) {  // some are not finite
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        exp_avg[i] = adamw_first_moment<Ops>(exp_avg[i], exp_avg_sq[i]);
      }
    }
    exp_avg_raw.set(exp_avg, codes);
    if (kIsBFloat16 && has_master) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        uint32_t bits, rounded_off;
        adamw_split<Ops>(param[i], bits, rounded_off);
        param_raw.set(i, bits);
        remainder.set(i, rounded_off);
      }
    } else if (kHalf && header.stochastic && !has_master) {
      uint32_t random[kVec / 2];
      draw(random, block, e.index, s.step, header.seed);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const uint32_t half = random[i / 2] >> (i % 2 * 16) & 0xffffu;
        param_raw.set(
            i, kIsBFloat16 ? adamw_round_bfloat16<Ops>(param[i], half) : adamw_round_half<Ops>(param[i], half));
      }
    } else {
      param_raw.set(param);
    }

    const auto store = [&](auto vector) {
      param_raw.store(static_cast<P*>(e.param) + offset, vector(kParam), rest);
      exp_avg_raw.store(e.exp_avg, e.exp_avg_scale, offset, vector(kExpAvg), rest);
      exp_avg_sq_raw.store(e.exp_avg_sq, e.exp_avg_sq_scale, offset, vector(kExpAvgSq), rest);
      if (has_master && header.remainder) {
        remainder.store(static_cast<uint16_t*>(e.master) + offset, vector(kMaster), rest);
      } else if (has_master) {
        master.set(param);
        master.store(static_cast<float*>(e.master) + offset, vector(kMaster), rest);
      }
    };
    fast ? store(all) : store(some);
  }
}

// Steps, bias corrections and factors.

struct PrepareHeader {
  AdamwHyper hyper;
  AdamwInputs inputs;
  AdamwScalars* scalars;
  AdamwFactors* factors;
  uint32_t* codes;
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
  if (header.codes != nullptr && i < kAdamwCodesWords) {
    header.codes[i] = codes_word(i);
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
    uint32_t* codes,
    cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += kPrepared) {
    Prepare prepare;
    PrepareHeader& header = prepare.header;
    header = {
        call.hyper,
        inputs,
        scalars + first,
        factors,
        first == 0 ? codes : nullptr,
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
    const int threads = header.codes != nullptr ? std::max(header.count, kAdamwCodesWords) : header.count;
    launch(adamw_prepare_kernel, dim3(ceil_div(threads, kThreads)), dim3(kThreads), stream, prepare);
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
    const uint32_t* codes,
    cudaStream_t stream) {
  const AdamwTypes& types = tensors[order[0]].types;
  const Kernel kernel = find_kernel(types);
  const int moment_bytes = types.quantized ? 1 : bytes(types.moment);
  // With 8-bit moments twice as many: a block starts by copying 25 KB.
  const int64_t chunk = kStride * kAdamwSteps[candidate(Tuned::kAdamw)] * (types.quantized ? 2 : 1);
  Launch args;
  args.header = {
      scalars, factors, codes, call.seed, 0, static_cast<int32_t>(chunk), unscale, call.stochastic, types.remainder};
  int64_t total = 0;
  const auto flush = [&] {
    if (total > 0) {
      const int shared = types.quantized ? sizeof(Codes) : 0;
      launch_shared(kernel, dim3(static_cast<unsigned>(total)), dim3(kThreads), shared, stream, args);
    }
    args.header.count = 0;
    total = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    const AdamwTensor& t = tensors[order[i]];
    if (t.numel == 0) {
      continue;
    }
    const int64_t chunks = (t.numel + chunk - 1) / chunk;
    if (args.header.count == kEntries || total + chunks > 0x7fffffff) {
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
    total += chunks;
  }
  flush();
}

}  // namespace fastllm
