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
  bool plain;  // nothing but a bias

  explicit Epilogue(const ProductArgs& args)
      : scale(args.scale),
        bias(static_cast<const Y*>(args.bias)),
        residual(static_cast<const Y*>(args.residual)),
        initial(static_cast<const Y*>(args.initial)),
        y(static_cast<Y*>(args.y)),
        out(args.out),
        activation(args.activation),
        plain(args.scale == nullptr && args.residual == nullptr && args.initial == nullptr &&
              args.activation == Activation::kNone) {}

  template <int kN>
  SP_INLINE Vec<Acc, kN> finish(int64_t row, int64_t n, Vec<Acc, kN> sum) const {
    if constexpr (sizeof(Acc) == 4) {
      if (scale != nullptr) sum *= load<kN>(scale + n);
    }
    if (initial != nullptr) sum += load_wide<kN>(initial + row * out + n);
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
    if (live >= kN) {
      store_narrow<kN>(y + row * out + n, finish<kN>(row, n, sum));
      return;
    }
    if (live <= 0) return;
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
};

// Sums of outputs n .. n + count - 1 (count <= 16; none if negative) as tile[r * kWidth + i], i the row counted from
// `row`.
template <int kWidth, typename Y, typename Acc>
void put_tile(const Epilogue<Y, Acc>& epilogue, const Acc* tile, int64_t row, int64_t rows, int64_t n, int64_t count) {
  int64_t done = 0;
  if constexpr (sizeof(Acc) == 4 && kWidth % 8 == 0) {
    done = count < 8 ? 0 : count & ~int64_t{7};
    const bool whole = done == 16;
    for (int64_t i = 0; i < rows && done > 0; i += 8) {
      Vec<Acc, 8> low[8], high[8] = {};
      const Acc* from[8];
      for (int q = 0; q < 8; ++q) from[q] = tile + q * kWidth + i;
      transpose8x8(from, low);
      if (whole) {
        for (int q = 0; q < 8; ++q) from[q] = tile + (8 + q) * kWidth + i;
        transpose8x8(from, high);
      }
      const int64_t live = rows - i < 8 ? rows - i : 8;
      SP_UNROLL for (int q = 0; q < 8; ++q) {
        if (q >= live) break;
        epilogue.template put<8>(row + i + q, n, low[q], 8);
        if (whole) epilogue.template put<8>(row + i + q, n + 8, high[q], 8);
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
