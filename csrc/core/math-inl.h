// exp, sigmoid, tanh and erf of vectors, for the epilogues and the LSTM gates.
//
// float: polynomials after a range reduction, within 3 units in the last place (erf: 1.5e-7 absolute); NaN stays NaN.
// double, which serves gradient checks only: the C library lane by lane.
#pragma once

#if defined(__AVX512VL__)
#include <immintrin.h>
#endif

#include "core/simd-inl.h"

namespace sp {
namespace {

template <typename V>
SP_INLINE V select(V yes, V no, decltype(yes < no) mask) {
  return mask ? yes : no;
}

template <typename T, int kN, typename F>
SP_INLINE Vec<T, kN> lane_by_lane(Vec<T, kN> v, F f) {
  for (int i = 0; i < kN; ++i) v[i] = f(v[i]);
  return v;
}

template <typename T, int kN>
SP_INLINE Vec<T, kN> vexp(Vec<T, kN> v) {
  if constexpr (sizeof(T) == 8) {
    return lane_by_lane<T, kN>(v, [](T t) { return __builtin_exp(t); });
  } else {
    using V = Vec<float, kN>;
    // Beyond these, exp is 0 or infinite in float, and so is what comes out below.
    const V low = -105.0f - V{}, high = 90.0f - V{};
    V x = v < low ? low : v;
    x = x > high ? high : x;
    const V magic = 12582912.0f - V{};  // 1.5 * 2^23: adding it rounds to an integer
    const V n = (x * 1.44269504f + magic) - magic;
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = 1.9875691500e-4f - V{};
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
#if defined(__AVX512VL__)  // maskz: the plain form warns of an uninitialised value in GCC 12's own header
    if constexpr (kN == 16) return v != v ? v : (V)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
    if constexpr (kN == 8) return v != v ? v : (V)_mm256_scalef_ps((__m256)p, (__m256)n);
#endif
    // 2^n in two factors, since n runs from -151 to 130.
    using I = Vec<int32_t, kN>;
    const I whole = __builtin_convertvector(n, I), half = whole >> 1;
    const I first = (half + 127) << 23, second = (whole - half + 127) << 23;
    return v != v ? v : p * (V)first * (V)second;
  }
}

template <typename T, int kN>
SP_INLINE Vec<T, kN> vsigmoid(Vec<T, kN> v) {
  return T(1) / (T(1) + vexp<T, kN>(-v));
}

template <typename T, int kN>
SP_INLINE Vec<T, kN> vtanh(Vec<T, kN> v) {
  if constexpr (sizeof(T) == 8) {
    return lane_by_lane<T, kN>(v, [](T t) { return __builtin_tanh(t); });
  } else {
    using V = Vec<float, kN>;
    const V far = 1.0f - 2.0f / (vexp<float, kN>(v + v) + 1.0f);
    const V z = v * v;  // near 0 the difference above would cancel
    V p = -5.70498872745e-3f - V{};
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    return z < 0.390625f ? p * z * v + v : far;
  }
}

// Abramowitz and Stegun, 7.1.26.
template <typename T, int kN>
SP_INLINE Vec<T, kN> verf(Vec<T, kN> v) {
  if constexpr (sizeof(T) == 8) {
    return lane_by_lane<T, kN>(v, [](T t) { return __builtin_erf(t); });
  } else {
    using V = Vec<float, kN>;
    const V size = v < 0.0f ? -v : v;
    const V t = 1.0f / (1.0f + 0.3275911f * size);
    V p = 1.061405429f - V{};
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const V erf = 1.0f - p * t * vexp<float, kN>(-size * size);
    return v < 0.0f ? -erf : erf;
  }
}

}  // namespace
}  // namespace sp
