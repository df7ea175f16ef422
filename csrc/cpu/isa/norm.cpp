// Row kernels of LayerNorm and RMSNorm. A row is read from memory once: its later passes find it in the cache. The last
// pass, which would leave the memory idle but for what it writes, fetches the next row.
#include "../norm_rows.h"
#include "../../math/norm.h"
#include "../../math/philox.h"
#include "vec.h"

namespace fastllm::FASTLLM_ISA {

namespace {

constexpr int64_t kBlock = 2048;  // elements summed before they are added to the row's total

constexpr int64_t kGroup = 4 * kLanes;  // elements that a vector of counters serves

// What each of the elements [start, start + count) of a row is multiplied by: dropout's scale, or zero.
void fill_factors(
    float (&factors)[kBlock + kGroup], const Dropout& dropout, int64_t row, int64_t start, int64_t count) {
  const VecU32 zero = {};
  for (int64_t e = 0; e < count; e += kGroup) {
    VecU32 c[4] = {
        lane_indices() + static_cast<uint32_t>((start + e) / 4),
        zero + static_cast<uint32_t>(row),
        zero + static_cast<uint32_t>(row >> 32),
        zero};
    philox<Random>(c, dropout.seed);
    Vec word[4];
    for (int i = 0; i < 4; ++i) {
      word[i] = (c[i] >> 8) >= dropout.threshold ? splat(dropout.scale) : Vec{};
    }
    // Element 4 i + j of the group is word j of lane i.
    const Vec even0 = interleave(word[0], word[2], 0), even1 = interleave(word[0], word[2], 1);
    const Vec odd0 = interleave(word[1], word[3], 0), odd1 = interleave(word[1], word[3], 1);
    store(factors + e, interleave(even0, odd0, 0));
    store(factors + e + kLanes, interleave(even0, odd0, 1));
    store(factors + e + 2 * kLanes, interleave(even1, odd1, 0));
    store(factors + e + 3 * kLanes, interleave(even1, odd1, 1));
  }
}

// Whatever is dropped is zero, an infinity too.
inline Vec dropped(Vec x, Vec factor) {
  return factor == 0.0f ? Vec{} : x * factor;
}

template <bool kCentered, class T>
void fwd_rows(const NormFwd& a, const Dropout& dropout, int64_t begin, int64_t end) {
  const int64_t n = a.n;
  const float* weight = static_cast<const float*>(a.weight);
  const float* bias = static_cast<const float*>(a.bias);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * n;

    // Four chains of sums hide the latency of the additions; blocks keep each chain short, and so its rounding errors.
    auto accumulate = [&](auto term) {
      Vec total = {};
      for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t stop = start + kBlock < n ? start + kBlock : n;
        Vec acc[4] = {};
        int64_t i = start;
        for (; i + 4 * kLanes <= stop; i += 4 * kLanes) {
          acc[0] += term(i);
          acc[1] += term(i + kLanes);
          acc[2] += term(i + 2 * kLanes);
          acc[3] += term(i + 3 * kLanes);
        }
        for (; i + kLanes <= stop; i += kLanes) {
          acc[0] += term(i);
        }
        if (i < stop) {
          acc[1] += term(i, stop - i);
        }
        total += (acc[0] + acc[1]) + (acc[2] + acc[3]);
      }
      return sum(total);
    };

    if (a.residual != nullptr) {
      const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
      T* total = static_cast<T*>(a.sum) + row * n;
      if (dropout.threshold > 0) {
        float factors[kBlock + kGroup];
        for (int64_t start = 0; start < n; start += kBlock) {
          const int64_t stop = start + kBlock < n ? start + kBlock : n;
          fill_factors(factors, dropout, row, start, stop - start);
          for_each_vector(start, stop, [&](int64_t i, auto... count) {
            const Vec branch = dropped(load(x + i, count...), load(factors + i - start));
            store(total + i, branch + load(residual + i, count...), count...);
          });
        }
      } else {
        for_each_vector(0, n, [&](int64_t i, auto... count) {
          store(total + i, load(x + i, count...) + load(residual + i, count...), count...);
        });
      }
      x = total;
    }

    float mean = 0.0f;
    if constexpr (kCentered) {
      const float first = load(x, 1)[0];
      const float sum =
          accumulate([&](int64_t i, auto... count) { return inside(load(x + i, count...) - first, count...); });
      mean = first + sum / static_cast<float>(n);
      a.mean[row] = mean;
    }
    const float sum_of_squares = accumulate([&](int64_t i, auto... count) {
      const Vec d = inside(norm_center<kCentered>(load(x + i, count...), mean), count...);
      return d * d;
    });
    const float rstd = norm_rstd(sum_of_squares, static_cast<float>(n), a.eps);
    a.rstd[row] = rstd;

    const int64_t next = row + 1 < end ? row + 1 : row;
    const T* next_x = static_cast<const T*>(a.x) + next * a.x_stride;
    const T* next_residual = static_cast<const T*>(a.residual) + next * a.residual_stride;
    for_each_vector(0, n, [&](int64_t i, auto... count) {
      prefetch(next_x + i);
      if (a.residual != nullptr) {
        prefetch(next_residual + i);
      }
      Vec v = norm_xhat<kCentered>(load(x + i, count...), mean, rstd);
      if (weight != nullptr) {
        v = v * load(weight + i, count...);
      }
      if (bias != nullptr) {
        v = v + load(bias + i, count...);
      }
      store_output(y + i, v, a.streamed, count...);
    });
  }
  stream_fence();
}

