// Vectors, transposition and packing, compiled once per instruction set.
//
// Written with the vector extensions of GCC and Clang, so that the same source serves x86 and ARM. Everything lives in
// an anonymous namespace: an inline function or template with external linkage, compiled here for AVX-512, would be a
// weak symbol that the linker may hand to code running on a machine without it. For the same reason ISA sources include
// no std header.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 sees it in the casts of its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "core/types.h"

#if !defined(SP_VECTOR_BYTES)
#error "SP_VECTOR_BYTES (16, 32 or 64) is defined by the ISA source before it includes this header"
#endif

#if defined(__clang__)
#define SP_UNROLL _Pragma("unroll")
#else
#define SP_UNROLL _Pragma("GCC unroll 16")
#endif
#define SP_ALWAYS_INLINE __attribute__((always_inline))
#define SP_INLINE inline SP_ALWAYS_INLINE

// A vector the compiler must hold as it is, in one register, instead of computing it again in cheaper-looking pieces.
#if defined(__AVX512VL__)
#define SP_KEEP(vector) asm("" : "+v"(vector))
#elif defined(__AVX__)
#define SP_KEEP(vector) asm("" : "+x"(vector))
#else
#define SP_KEEP(vector) static_cast<void>(0)
#endif

namespace sp {
namespace {

template <typename T, int kN>
struct VecOf {
  typedef T type __attribute__((vector_size(kN * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(kN * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <typename T, int kN>
using Vec = typename VecOf<T, kN>::type;

// Asks for the cache line that a kernel which streams a weight will reach in some 8 kB: as far as memory is away at its
// full speed. (A Zen 5 that multiplies from memory without it waits for a quarter of its time at M = 1, at M = 16 for
// half of it; weights that are in a cache it would slow down by a tenth.)
SP_INLINE void fetch_ahead(bool cold, const void* at) {
  if (cold) __builtin_prefetch(static_cast<const char*>(at) + 8192);
}

template <typename T>
constexpr int kLanes = SP_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <int kN, typename T>
SP_INLINE Vec<T, kN> load(const T* from) {
  return *reinterpret_cast<const typename VecOf<T, kN>::unaligned*>(from);
}

template <int kN, typename T>
SP_INLINE void store(T* to, Vec<T, kN> value) {
  *reinterpret_cast<typename VecOf<T, kN>::unaligned*>(to) = value;
}

// The first `live` lanes of value to y.
template <int kS, typename T>
SP_INLINE void store_first(T* y, Vec<T, kS> value, int64_t live) {
  if (live >= kS) {
    store<kS>(y, value);
  } else {
    T lanes[kS];
    store<kS>(lanes, value);
    for (int64_t i = 0; i < live; ++i) y[i] = lanes[i];
  }
}

// to[j * to_stride + i] = from[i][j], i and j in 0..3.
SP_INLINE void transpose4x4(const float* const* from, float* to, int64_t to_stride) {
  const Vec<float, 4> a = load<4>(from[0]), b = load<4>(from[1]), c = load<4>(from[2]), d = load<4>(from[3]);
  const Vec<float, 4> ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Vec<float, 4> cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  store<4>(to, __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5));
  store<4>(to + to_stride, __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7));
  store<4>(to + 2 * to_stride, __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5));
  store<4>(to + 3 * to_stride, __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7));
}

SP_INLINE Vec<float, 8> join(Vec<float, 4> low, Vec<float, 4> high) {
#if defined(__AVX__)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);  // GCC makes a slower shuffle of the line below
#else
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
#endif
}

// to[j][i] = from[i][j], i and j in 0..7.
SP_INLINE void transpose8x8(const float* const* from, Vec<float, 8>* to) {
#if SP_VECTOR_BYTES >= 32
  // Rows i and i + 4 share a vector from the load on, so that the rest happens within 128-bit lanes.
  SP_UNROLL for (int half = 0; half < 2; ++half) {
    Vec<float, 8> row[4];
    SP_UNROLL for (int i = 0; i < 4; ++i) {
      row[i] = join(load<4>(from[i] + 4 * half), load<4>(from[i + 4] + 4 * half));
    }
    const Vec<float, 8> ab0 = __builtin_shufflevector(row[0], row[1], 0, 8, 1, 9, 4, 12, 5, 13);
    const Vec<float, 8> ab1 = __builtin_shufflevector(row[0], row[1], 2, 10, 3, 11, 6, 14, 7, 15);
    const Vec<float, 8> cd0 = __builtin_shufflevector(row[2], row[3], 0, 8, 1, 9, 4, 12, 5, 13);
    const Vec<float, 8> cd1 = __builtin_shufflevector(row[2], row[3], 2, 10, 3, 11, 6, 14, 7, 15);
    to[4 * half] = __builtin_shufflevector(ab0, cd0, 0, 1, 8, 9, 4, 5, 12, 13);
    to[4 * half + 1] = __builtin_shufflevector(ab0, cd0, 2, 3, 10, 11, 6, 7, 14, 15);
    to[4 * half + 2] = __builtin_shufflevector(ab1, cd1, 0, 1, 8, 9, 4, 5, 12, 13);
    to[4 * half + 3] = __builtin_shufflevector(ab1, cd1, 2, 3, 10, 11, 6, 7, 14, 15);
  }
#else
  float square[64];
  const float* right[8];
  for (int i = 0; i < 8; ++i) right[i] = from[i] + 4;
  transpose4x4(from, square, 8);
  transpose4x4(from + 4, square + 4, 8);
  transpose4x4(right, square + 32, 8);
  transpose4x4(right + 4, square + 36, 8);
  for (int i = 0; i < 8; ++i) to[i] = load<8>(square + 8 * i);
#endif
}

#if SP_VECTOR_BYTES == 64
// v[j][i] and v[i][j] change places, i and j in 0..15, elements of 32 bits.
SP_INLINE void transpose16x16(__m512i* v) {
  __m512i t[16];
  SP_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  SP_UNROLL for (int i = 0; i < 16; i += 4) {
    SP_UNROLL for (int h = 0; h < 2; ++h) {
      v[i + 2 * h] = _mm512_unpacklo_epi64(t[i + h], t[i + 2 + h]);
      v[i + 2 * h + 1] = _mm512_unpackhi_epi64(t[i + h], t[i + 2 + h]);
    }
  }
  // Now v[4 * a + b] holds, in its 128-bit part c, elements 4 * a .. 4 * a + 3 of column 4 * c + b.
  SP_UNROLL for (int b = 0; b < 4; ++b) {
    const __m512i low0 = _mm512_shuffle_i32x4(v[b], v[4 + b], 0x44), high0 = _mm512_shuffle_i32x4(v[b], v[4 + b], 0xee);
    const __m512i low1 = _mm512_shuffle_i32x4(v[8 + b], v[12 + b], 0x44);
    const __m512i high1 = _mm512_shuffle_i32x4(v[8 + b], v[12 + b], 0xee);
    t[b] = _mm512_shuffle_i32x4(low0, low1, 0x88);
    t[4 + b] = _mm512_shuffle_i32x4(low0, low1, 0xdd);
    t[8 + b] = _mm512_shuffle_i32x4(high0, high1, 0x88);
    t[12 + b] = _mm512_shuffle_i32x4(high0, high1, 0xdd);
  }
  SP_UNROLL for (int i = 0; i < 16; ++i) v[i] = t[i];
}
#endif

// K-major panel: panel[j * kStride + i] = x[i * stride + j] for i < rows, 0 for the other i < kStride; j < length. Zero
// for length <= j < padded. So kernels read whole vectors, whatever M, and whole blocks, whatever K. A kStride that is
// no multiple of 4 (5 to 7: fewer cache lines than 8) needs 8 elements of slack behind the panel.
template <int kStride, typename T>
void pack_panel(const T* x, int64_t stride, int64_t rows, int64_t length, int64_t padded, T* panel) {
  int64_t done = 0;
  if constexpr (sizeof(T) == 4) {
    static const float zeros[8] = {};
    if constexpr (kStride == 4) {
      done = length / 4 * 4;
      for (int64_t j = 0; j < done; j += 4) {
        const float* from[4];
        for (int q = 0; q < 4; ++q) from[q] = q < rows ? x + q * stride + j : zeros;
        transpose4x4(from, panel + j * 4, 4);
      }
#if SP_VECTOR_BYTES == 64
    } else if constexpr (kStride % 16 == 0) {
      done = length / 16 * 16;
      for (int64_t j = 0; j < done; j += 16) {
        for (int64_t i = 0; i < kStride; i += 16) {
          __m512i square[16];
          if (i + 16 <= rows) {
            SP_UNROLL for (int q = 0; q < 16; ++q) square[q] = _mm512_loadu_si512(x + (i + q) * stride + j);
          } else {
            SP_UNROLL for (int q = 0; q < 16; ++q) {
              square[q] = i + q < rows ? _mm512_loadu_si512(x + (i + q) * stride + j) : _mm512_setzero_si512();
            }
          }
          transpose16x16(square);
          SP_UNROLL for (int q = 0; q < 16; ++q) _mm512_storeu_si512(panel + (j + q) * kStride + i, square[q]);
        }
      }
#endif
    } else {
      done = length / 8 * 8;
      constexpr int kGroups = kStride % 16 == 0 ? 2 : 1;  // a whole cache line of the panel at a time, where it has one
      for (int64_t i = 0; i < kStride; i += 8 * kGroups) {
        const float* from[8 * kGroups];
        int64_t step[8 * kGroups];
        for (int q = 0; q < 8 * kGroups; ++q) {
          from[q] = i + q < rows ? x + (i + q) * stride : zeros;
          step[q] = i + q < rows ? 8 : 0;
        }
        for (int64_t j = 0; j < done; j += 8) {
          Vec<float, 8> column[kGroups][8];
          SP_UNROLL for (int g = 0; g < kGroups; ++g) transpose8x8(from + 8 * g, column[g]);
          // In this order: what a short column writes past its end, the next one writes over.
          SP_UNROLL for (int q = 0; q < 8; ++q) {
            SP_UNROLL for (int g = 0; g < kGroups; ++g) {
              store<8>(panel + (j + q) * kStride + i + 8 * g, column[g][q]);
            }
          }
          for (int q = 0; q < 8 * kGroups; ++q) from[q] += step[q];
        }
      }
    }
  }
  for (int64_t j = done; j < length; ++j) {
    for (int64_t i = 0; i < kStride; ++i) panel[j * kStride + i] = i < rows ? x[i * stride + j] : T(0);
  }
  memset(panel + length * kStride, 0, static_cast<size_t>((padded - length) * kStride) * sizeof(T));
}

// y[i * stride + r] = tile[r * kWidth + i] for i < rows, r < height <= 8: one group of outputs back to row-major.
template <int kWidth, typename T>
SP_INLINE void store_tile(const T* tile, int64_t rows, int64_t height, T* y, int64_t stride) {
  if constexpr (sizeof(T) == 4 && kWidth % 8 == 0) {
    if (height == 8) {
      const float* from[8];
      for (int64_t i = 0; i < rows; i += 8) {
        for (int q = 0; q < 8; ++q) from[q] = tile + q * kWidth + i;
        Vec<float, 8> row[8];
        transpose8x8(from, row);
        const int64_t live = rows - i < 8 ? rows - i : 8;
        for (int64_t q = 0; q < live; ++q) store<8>(y + (i + q) * stride, row[q]);
      }
      return;
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t r = 0; r < height; ++r) y[i * stride + r] = tile[r * kWidth + i];
  }
}

// Calls body.template run<Col, kIndirect>() with the types of the index lists.
template <typename Args, typename Body>
SP_INLINE void with_index_types(const Args& args, const Body& body) {
  if (args.narrow) {
    if (args.pos != nullptr) {
      body.template run<uint16_t, true>();
    } else {
      body.template run<uint16_t, false>();
    }
  } else {
    if (args.pos != nullptr) {
      body.template run<int32_t, true>();
    } else {
      body.template run<int32_t, false>();
    }
  }
}

}  // namespace
}  // namespace sp
