// AdamW on the CPU. What is met most often is updated in place, a vector at a time; everything else (masters, 8-bit
// moments, stochastic rounding, other mixes of types) goes through floats in the cache, a block at a time.
#include "../../math/adamw.h"
#include "../adamw_blocks.h"
#include "vec.h"

#include <type_traits>

namespace fastllm::FASTLLM_ISA {

namespace {

// How many elements ahead memory is asked for. Across the border of a page no hardware does that.
constexpr int64_t kAhead = 512;

typedef uint8_t VecU8 __attribute__((vector_size(kLanes)));

// The operations that math/adamw.h asks for.
struct Ops {
  using F = Vec;
  using U = VecU32;
  static F splat(float x) {
    return fastllm::FASTLLM_ISA::splat(x);
  }
  static U whole(uint32_t x) {
    return x - U{};
  }
  static F add(F a, F b) {
    return a + b;
  }
  static F sub(F a, F b) {
    return a - b;
  }
  static F mul(F a, F b) {
    return a * b;
  }
  static F div(F a, F b) {
    return a / b;
  }
  static F fma(F a, F b, F c) {
#if defined(__AVX512F__)
    return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    for (int i = 0; i < kLanes; ++i) {
      c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    }
    return c;
#endif
  }
  static F sqrt(F a) {
#if defined(__AVX512F__)
    return (F)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
    return (F)_mm256_sqrt_ps((__m256)a);
#else
    for (int i = 0; i < kLanes; ++i) {
      a[i] = __builtin_sqrtf(a[i]);
    }
    return a;
#endif
  }
  static F select(VecI32 mask, F a, F b) {
    return mask ? a : b;
  }
  static U select(VecI32 mask, U a, U b) {
    return mask ? a : b;
  }
  static U bits(F a) {
    return (U)a;
  }
  static F value(U a) {
    return (F)a;
  }
  static U to_int(F a) {  // 0 <= a < 2^31
    return (U) __builtin_convertvector(a, VecI32);
  }
  static F from_int(U a) {
    return __builtin_convertvector((VecI32)a, F);
  }
};

template <class To, class From>
VecU32 load_bits(const From* p) {
  To narrow;
  __builtin_memcpy(&narrow, p, sizeof(narrow));
  return __builtin_convertvector(narrow, VecU32);
}

template <class To, class From>
void store_bits(From* p, VecU32 bits) {
  const To narrow = __builtin_convertvector(bits, To);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
}

// In place. Rounds to P and M to nearest even.
template <bool kAmsgrad, class P, class G, class M>
void step_typed(const AdamwTensor& t, const AdamwScalars& scalars, float factor, int64_t begin, int64_t end) {
  const AdamwScalars s = scalars;  // a copy, which no store below can be taken to change
  P* param = static_cast<P*>(t.param);
  const G* grad = static_cast<const G*>(t.grad);
  M* exp_avg = static_cast<M*>(t.exp_avg);
  M* exp_avg_sq = static_cast<M*>(t.exp_avg_sq);
  M* max_exp_avg_sq = static_cast<M*>(t.max_exp_avg_sq);
  if constexpr (std::is_same_v<P, BFloat16> && std::is_same_v<G, BFloat16> && std::is_same_v<M, BFloat16>) {
    for (; begin + 2 * kLanes <= end; begin += 2 * kLanes) {
      prefetch(param + begin + kAhead);
      prefetch(grad + begin + kAhead);
      prefetch(exp_avg + begin + kAhead);
      prefetch(exp_avg_sq + begin + kAhead);
      Pair p = load_pair(param + begin), m = load_pair(exp_avg + begin), v = load_pair(exp_avg_sq + begin), u{};
      const Pair g = load_pair(grad + begin);
      if constexpr (kAmsgrad) {
        u = load_pair(max_exp_avg_sq + begin);
      }
      AdamwElement<Ops> even{p.even, m.even, v.even, u.even}, odd{p.odd, m.odd, v.odd, u.odd};
      adamw_update<Ops, kAmsgrad>(even, g.even * factor, s);
      adamw_update<Ops, kAmsgrad>(odd, g.odd * factor, s);
      store_pair(param + begin, {even.param, odd.param});
      store_pair(exp_avg + begin, {even.exp_avg, odd.exp_avg});
      store_pair(exp_avg_sq + begin, {even.exp_avg_sq, odd.exp_avg_sq});
      if constexpr (kAmsgrad) {
        store_pair(max_exp_avg_sq + begin, {even.max_exp_avg_sq, odd.max_exp_avg_sq});
      }
    }
  }
  for_each_vector(begin, end, [&](int64_t i, auto... count) {
    prefetch(param + i + kAhead);
    prefetch(grad + i + kAhead);
    prefetch(exp_avg + i + kAhead);
    prefetch(exp_avg_sq + i + kAhead);
    AdamwElement<Ops> e;
    e.param = load(param + i, count...);
    e.exp_avg = load(exp_avg + i, count...);
    e.exp_avg_sq = load(exp_avg_sq + i, count...);
    if constexpr (kAmsgrad) {
      e.max_exp_avg_sq = load(max_exp_avg_sq + i, count...);
    }
    adamw_update<Ops, kAmsgrad>(e, load(grad + i, count...) * factor, s);
    store(param + i, e.param, count...);
    store(exp_avg + i, e.exp_avg, count...);
    store(exp_avg_sq + i, e.exp_avg_sq, count...);
    if constexpr (kAmsgrad) {
      store(max_exp_avg_sq + i, e.max_exp_avg_sq, count...);
    }
  });
}

template <class P, class G, class M>
void step_typed(const AdamwTensor& t, const AdamwScalars& s, float factor, int64_t begin, int64_t end) {
  t.max_exp_avg_sq != nullptr ? step_typed<true, P, G, M>(t, s, factor, begin, end)
                              : step_typed<false, P, G, M>(t, s, factor, begin, end);
}

// The types that step_typed is compiled for, if these are among them.
using Typed = void (*)(const AdamwTensor&, const AdamwScalars&, float, int64_t, int64_t);
Typed typed(const AdamwTypes& types) {
  const auto is = [&](DType param, DType grad, DType moment) {
    return types.param == param && types.grad == grad && types.moment == moment;
  };
  if (is(DType::kFloat, DType::kFloat, DType::kFloat)) {
    return step_typed<float, float, float>;
  }
  if (is(DType::kBFloat16, DType::kBFloat16, DType::kBFloat16)) {
    return step_typed<BFloat16, BFloat16, BFloat16>;
  }
  if (is(DType::kBFloat16, DType::kBFloat16, DType::kFloat)) {
    return step_typed<BFloat16, BFloat16, float>;
  }
  if (is(DType::kHalf, DType::kHalf, DType::kHalf)) {
    return step_typed<Half, Half, Half>;
  }
  return nullptr;
}

// A block of floats, read from and written to memory of another type. Lanes past n are zero.
struct alignas(64) Block {
  float values[kAdamwBlock];