template <bool kCentered, class T>
void bwd_rows(const NormBwd& a, const Dropout& dropout, int64_t begin, int64_t end, float* dweight, float* dbias) {
  const int64_t n = a.n;
  const float* weight = static_cast<const float*>(a.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* dsum = static_cast<const T*>(a.dsum) + row * a.dsum_stride;
    T* dx = static_cast<T*>(a.dx) + row * n;
    const float mean = kCentered ? a.mean[row] : 0.0f;
    const float rstd = a.rstd[row];

    Vec sum_g = {}, sum_gx = {};
    for (int64_t start = 0; start < n; start += kBlock) {
      Vec block_g = {}, block_gx = {};
      for_each_vector(start, start + kBlock < n ? start + kBlock : n, [&](int64_t i, auto... count) {
        const Vec d = load(dy + i, count...);  // zero past the end, so those lanes add nothing to any sum
        const Vec xhat = norm_xhat<kCentered>(load(x + i, count...), mean, rstd);
        const Vec g = weight != nullptr ? d * load(weight + i, count...) : d;
        block_gx += g * xhat;
        if constexpr (kCentered) {
          block_g += g;
        }
        if (dweight != nullptr) {
          store(dweight + i, load(dweight + i, count...) + d * xhat, count...);
        }
        if (dbias != nullptr) {
          store(dbias + i, load(dbias + i, count...) + d, count...);
        }
      });
      sum_g += block_g;
      sum_gx += block_gx;
    }
    const float mean_g = sum(sum_g) / static_cast<float>(n);
    const float mean_gx = sum(sum_gx) / static_cast<float>(n);

    const int64_t next = row + 1 < end ? row + 1 : row;
    const T* next_dy = static_cast<const T*>(a.dy) + next * a.dy_stride;
    const T* next_x = static_cast<const T*>(a.x) + next * a.x_stride;
    auto write_dx = [&](int64_t i, const float* factor, auto... count) {
      prefetch(next_dy + i);
      prefetch(next_x + i);
      const Vec d = load(dy + i, count...);
      const Vec xhat = norm_xhat<kCentered>(load(x + i, count...), mean, rstd);
      const Vec g = weight != nullptr ? d * load(weight + i, count...) : d;
      Vec out = norm_dx<kCentered>(g, xhat, mean_g, mean_gx, rstd);
      if (a.dsum != nullptr) {
        out = out + load(dsum + i, count...);
      }
      store_output(dx + i, out, a.streamed, count...);
      if (factor != nullptr) {
        store_output(static_cast<T*>(dropout.dbranch) + row * n + i, dropped(out, load(factor)), a.streamed, count...);
      }
    };
    if (dropout.dbranch == nullptr) {
      for_each_vector(0, n, [&](int64_t i, auto... count) { write_dx(i, nullptr, count...); });
      continue;
    }
    float factors[kBlock + kGroup];
    for (int64_t start = 0; start < n; start += kBlock) {
      const int64_t stop = start + kBlock < n ? start + kBlock : n;
      fill_factors(factors, dropout, row, start, stop - start);
      for_each_vector(start, stop, [&](int64_t i, auto... count) { write_dx(i, factors + i - start, count...); });
    }
  }
  stream_fence();
}

template <bool kCentered>
void fwd_typed(const NormFwd& a, const Dropout& dropout, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kFloat:
      return fwd_rows<kCentered, float>(a, dropout, begin, end);
    case DType::kBFloat16:
      return fwd_rows<kCentered, BFloat16>(a, dropout, begin, end);
    case DType::kHalf:
      return fwd_rows<kCentered, Half>(a, dropout, begin, end);
  }
}

template <bool kCentered>
void bwd_typed(const NormBwd& a, const Dropout& dropout, int64_t begin, int64_t end, float* dweight, float* dbias) {
  switch (a.dtype) {
    case DType::kFloat:
      return bwd_rows<kCentered, float>(a, dropout, begin, end, dweight, dbias);
    case DType::kBFloat16:
      return bwd_rows<kCentered, BFloat16>(a, dropout, begin, end, dweight, dbias);
    case DType::kHalf:
      return bwd_rows<kCentered, Half>(a, dropout, begin, end, dweight, dbias);
  }
}

void fwd(const NormFwd& a, const Dropout& dropout, int64_t begin, int64_t end) {
  a.centered ? fwd_typed<true>(a, dropout, begin, end) : fwd_typed<false>(a, dropout, begin, end);
}

void bwd(const NormBwd& a, const Dropout& dropout, int64_t begin, int64_t end, float* dweight, float* dbias) {
  a.centered ? bwd_typed<true>(a, dropout, begin, end, dweight, dbias)
             : bwd_typed<false>(a, dropout, begin, end, dweight, dbias);
}

}  // namespace

const NormRows norm_rows = {fwd, bwd};

}  // namespace fastllm::FASTLLM_ISA
