// bcsr_linear, forward, CPU, int8 weights.   y[M, N] = x[M, K] @ (W[N, K] * scale[N]).T + bias[N]
//
// W      as in linear-inl.h, values int8; scale float, one per output
// x, y   float, row-major and contiguous; bias, residual float or null
// Maths  without args.quantise_x: x as it is, products and sums float, like fp32 with weights that happen to be
// integers.
//        With it, each row of x is quantised on the way: peak = max |x|, q = x * (127 / peak) rounded to nearest even,
//        y = float(exact sum of q * w) * (peak / 127) * scale. A row with peak < 2^-119 counts as zero; a row with a
//        NaN or an infinity gives NaN everywhere. The sums are exact, so every instruction set has the same
// Limits any R, C, M >= 0, N, K. Fast for R % 8 == 0
// Cost   quantised, where the instruction set has vpdpbusd: arranged_i8-inl.h if the weight was arranged, else
//        dot_i8-inl.h; all else: widen-inl.h, the speed of fp32
#pragma once

#include "core/arranged_i8-inl.h"
#include "core/dot_i8-inl.h"
#include "core/widen-inl.h"

namespace sp {
namespace {

// Rounded to nearest, ties to even. By conversion, since adding a large constant could be fused with a product before
// it.
SP_INLINE Vec<int32_t, kLanes<float>> rounded(Vec<float, kLanes<float>> v) {
  using I = Vec<int32_t, kLanes<float>>;
#if defined(__AVX512F__)
  return (I)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
  return (I)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
  return (I)__builtin_ia32_cvtps2dq(v);
#else
  I whole;
  for (int i = 0; i < kLanes<float>; ++i) whole[i] = static_cast<int32_t>(__builtin_rintf(v[i]));
  return whole;
#endif
}

struct RowScale {
  float inverse;  // q = x * inverse, rounded
  float factor;   // x is about q * factor
};

// From the bits of the row's max |x|.
inline RowScale scale_of(uint32_t peak) {
  float largest;
  memcpy(&largest, &peak, 4);
  if (peak >= 0x7f800000u) return {0.0f, __builtin_nanf("")};
  if (largest < 0x1p-119f) return {0.0f, 0.0f};
  return {127.0f / largest, largest / 127.0f};
}

inline RowScale row_scale(const float* x, int64_t length) {
  using U = Vec<uint32_t, kLanes<float>>;
  constexpr int kL = kLanes<float>;
  // As integers: a NaN is above infinity, which is above every number.
  const auto* bits = reinterpret_cast<const uint32_t*>(x);
  U most = {};
  int64_t k = 0;
  for (; k + kL <= length; k += kL) {
    const U one = (U)load<kL>(x + k) & 0x7fffffffu;
    most = one > most ? one : most;
  }
  uint32_t peak = 0;
  for (int i = 0; i < kL; ++i) peak = most[i] > peak ? most[i] : peak;
  for (; k < length; ++k) {
    uint32_t one;
    memcpy(&one, bits + k, 4);
    one &= 0x7fffffffu;
    peak = one > peak ? one : peak;
  }
  return scale_of(peak);
}

struct LinearI8 {
  const ProductArgs& args;
  int64_t m0, m1, l0, l1;
  float* scratch;

  template <typename L>
  void rows(const L& lists) const {
    if (!args.quantise_x) {
      widened<false>(lists);
      return;
    }
#if defined(SP_DOT_I8)
    if (args.in <= kDotColumns) {
      dotted(lists);
      return;
    }
#endif
    widened<true>(lists);
  }

  const float* x_row(int64_t m) const { return static_cast<const float*>(args.x) + m * args.in; }

  int64_t padded() const { return (args.in + args.c - 1) / args.c * args.c; }

  template <typename L>
  SP_INLINE void widened_row(const L& lists, const Epilogue<float, float>& epilogue, int64_t m) const {
    constexpr int kL = kLanes<float>;
    const float* x = x_row(m);
    const RowScale scale = row_scale(x, args.in);
    memset(scratch + args.in, 0, static_cast<size_t>(padded() - args.in + kL) * sizeof(float));
    memcpy(scratch, x, static_cast<size_t>(args.in) * sizeof(float));
    for (int64_t k = 0; k < args.in; k += kL) {
      const Vec<float, kL> whole =
          __builtin_convertvector(rounded(load<kL>(scratch + k) * scale.inverse), typename VecOf<float, kL>::type);
      store<kL>(scratch + k, whole);
    }
    widened_gemv<true>(lists, epilogue, scratch, m, scale.factor, l0, l1);
  }