  Vec get(int64_t i) const {
    return load(values + i);
  }

  template <class T>
  void read(const T* p, int64_t n) {
    for_each_vector(0, n, [&](int64_t i, auto... count) { store(values + i, load(p + i, count...)); });
  }
  template <class T>
  void write(T* p, int64_t n) const {
    for_each_vector(0, n, [&](int64_t i, auto... count) { store(p + i, get(i), count...); });
  }

  void read(const void* base, DType dtype, int64_t offset, int64_t n) {
    switch (dtype) {
      case DType::kFloat:
        return read(static_cast<const float*>(base) + offset, n);
      case DType::kBFloat16:
        return read(static_cast<const BFloat16*>(base) + offset, n);
      case DType::kHalf:
        return read(static_cast<const Half*>(base) + offset, n);
    }
  }
  void write(void* base, DType dtype, int64_t offset, int64_t n) const {
    switch (dtype) {
      case DType::kFloat:
        return write(static_cast<float*>(base) + offset, n);
      case DType::kBFloat16:
        return write(static_cast<BFloat16*>(base) + offset, n);
      case DType::kHalf:
        return write(static_cast<Half*>(base) + offset, n);
    }
  }
};

// Calls f(i) for every vector of n elements, whose memory is padded to whole vectors.
template <class F>
void for_each_padded(int64_t n, F f) {
  for (int64_t i = 0; i < n; i += kLanes) {
    f(i);
  }
}

template <bool kSigned>
void read_codes(Block& block, const void* base, const float* scales, int64_t offset, int64_t n) {
  uint8_t codes[kAdamwBlock] = {};
  __builtin_memcpy(codes, static_cast<const uint8_t*>(base) + offset, n);
  const float scale = scales[offset / kAdamwBlock];
  for_each_padded(
      n, [&](int64_t i) { store(block.values + i, adamw_decode<Ops, kSigned>(load_bits<VecU8>(codes + i), scale)); });
}

template <bool kSigned>
void write_codes(const Block& block, void* base, float* scales, int64_t offset, int64_t n) {
  Vec largest = {};
  VecI32 all_finite = largest == largest;
  for_each_padded(n, [&](int64_t i) {
    const Vec x = block.get(i), magnitude = x < 0.0f ? -x : x;
    const VecI32 finite = magnitude <= kAdamwLargest;
    largest = finite & (magnitude > largest) ? magnitude : largest;
    all_finite &= finite;
  });
  float most = 0.0f;
  bool finite = true;
  for (int lane = 0; lane < kLanes; ++lane) {
    most = largest[lane] > most ? largest[lane] : most;
    finite = finite && all_finite[lane] != 0;
  }
  const float scale = adamw_block_scale(most, finite);
  scales[offset / kAdamwBlock] = scale;
  uint8_t codes[kAdamwBlock];
  for_each_padded(n, [&](int64_t i) { store_bits<VecU8>(codes + i, adamw_encode<Ops, kSigned>(block.get(i), scale)); });
  __builtin_memcpy(static_cast<uint8_t*>(base) + offset, codes, n);
}

// 16 random bits for each element of a block.
void fill_random(uint16_t (&random)[kAdamwBlock], uint64_t seed, uint32_t parameter, float step, int64_t offset) {
  uint32_t* words = reinterpret_cast<uint32_t*>(random);
  for (int64_t e = 0; e < kAdamwBlock; e += 8 * kLanes) {
    const uint64_t counter = (offset + e) / 8;  // a multiple of kLanes: the lanes do not carry
    VecU32 c[4] = {
        static_cast<uint32_t>(counter) + lane_indices(),
        Ops::whole(static_cast<uint32_t>(counter >> 32)),
        Ops::whole(parameter),
        Ops::whole(static_cast<uint32_t>(step))};
    philox<Random>(c, seed);
    for (int i = 0; i < kLanes; ++i) {
      for (int word = 0; word < 4; ++word) {
        words[(e / 8 + i) * 4 + word] = c[word][i];
      }
    }
  }
}

// 16-bit weights from their floats, and back, where they are not simply rounded to nearest even.
void read_master(Block& param, const AdamwTensor& t, int64_t offset, int64_t n) {
  const AdamwTypes& types = t.types;
  if (!types.remainder) {
    return param.read(t.master, DType::kFloat, offset, n);
  }
  uint16_t weights[kAdamwBlock] = {}, remainders[kAdamwBlock] = {};
  __builtin_memcpy(weights, static_cast<const uint16_t*>(t.param) + offset, 2 * n);
  __builtin_memcpy(remainders, static_cast<const uint16_t*>(t.master) + offset, 2 * n);
  for_each_padded(n, [&](int64_t i) {
    store(param.values + i, adamw_join<Ops>(load_bits<VecU16>(weights + i), load_bits<VecU16>(remainders + i)));
  });
}

void write_master(const Block& param, const AdamwTensor& t, int64_t offset, int64_t n) {
  const AdamwTypes& types = t.types;
  if (types.param != DType::kBFloat16) {
    param.write(t.param, types.param, offset, n);
  } else {
    uint16_t weights[kAdamwBlock], remainders[kAdamwBlock];
    for_each_padded(n, [&](int64_t i) {
      VecU32 weight, remainder;
      adamw_split<Ops>(param.get(i), weight, remainder);
      store_bits<VecU16>(weights + i, weight);
      store_bits<VecU16>(remainders + i, remainder);
    });
    __builtin_memcpy(static_cast<uint16_t*>(t.param) + offset, weights, 2 * n);
    if (types.remainder) {
      __builtin_memcpy(static_cast<uint16_t*>(t.master) + offset, remainders, 2 * n);
    }
  }
  if (!types.remainder) {
    param.write(t.master, DType::kFloat, offset, n);
  }
}

void write_stochastic(
    const Block& param, const AdamwTensor& t, DType dtype, uint64_t seed, float step, int64_t offset, int64_t n) {
  alignas(64) uint16_t random[kAdamwBlock];
  fill_random(random, seed, t.index, step, offset);
  uint16_t weights[kAdamwBlock];
  for_each_padded(n, [&](int64_t i) {
    const VecU32 bits = load_bits<VecU16>(random + i);
    store_bits<VecU16>(
        weights + i,
        dtype == DType::kBFloat16 ? adamw_round_bfloat16<Ops>(param.get(i), bits)
                                  : adamw_round_half<Ops>(param.get(i), bits));
  });
  __builtin_memcpy(static_cast<uint16_t*>(t.param) + offset, weights, 2 * n);
}

void step_block(
    const AdamwTensor& t,
    const AdamwCall& call,
    const AdamwScalars& s,
    const AdamwFactors& factors,
    int64_t offset,
    int64_t n) {
  const AdamwTypes& types = t.types;
  Block param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq;
  grad.read(t.grad, types.grad, offset, n);
  if (factors.unscale) {
    for_each_padded(n, [&](int64_t i) { store(grad.values + i, grad.get(i) / factors.grad_scale); });
    grad.write(t.grad, types.grad, offset, n);
    grad.read(t.grad, types.grad, offset, n);  // with the rounding that was written
  }
  t.master != nullptr ? read_master(param, t, offset, n) : param.read(t.param, types.param, offset, n);
  if (types.quantized) {
    read_codes<true>(exp_avg, t.exp_avg, t.exp_avg_scale, offset, n);
    read_codes<false>(exp_avg_sq, t.exp_avg_sq, t.exp_avg_sq_scale, offset, n);
  } else {
    exp_avg.read(t.exp_avg, types.moment, offset, n);
    exp_avg_sq.read(t.exp_avg_sq, types.moment, offset, n);
  }
  if (t.max_exp_avg_sq != nullptr) {
    max_exp_avg_sq.read(t.max_exp_avg_sq, types.moment, offset, n);
  }
  for_each_padded(n, [&](int64_t i) {
    AdamwElement<Ops> e{param.get(i), exp_avg.get(i), exp_avg_sq.get(i), {}};
    const Vec g = grad.get(i) * factors.clip;
    if (t.max_exp_avg_sq != nullptr) {
      e.max_exp_avg_sq = max_exp_avg_sq.get(i);
      adamw_update<Ops, true>(e, g, s);
      store(max_exp_avg_sq.values + i, e.max_exp_avg_sq);
    } else {
      adamw_update<Ops, false>(e, g, s);
    }
    // What lies past n must not reach the scales.
    store(param.values + i, e.param);
    e.exp_avg = types.quantized ? adamw_first_moment<Ops>(e.exp_avg, e.exp_avg_sq) : e.exp_avg;
    store(exp_avg.values + i, n - i < kLanes ? inside(e.exp_avg, n - i) : e.exp_avg);
    store(exp_avg_sq.values + i, n - i < kLanes ? inside(e.exp_avg_sq, n - i) : e.exp_avg_sq);
  });
  if (types.quantized) {
    write_codes<true>(exp_avg, t.exp_avg, t.exp_avg_scale, offset, n);
    write_codes<false>(exp_avg_sq, t.exp_avg_sq, t.exp_avg_sq_scale, offset, n);
  } else {
    exp_avg.write(t.exp_avg, types.moment, offset, n);
    exp_avg_sq.write(t.exp_avg_sq, types.moment, offset, n);
  }
  if (t.max_exp_avg_sq != nullptr) {
    max_exp_avg_sq.write(t.max_exp_avg_sq, types.moment, offset, n);
  }
  if (t.master != nullptr) {
    write_master(param, t, offset, n);
  } else if (call.stochastic && types.param != DType::kFloat) {
    write_stochastic(param, t, types.param, call.seed, s.step, offset, n);
  } else {
    param.write(t.param, types.param, offset, n);
  }
}

void step(
    const AdamwTensor& t,
    const AdamwCall& call,
    const AdamwScalars& s,
    const AdamwFactors& factors,
    int64_t begin,
    int64_t end) {
  const bool plain = !factors.unscale && !t.types.quantized && t.master == nullptr && !call.stochastic;
  if (const Typed in_place = plain ? typed(t.types) : nullptr) {
    return in_place(t, s, factors.clip, begin, end);
  }
  for (int64_t offset = begin; offset < end; offset += kAdamwBlock) {
    const int64_t rest = end - offset;
    step_block(t, call, s, factors, offset, rest < kAdamwBlock ? rest : kAdamwBlock);
  }
}

// Float sums of a few thousand squares, added up in double: as good as all in double, and as fast as memory.
template <class T>
double square_sum(const T* x, int64_t n) {
  constexpr int64_t kChunk = 64 * kLanes;
  double total = 0.0;
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t stop = start + kChunk < n ? start + kChunk : n;
    Vec acc[4] = {};
    int64_t i = start;
    for (; i + 4 * kLanes <= stop; i += 4 * kLanes) {
      for (int chain = 0; chain < 4; ++chain) {
        const Vec v = load(x + i + chain * kLanes);
        acc[chain] = Ops::fma(v, v, acc[chain]);
      }
    }
    for_each_vector(i, stop, [&](int64_t j, auto... count) {
      const Vec v = load(x + j, count...);
      acc[0] = Ops::fma(v, v, acc[0]);
    });
    total += static_cast<double>(sum((acc[0] + acc[1]) + (acc[2] + acc[3])));
  }
  return total;
}

double square_sum(const void* grad, DType dtype, int64_t n) {
  switch (dtype) {
    case DType::kFloat:
      return square_sum(static_cast<const float*>(grad), n);
    case DType::kBFloat16:
      return square_sum(static_cast<const BFloat16*>(grad), n);
    default:
      return square_sum(static_cast<const Half*>(grad), n);
  }
}

}  // namespace

const AdamwBlocks adamw_blocks = {step, square_sum};

}  // namespace fastllm::FASTLLM_ISA
