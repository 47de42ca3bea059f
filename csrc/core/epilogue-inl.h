// What happens to a sum before it is stored: y = activation(sum * scale + initial + bias) + residual.
#pragma once

#include "core/math-inl.h"

namespace sp {
namespace {

// kN values of type Y as accumulators.
template <int kN>
SP_INLINE Vec<float, kN> load_wide(const float* from) {
  return load<kN>(from);
}
template <int kN>
SP_INLINE Vec<double, kN> load_wide(const double* from) {
  return load<kN>(from);
}
template <int kN>
SP_INLINE Vec<float, kN> load_wide(const Bf16* from) {
  if constexpr (kN == 1) {  // GCC 12 goes wrong over conversions of one lane
    const uint32_t bits = static_cast<uint32_t>(from->bits) << 16;
    Vec<float, 1> value;
    memcpy(&value, &bits, sizeof bits);
    return value;
  } else {
    const Vec<uint32_t, kN> bits = __builtin_convertvector(load<kN>(&from->bits), typename VecOf<uint32_t, kN>::type);
    return (Vec<float, kN>)(bits << 16);
  }
}

template <int kN>
SP_INLINE void store_narrow(float* to, Vec<float, kN> value) {
  store<kN>(to, value);
}
template <int kN>
SP_INLINE void store_narrow(double* to, Vec<double, kN> value) {
  store<kN>(to, value);
}
// Round to nearest, ties to even; a NaN stays a NaN.
template <int kN>
SP_INLINE void store_narrow(Bf16* to, Vec<float, kN> value) {
  if constexpr (kN == 1) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
    to->bits = static_cast<uint16_t>(value[0] != value[0] ? quiet : rounded);
  } else {
    using U = Vec<uint32_t, kN>;
    const U bits = (U)value;
    const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const U quiet = (bits >> 16) | 0x40;
    store<kN>(&to->bits, __builtin_convertvector((U)(value != value ? quiet : rounded), Vec<uint16_t, kN>));
  }
}

template <typename Acc, int kN>
SP_INLINE Vec<Acc, kN> activate(Vec<Acc, kN> v, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kRelu:
      return v < Acc(0) ? Vec<Acc, kN>{} : v;  // not max(v, 0): a NaN must stay
    case Activation::kGelu:
      return v * Acc(0.5) * (Acc(1) + verf<Acc, kN>(v * Acc(0.70710678118654752)));
    case Activation::kSilu:
      return v * vsigmoid<Acc, kN>(v);
    case Activation::kTanh:
      return vtanh<Acc, kN>(v);
  }
  return v;
}

// Y: type of y, bias and residual. Acc: type of the sums.
template <typename Y, typename Acc>
struct Epilogue {
  const float* scale;  // one per output, or null
  const Y* bias;
  const Y* residual;
  const Y* initial;
  Y* y;
  int64_t out;
  Activation activation;
  bool wide;   // y and initial hold sums instead: only for a Y that is narrower
  bool plain;  // nothing but a bias

  explicit Epilogue(const ProductArgs& args)
      : scale(args.scale),
        bias(static_cast<const Y*>(args.bias)),
        residual(static_cast<const Y*>(args.residual)),
        initial(static_cast<const Y*>(args.initial)),
        y(static_cast<Y*>(args.y)),
        out(args.out),
        activation(args.activation),
        wide(args.wide_y && sizeof(Y) < sizeof(Acc)),
        plain(args.scale == nullptr && args.residual == nullptr && args.initial == nullptr &&
              args.activation == Activation::kNone && !wide) {}