  // Rows m .. of x as a K-major panel of float; quantised if kExact, then factors[i] belongs to row i.
  template <int kWidth, bool kExact>
  int64_t pack_floats(int64_t m, float* factors) const {
    const int64_t taken = m1 - m < kWidth ? m1 - m : kWidth;
    pack_panel<kWidth>(x_row(m), args.in, taken, args.in, padded(), scratch);
    if constexpr (kExact) {
      alignas(64) float inverse[kWidth] = {};
      for (int64_t i = 0; i < taken; ++i) {
        const RowScale scale = row_scale(x_row(m + i), args.in);
        inverse[i] = scale.inverse;
        factors[i] = scale.factor;
      }
      // Whole vectors, over the ends of narrow rows: a panel of 4 rows holds several inputs in one.
      constexpr int kL = kLanes<float>, kStep = kWidth < kL ? kWidth : kL;
      alignas(64) float repeated[kWidth < kL ? kL : kWidth];
      for (int i = 0; i < (kWidth < kL ? kL : kWidth); ++i) repeated[i] = inverse[i % kWidth];
      const int64_t size = args.in * kWidth;
      for (int64_t i = 0; i < size; i += kL) {
        const Vec<float, kL> by = load<kL>(repeated + (kStep < kL ? 0 : i % kWidth));
        store<kL>(scratch + i,
                  __builtin_convertvector(rounded(load<kL>(scratch + i) * by), typename VecOf<float, kL>::type));
      }
    }
    return taken;
  }

