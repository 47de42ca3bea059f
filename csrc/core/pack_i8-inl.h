// Rows of x quantised to bytes, and those bytes as a K-major panel, for the vpdpbusd kernels.
//
// The rule is in linear_i8-inl.h: q = x * (127 / peak), rounded; held as q + 128, since vpdpbusd multiplies unsigned
// with signed.
// Cost   two passes over each row, the second from L1, then a transposition of bytes: a fifth of a cycle per element
#pragma once

#include "core/simd-inl.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

namespace sp {
namespace {

constexpr int64_t kLine = 64;  // bytes that a vector holds

SP_INLINE int64_t whole_lines(int64_t length) { return (length + kLine - 1) / kLine * kLine; }

SP_INLINE __m512 load_first(const float* from, int64_t live) {
  if (live >= 16) return _mm512_loadu_ps(from);
  return _mm512_maskz_loadu_ps(live <= 0 ? 0 : (1u << live) - 1, from);
}

// The bits of max |x|: as integers, a NaN is above infinity, which is above every number.
SP_INLINE uint32_t peak_bits(const float* x, int64_t length) {
  const __m512i sign = _mm512_set1_epi32(0x7fffffff);
  __m512i most[4] = {};
  int64_t k = 0;
  for (; k + 64 <= length; k += 64) {
    SP_UNROLL for (int i = 0; i < 4; ++i) {
      most[i] = _mm512_max_epu32(most[i], _mm512_and_si512(sign, _mm512_loadu_si512(x + k + 16 * i)));
    }
  }
  for (; k < length; k += 16) {
    most[0] = _mm512_max_epu32(most[0], _mm512_and_si512(sign, _mm512_castps_si512(load_first(x + k, length - k))));
  }
  const __m512i all = _mm512_max_epu32(_mm512_max_epu32(most[0], most[1]), _mm512_max_epu32(most[2], most[3]));
  return _mm512_reduce_max_epu32(all);
}

// to[k] = q(x[k]) + 128 for k < length, 128 on to the end of the last line.
SP_INLINE void quantise_row(const float* x, int64_t length, float inverse, uint8_t* to) {
  const __m512 by = _mm512_set1_ps(inverse);
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto line = [&](int64_t k, const auto& from) SP_ALWAYS_INLINE {
    __m512i q[4];
    SP_UNROLL for (int i = 0; i < 4; ++i) q[i] = _mm512_cvtps_epi32(_mm512_mul_ps(from(k + 16 * i), by));
    const __m512i all = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    const __m512i bytes = _mm512_permutexvar_epi32(in_order, all);
    _mm512_storeu_si512(to + k, _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)));
  };
  int64_t k = 0;
  for (; k + kLine <= length; k += kLine) {
    line(k, [&](int64_t at) SP_ALWAYS_INLINE { return _mm512_loadu_ps(x + at); });
  }
  if (k < length) line(k, [&](int64_t at) SP_ALWAYS_INLINE { return load_first(x + at, length - at); });
}

// Lane l of v[0], v[1], v[2], v[3] in turn to the four vectors to, to + stride, ..
SP_INLINE void put_lanes(const __m512i* v, uint8_t* to, int64_t stride) {
  const __m512i low0 = _mm512_shuffle_i32x4(v[0], v[1], 0x44), high0 = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
  const __m512i low1 = _mm512_shuffle_i32x4(v[2], v[3], 0x44), high1 = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
  _mm512_storeu_si512(to, _mm512_shuffle_i32x4(low0, low1, 0x88));
  _mm512_storeu_si512(to + stride, _mm512_shuffle_i32x4(low0, low1, 0xdd));
  _mm512_storeu_si512(to + 2 * stride, _mm512_shuffle_i32x4(high0, high1, 0x88));
  _mm512_storeu_si512(to + 3 * stride, _mm512_shuffle_i32x4(high0, high1, 0xdd));
}

// One line of kRows rows (a power of two of at most 16) as lanes of columns: bytes 16 * (kRows * l + i) .. of the
// sixteen columns of lane l, each kRows long, in lane l of v[i].
template <int kRows>
SP_INLINE void interleave_lines(const uint8_t* const* rows, int64_t k, __m512i* v) {
  SP_UNROLL for (int i = 0; i < kRows; ++i) v[i] = _mm512_loadu_si512(rows[i] + k);
  SP_UNROLL for (int step = 1; step < kRows; step *= 2) {
    __m512i next[kRows];
    SP_UNROLL for (int i = 0; i < kRows / 2; ++i) {
      next[2 * i] = _mm512_unpacklo_epi8(v[i], v[i + kRows / 2]);
      next[2 * i + 1] = _mm512_unpackhi_epi8(v[i], v[i + kRows / 2]);
    }
    SP_UNROLL for (int i = 0; i < kRows; ++i) v[i] = next[i];
  }
}

// panel[k * kWidth + i] = row i's byte k, for k < whole_lines(length); rows past the last repeat it.
template <int kWidth>
void turn_rows(const uint8_t* bytes, int64_t stride, int64_t rows, int64_t length, uint8_t* panel) {
  const uint8_t* from[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) from[i] = bytes + (i < rows ? i : rows - 1) * stride;
  for (int64_t k = 0; k < length; k += kLine) {
    uint8_t* to = panel + k * kWidth;
    if constexpr (kWidth <= 16) {
      __m512i v[kWidth];
      interleave_lines<kWidth>(from, k, v);
      SP_UNROLL for (int i = 0; i < kWidth; i += 4) put_lanes(v + i, to + 16 * i, 16 * kWidth);
    } else {
      __m512i half[2][16];
      interleave_lines<16>(from, k, half[0]);
      interleave_lines<16>(from + 16, k, half[1]);
      for (int i = 0; i < 16; i += 2) {
        const __m512i v[4] = {half[0][i], half[1][i], half[0][i + 1], half[1][i + 1]};
        put_lanes(v, to + 32 * i, 16 * kWidth);
      }
    }
  }
}

}  // namespace
}  // namespace sp

#endif