  template <int kN>
  SP_INLINE Vec<Acc, kN> finish(int64_t row, int64_t n, Vec<Acc, kN> sum) const {
    if constexpr (sizeof(Acc) == 4) {
      if (scale != nullptr) sum *= load<kN>(scale + n);
    }
    if (initial != nullptr) {
      const int64_t at = row * out + n;
      sum += wide ? load<kN>(reinterpret_cast<const Acc*>(initial) + at) : load_wide<kN>(initial + at);
    }
    if (bias != nullptr) sum += load_wide<kN>(bias + n);
    if (activation != Activation::kNone) sum = activate<Acc, kN>(sum, activation);
    if (residual != nullptr) sum += load_wide<kN>(residual + row * out + n);
    return sum;
  }

  // Outputs n .. n + kN - 1 of row `row`; those from n + live on do not exist.
  template <int kN>
  SP_INLINE void put(int64_t row, int64_t n, Vec<Acc, kN> sum, int64_t live) const {
    if (__builtin_expect(plain && live >= kN, 1)) {
      if (bias != nullptr) sum += load_wide<kN>(bias + n);
      store_narrow<kN>(y + row * out + n, sum);
    } else {
      put_other<kN>(row, n, sum, live);
    }
  }

  // Out of line: kernels call `put` in many places, and the activations are long.
  template <int kN>
  __attribute__((noinline)) void put_other(int64_t row, int64_t n, Vec<Acc, kN> sum, int64_t live) const {
    if (live <= 0) return;
    if (wide) {
      put_wide<kN>(row, n, sum, live);
      return;
    }
    if (live >= kN) {
      store_narrow<kN>(y + row * out + n, finish<kN>(row, n, sum));
      return;
    }
    // The same on copies that are long enough.
    float scales[kN] = {};
    Y biases[kN] = {}, initials[kN] = {}, residuals[kN] = {}, ys[kN];
    Epilogue copy = *this;
    const auto take = [&](auto*& from, auto* to, int64_t first) {
      if (from == nullptr) return;
      for (int64_t i = 0; i < kN - 1 && i < live; ++i) to[i] = from[first + i];
      from = to;
    };
    take(copy.scale, scales, n);
    take(copy.bias, biases, n);
    take(copy.initial, initials, row * out + n);
    take(copy.residual, residuals, row * out + n);
    store_narrow<kN>(ys, copy.template finish<kN>(0, 0, sum));
    for (int64_t i = 0; i < kN - 1 && i < live; ++i) y[row * out + n + i] = ys[i];
  }

  template <int kN>
  void put_wide(int64_t row, int64_t n, Vec<Acc, kN> sum, int64_t live) const {
    Acc* to = reinterpret_cast<Acc*>(y) + row * out + n;
    if (live >= kN) {
      store<kN>(to, finish<kN>(row, n, sum));
      return;
    }
    const Acc* from = reinterpret_cast<const Acc*>(initial) + row * out + n;
    for (int64_t i = 0; i < kN - 1 && i < live; ++i) {  // bf16, so there is no scale; nor has a sum an activation
      to[i] = sum[i] + (initial == nullptr ? 0 : from[i]) + (bias == nullptr ? 0 : load_wide<1>(bias + n + i)[0]);
    }
  }
};

// Outputs whose part of a row of y is a cache line: what a K-major kernel collects before it calls put_tile. Rows of y
// are often a power of two apart, so that few of their lines fit the caches together: written in parts, each would be
// evicted and fetched again between two parts.
template <typename Y>
constexpr int kTileOutputs = 64 / static_cast<int>(sizeof(Y));

#if SP_VECTOR_BYTES == 64
// Two vectors as bf16, word by word in turns: dword i of the result holds a[i] below b[i].
SP_INLINE __m512i narrow_pair(Vec<float, 16> a, Vec<float, 16> b) {
  using U = Vec<uint32_t, 16>;
  const auto rounded = [](Vec<float, 16> v) SP_ALWAYS_INLINE {
    const U bits = (U)v;
    return (U)(v != v ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1));
  };
  return (__m512i)((rounded(a) >> 16) | (rounded(b) & 0xffff0000u));
}