  template <bool kExact, typename L>
  void widened(const L& lists) const {
    constexpr int kL = kLanes<float>;
    const Epilogue<float, float> epilogue(args);
    float* buffer = scratch + (padded() + 1) * kMaxPanel;
    const bool eights = args.r % 8 == 0;
    float factors[kMaxPanel] = {};
    for (int64_t m = m0; m < m1;) {
      const int64_t left = m1 - m;
      int64_t taken = 1;
      if (left == 1) {
        if constexpr (kExact) {
          widened_row(lists, epilogue, m);
        } else {
          memcpy(scratch, x_row(m), static_cast<size_t>(args.in) * sizeof(float));
          memset(scratch + args.in, 0, static_cast<size_t>(padded() - args.in) * sizeof(float));
          widened_gemv<false>(lists, epilogue, scratch, m, 1.0f, l0, l1);
        }
      } else if (eights && left <= 4) {
        taken = pack_floats<4, kExact>(m, factors);
        widened_few_rows<4, kExact>(lists, epilogue, scratch, m, taken, factors, l0, l1);
      } else if (eights && left <= 8) {
        taken = pack_floats<8, kExact>(m, factors);
        widened_few_rows<8, kExact>(lists, epilogue, scratch, m, taken, factors, l0, l1);
      } else if (left > 2 * kL - 8) {
        taken = pack_floats<2 * kL, kExact>(m, factors);
        widened_panel<2, kExact>(lists, epilogue, scratch, buffer, padded(), m, taken, factors, l0, l1);
      } else {
        taken = pack_floats<kL, kExact>(m, factors);
        widened_panel<1, kExact>(lists, epilogue, scratch, buffer, padded(), m, taken, factors, l0, l1);
      }
      m += taken;
    }
  }

#if defined(SP_DOT_I8)
  // Row of x as bytes 1 .. 255, zero padded to whole blocks.
  SP_INLINE static Vec<uint8_t, 16> quantised(const float* x, float inverse) {
    const __m128i q =
        _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(inverse))));
    return (Vec<uint8_t, 16>)_mm_xor_si128(q, _mm_set1_epi8(-128));
  }
  SP_INLINE static uint8_t quantised_one(float x, float inverse) {
    return static_cast<uint8_t>(_mm_cvtss_si32(_mm_set_ss(x * inverse)) + 128);
  }

  template <int kWidth>
  int64_t pack_bytes(int64_t m, uint8_t* panel, float* factors) const {
    const int64_t taken = m1 - m < kWidth ? m1 - m : kWidth;
    float inverse[kWidth];
    for (int64_t i = 0; i < taken; ++i) {
      const RowScale scale = row_scale(x_row(m + i), args.in);
      inverse[i] = scale.inverse;
      factors[i] = scale.factor;
    }
    const float* x = x_row(m);
    pack_narrow<kWidth, uint8_t>(
        taken, args.in, padded(), panel,
        [&](int64_t i, int64_t j) SP_ALWAYS_INLINE { return quantised(x + i * args.in + j, inverse[i]); },
        [&](int64_t i, int64_t j) SP_ALWAYS_INLINE { return quantised_one(x[i * args.in + j], inverse[i]); },
        [](uint8_t* to, Vec<uint8_t, 16> v) SP_ALWAYS_INLINE { store<16>(to, v); });
    return taken;
  }

  template <typename L>
  void dotted(const L& lists) const {
    const Epilogue<float, float> epilogue(args);
    uint8_t* panel = reinterpret_cast<uint8_t*>(scratch);
    float* buffer = scratch + (padded() + 1) * kMaxPanel;
    const bool eights = args.r % 8 == 0;
    float factors[kMaxPanel] = {};
    for (int64_t m = m0; m < m1;) {
      const int64_t left = m1 - m;
      int64_t taken = 1;
      if (left == 1 && !eights) {
        widened_row(lists, epilogue, m);
      } else if (left == 1) {
        const float* x = x_row(m);
        const RowScale scale = row_scale(x, args.in);
        int64_t k = 0;
        for (; k + 16 <= args.in; k += 16) store<16>(panel + k, quantised(x + k, scale.inverse));
        for (; k < args.in; ++k) panel[k] = quantised_one(x[k], scale.inverse);
        memset(panel + k, 0, static_cast<size_t>(padded() - args.in));
        dot_gemv(lists, epilogue, panel, m, scale.factor, l0, l1);
      } else if (eights && left == 2) {
        taken = pack_bytes<2>(m, panel, factors);
        dot_few_rows<2>(lists, epilogue, panel, m, taken, factors, l0, l1);
      } else if (eights && left <= 4) {
        taken = pack_bytes<4>(m, panel, factors);
        dot_few_rows<4>(lists, epilogue, panel, m, taken, factors, l0, l1);
      } else if (eights && left <= 8) {
        taken = pack_bytes<8>(m, panel, factors);
        dot_few_rows<8>(lists, epilogue, panel, m, taken, factors, l0, l1);
      } else if (left > 24) {
        taken = pack_bytes<32>(m, panel, factors);
        dot_panel<2>(lists, epilogue, panel, buffer, padded(), m, taken, factors, l0, l1);
      } else {
        taken = pack_bytes<16>(m, panel, factors);
        dot_panel<1>(lists, epilogue, panel, buffer, padded(), m, taken, factors, l0, l1);
      }
      m += taken;
    }
  }

  void arranged() const { slice_height(args) == 8 ? arranged_by<8>() : arranged_by<4>(); }

  template <int kS>
  void arranged_by() const {
    alignas(64) float factors[kMaxPanel] = {};
    const ArrangedI8 product(args, factors);
    const int64_t s0 = l0 * args.r / kS, s1 = l1 * args.r / kS;
    const int64_t stride = whole_lines(args.in) + kLine;  // the lookup reads the line after the last, too
    uint8_t* x = reinterpret_cast<uint8_t*>(scratch);
    uint8_t* panel = x + kMaxPanel * stride;
    for (int64_t m = m0, taken; m < m1; m += taken) {
      const int64_t left = m1 - m;
      taken = left > 24 ? (left < 32 ? left : 32) : left > 16 ? 16 : left;
      const auto scale_row = [&](int64_t i) {
        const RowScale row = scale_of(peak_bits(x_row(m + i), args.in));
        factors[i] = row.factor;
        return row.inverse;
      };
      float inverse = scale_row(0);
      for (int64_t i = 0; i < taken; ++i) {  // one row ahead: none waits for its own peak
        const float next = i + 1 < taken ? scale_row(i + 1) : 0;
        quantise_row(x_row(m + i), args.in, inverse, x + i * stride);
        inverse = next;
      }
      const auto lookup = [&](auto rows) { product.by_lookup<kS, decltype(rows)::value>(x, stride, m, s0, s1); };
      const auto columns = [&](auto rows) {
        constexpr int kM = decltype(rows)::value;
        if constexpr (kS == 8) {
          turn_rows<kM <= 4 ? 4 : 8>(x, stride, taken, args.in, panel);
          product.by_columns<kM>(panel, m, s0, s1);
        } else {
          lookup(rows);
        }
      };
      const auto panels = [&](auto vectors) {
        constexpr int kZ = decltype(vectors)::value;
        turn_rows<16 * kZ>(x, stride, taken, args.in, panel);
        product.by_panel<kS, kZ>(panel, m, taken, s0, s1);
      };
      switch (taken) {
        case 1:
          lookup(Int<1>{});
          break;
        case 2:
          lookup(Int<2>{});
          break;
        case 3:
          lookup(Int<3>{});
          break;
        case 4:
          columns(Int<4>{});
          break;
        case 5:
          columns(Int<5>{});
          break;
        case 6:
          columns(Int<6>{});
          break;
        case 7:
          columns(Int<7>{});
          break;
        case 8:
          columns(Int<8>{});
          break;
        default:
          taken <= 16 ? panels(Int<1>{}) : panels(Int<2>{});
      }
    }
  }
#endif
};

void linear_i8(const ProductArgs& args, int64_t m0, int64_t m1, int64_t l0, int64_t l1, void* scratch) {
  const LinearI8 product{args, m0, m1, l0, l1, static_cast<float*>(scratch)};
#if defined(SP_DOT_I8)
  if (args.arranged != nullptr) return product.arranged();
#endif
  with_lists<int8_t>(args, [&](const auto& lists) { product.rows(lists); });
}

#if defined(SP_DOT_I8)
constexpr Arrange kArrangeI8 = &arrange_i8;
#else
constexpr Arrange kArrangeI8 = nullptr;
#endif

}  // namespace
}  // namespace sp
