// Rotary positions. Reference: fastllm/reference/rotary.py.
//
//   (a, b) -> (a cos - b sin, b cos + a sin) for each pair, by the angle of its position
#include "../rotary_rows.h"
#include "vec.h"

namespace fastllm::FASTLLM_ISA {

namespace {

// Vectors of neighbours, x[0] x[1] x[2] ..., as those at even places and at odd ones, and back.
struct Neighbours {
  Vec even, odd;
};

template <class T>
Neighbours load_neighbours(const T* p) {
  float lane[2 * kLanes], even[kLanes], odd[kLanes];
  store(lane, load(p));
  store(lane + kLanes, load(p + kLanes));
  for (int i = 0; i < kLanes; ++i) {
    even[i] = lane[2 * i];
    odd[i] = lane[2 * i + 1];
  }
  return {load(even), load(odd)};
}

template <class T>
void store_neighbours(T* p, Neighbours pair) {
  float lane[2 * kLanes], even[kLanes], odd[kLanes];
  store(even, pair.even);
  store(odd, pair.odd);
  for (int i = 0; i < kLanes; ++i) {
    lane[2 * i] = even[i];
    lane[2 * i + 1] = odd[i];
  }
  store(p, load(lane));
  store(p + kLanes, load(lane + kLanes));
}

template <class T, bool kInterleaved>
void turn_head(const T* in, T* out, const float* cos, const float* sin, float sign, int64_t half) {
  for_each_vector(0, half, [&](int64_t i, auto... count) {
    const Vec c = load(cos + i, count...), s = sign * load(sin + i, count...);
    if constexpr (!kInterleaved) {
      const Vec a = load(in + i, count...), b = load(in + half + i, count...);
      store(out + i, a * c - b * s, count...);
      store(out + half + i, b * c + a * s, count...);
    } else if constexpr (sizeof...(count) == 0) {
      const auto [a, b] = load_neighbours(in + 2 * i);
      store_neighbours(out + 2 * i, {a * c - b * s, b * c + a * s});
    } else {
      for (int64_t j = i; j < half; ++j) {
        const float a = load(in + 2 * j, 1)[0], b = load(in + 2 * j + 1, 1)[0];
        store(out + 2 * j, splat(a * c[j - i] - b * s[j - i]), 1);
        store(out + 2 * j + 1, splat(b * c[j - i] + a * s[j - i]), 1);
      }
    }
  });
}

template <class T>
void turn_places(const Rotary& a, const RotaryHeads& x, int64_t begin, int64_t end) {
  for (int64_t place = begin; place < end; ++place) {
    const int64_t batch = place / a.seq, seq = place % a.seq;
    int64_t row = seq;
    if (a.positions != nullptr) {
      row = a.positions[batch * a.positions_batch + seq * a.positions_seq];
    }
    row = row < 0 ? 0 : row < a.rows ? row : a.rows - 1;
    const float* cos = a.cos + batch * a.cos_batch + row * a.cos_row;
    const float* sin = a.sin + batch * a.sin_batch + row * a.sin_row;
    for (int64_t head = 0; head < x.heads; ++head) {
      const T* in = static_cast<const T*>(x.in) + batch * x.in_batch + head * x.in_head + seq * x.in_seq;
      T* out = static_cast<T*>(x.out) + batch * x.out_batch + head * x.out_head + seq * x.out_seq;
      if (a.interleaved) {
        turn_head<T, true>(in, out, cos, sin, a.sign, a.half);
      } else {
        turn_head<T, false>(in, out, cos, sin, a.sign, a.half);
      }
      if (out != in) {
        for_each_vector(
            2 * a.half, a.size, [&](int64_t i, auto... count) { store(out + i, load(in + i, count...), count...); });
      }
    }
  }
}

void turn(const Rotary& a, const RotaryHeads& x, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kFloat:
      return turn_places<float>(a, x, begin, end);
    case DType::kBFloat16:
      return turn_places<BFloat16>(a, x, begin, end);
    case DType::kHalf:
      return turn_places<Half>(a, x, begin, end);
  }
}

}  // namespace

const RotaryKernels rotary_kernels = {turn};

}  // namespace fastllm::FASTLLM_ISA