// kTileOutputs<Y> outputs n .. of 16 rows, all there, from tile[r * kWidth] to y, with `bias` (null: none) added.
template <int kWidth, typename Y>
SP_INLINE void put_lines(const Epilogue<Y, float>& epilogue, const Y* bias, const float* tile, int64_t row,
                         int64_t rows, int64_t n) {
  const auto sums = [&](int64_t r) SP_ALWAYS_INLINE {
    Vec<float, 16> v = load<16>(tile + r * kWidth);
    return bias == nullptr ? v : v + load_wide<1>(bias + n + r)[0];
  };
  __m512i line[16];
  SP_UNROLL for (int q = 0; q < 16; ++q) {
    if constexpr (sizeof(Y) == 2) {
      line[q] = narrow_pair(sums(2 * q), sums(2 * q + 1));
    } else {
      line[q] = (__m512i)sums(q);
    }
  }
  transpose16x16(line);
  Y* y = epilogue.y + row * epilogue.out + n;
  SP_UNROLL for (int q = 0; q < 16; ++q) {
    if (q < rows) _mm512_storeu_si512(y + q * epilogue.out, line[q]);
  }
}
#endif

// Sums of outputs n .. n + count - 1 (count <= kTileOutputs<Y>; none if negative) as tile[r * kWidth + i], i the row
// counted from `row`.
template <int kWidth, typename Y, typename Acc>
void put_tile(const Epilogue<Y, Acc>& epilogue, const Acc* tile, int64_t row, int64_t rows, int64_t n, int64_t count) {
#if SP_VECTOR_BYTES == 64
  if constexpr (sizeof(Acc) == 4) {
    if (count == kTileOutputs<Y> && epilogue.residual == nullptr && epilogue.initial == nullptr && !epilogue.wide) {
      const Y* bias = epilogue.bias;
      alignas(64) float finished[kTileOutputs<Y> * kWidth];
      if (!epilogue.plain) {  // before the transposition: of an output, all rows have the same scale and bias
        for (int64_t r = 0; r < count; ++r) {
          const float scale = epilogue.scale == nullptr ? 1 : epilogue.scale[n + r];
          const float shift = bias == nullptr ? 0 : load_wide<1>(bias + n + r)[0];
          for (int64_t i = 0; i < kWidth; i += 16) {
            const Vec<float, 16> sum = load<16>(tile + r * kWidth + i) * scale + shift;
            store<16>(finished + r * kWidth + i, activate<float, 16>(sum, epilogue.activation));
          }
        }
        tile = finished;
        bias = nullptr;
      }
      for (int64_t i = 0; i < rows; i += 16) put_lines<kWidth>(epilogue, bias, tile + i, row + i, rows - i, n);
      return;
    }
  }
#endif
  int64_t done = 0;
  if constexpr (sizeof(Acc) == 4 && kWidth % 8 == 0) {
    done = count < 8 ? 0 : count & ~int64_t{7};
    for (int64_t i = 0; i < rows; i += 8) {
      const int64_t live = rows - i < 8 ? rows - i : 8;
      for (int64_t g = 0; g < done; g += 8) {
        Vec<Acc, 8> sums[8];
        const Acc* from[8];
        for (int q = 0; q < 8; ++q) from[q] = tile + (g + q) * kWidth + i;
        transpose8x8(from, sums);
        SP_UNROLL for (int q = 0; q < 8; ++q) {
          if (q < live) epilogue.template put<8>(row + i + q, n + g, sums[q], 8);
        }
      }
    }
  }
  for (int64_t i = 0; i < rows && done < count; ++i) {
    for (int64_t g = done; g < count; g += 8) {
      Vec<Acc, 8> sums = {};
      const int64_t live = count - g < 8 ? count - g : 8;
      for (int64_t r = 0; r < live; ++r) sums[r] = tile[(g + r) * kWidth + i];
      epilogue.template put<8>(row + i, n + g, sums, live);
    }
  }
}

}  // namespace
}  // namespace sp
