// Row kernels of cross_entropy. Reference: fastllm/reference/cross_entropy.py.
//
//   t = x, or c tanh(x / c) with a softcap c       top = max_j t_j       lse = log(sum_j exp(t_j - top))
//   picked = t_target - top                        mean = mean_j(t_j - top)
//   dx_j = (dlse exp(t_j - top - lse) + dpicked [j = target] + dmean / n) (1 - (t_j / c)^2)
//
// The forward reads a row from memory once: its second pass finds it in the cache, and fetches the next row meanwhile.
#include "../cross_entropy_rows.h"
#include "vec_math.h"

namespace fastllm::FASTLLM_ISA {

namespace {

constexpr int64_t kBlock = 2048;  // elements summed before they are added to the row's total

template <bool kCapped>
Vec cap(Vec x, float softcap, float inverse) {
  if constexpr (kCapped) {
    return rounded(softcap * tanh(x * inverse));
  } else {
    return x;
  }
}

template <bool kCapped, class T>
void fwd_rows(const CrossEntropyFwd& a, int64_t begin, int64_t end) {
  const float inverse = kCapped ? 1.0f / a.softcap : 0.0f;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.logits) + row * a.stride;
    const T* next = row + 1 < end ? x + a.stride : x;
    Vec tops[4] = {
        splat(-__builtin_inff()), splat(-__builtin_inff()), splat(-__builtin_inff()), splat(-__builtin_inff())};
    int64_t i = 0;
    for (; i + 4 * kLanes <= a.n; i += 4 * kLanes) {
      for (int k = 0; k < 4; ++k) {
        tops[k] = max(load(x + i + k * kLanes), tops[k]);
      }
    }
    for (; i + kLanes <= a.n; i += kLanes) {
      tops[0] = max(load(x + i), tops[0]);
    }
    const Vec all = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
    float top = all[0];
    for (int k = 1; k < kLanes; ++k) {
      top = all[k] > top ? all[k] : top;
    }
    for (; i < a.n; ++i) {
      const float value = load(x + i, 1)[0];
      top = value > top ? value : top;
    }
    const float highest = cap<kCapped>(splat(top), a.softcap, inverse)[0];
    const float shift = highest == -__builtin_inff() ? 0.0f : highest;

    Vec total = {}, total_t = {};
    for (int64_t start = 0; start < a.n; start += kBlock) {
      Vec block = {}, block_t = {};
      for_each_vector(start, start + kBlock < a.n ? start + kBlock : a.n, [&](int64_t i, auto... count) {
        prefetch(next + i);
        const Vec t = cap<kCapped>(load(x + i, count...), a.softcap, inverse);
        block += inside(exp(t - shift), count...);
        if (a.mean != nullptr) {
          block_t += inside(t - shift, count...);
        }
      });
      total += block;
      total_t += block_t;
    }
    a.top[row] = shift;
    a.lse[row] = static_cast<float>(__builtin_log(static_cast<double>(sum(total))));
    const int64_t target = a.target[row];
    const bool here = target >= 0 && target < a.n;
    a.picked[row] = here ? cap<kCapped>(splat(load(x + target, 1)[0]), a.softcap, inverse)[0] - shift : 0.0f;
    if (a.mean != nullptr) {
      a.mean[row] = sum(total_t) / static_cast<float>(a.n);
    }
  }
}

template <bool kCapped, class T>
void bwd_rows(const CrossEntropyBwd& a, int64_t begin, int64_t end) {
  const float inverse = kCapped ? 1.0f / a.softcap : 0.0f;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.logits) + row * a.stride;
    T* dx = static_cast<T*>(a.dlogits) + row * a.dlogits_stride;
    const float top = a.top[row], lse = a.lse[row], dlse = a.dlse[row];
    const float even = a.dmean == nullptr ? 0.0f : a.dmean[row] / static_cast<float>(a.n);
    const int64_t target = a.target[row];
    const bool here = target >= 0 && target < a.n && a.dpicked[row] != 0.0f;
    const float dpicked = here ? a.dpicked[row] : 0.0f;
    const bool nothing = dlse == 0.0f && even == 0.0f && dpicked == 0.0f;
    auto gradient = [&](Vec value, Vec picked) {
      const Vec t = cap<kCapped>(value, a.softcap, inverse);
      Vec out = dlse * exp(t - top - lse) + even + picked;
      if constexpr (kCapped) {
        const Vec ratio = t * inverse;
        out = out * (1.0f - ratio * ratio);
      }
      return out;
    };
    const Vec at_target = here ? gradient(load(x + target, 1), splat(dpicked)) : Vec{};
    const int64_t next = row + 1 < end ? row + 1 : row;
    const T* next_x = static_cast<const T*>(a.logits) + next * a.stride;
    for_each_vector(0, a.n, [&](int64_t i, auto... count) {
      prefetch(next_x + i);
      store_output(dx + i, nothing ? Vec{} : gradient(load(x + i, count...), Vec{}), a.streamed, count...);
    });
    if (here) {
      if (a.streamed) {
        stream_fence();  // before the same memory is written again, by another way
      }
      store(dx + target, at_target, 1);
    }
  }
  stream_fence();
}

template <template <bool, class> class Rows, class Args>
void run(const Args& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kFloat:
      return a.softcap > 0 ? Rows<true, float>()(a, begin, end) : Rows<false, float>()(a, begin, end);
    case DType::kBFloat16:
      return a.softcap > 0 ? Rows<true, BFloat16>()(a, begin, end) : Rows<false, BFloat16>()(a, begin, end);
    case DType::kHalf:
      return a.softcap > 0 ? Rows<true, Half>()(a, begin, end) : Rows<false, Half>()(a, begin, end);
  }
}

template <bool kCapped, class T>
struct Forward {
  void operator()(const CrossEntropyFwd& a, int64_t begin, int64_t end) {
    fwd_rows<kCapped, T>(a, begin, end);
  }
};

template <bool kCapped, class T>
struct Backward {
  void operator()(const CrossEntropyBwd& a, int64_t begin, int64_t end) {
    bwd_rows<kCapped, T>(a, begin, end);
  }
};

}  // namespace

const CrossEntropyKernels cross_entropy_kernels = {run<Forward, CrossEntropyFwd>, run<Backward, CrossEntropyBwd>};

}  // namespace fastllm::FASTLLM_ISA
