// Packing of narrow activations (2 bytes, 1 byte) K-major.
#pragma once

#include "core/simd-inl.h"

namespace sp {
namespace {

// An integer that is known to the compiler inside a generic lambda.
template <int kN>
struct Int {
  static constexpr int value = kN;
};

template <typename T>
struct Halves;
template <>
struct Halves<uint16_t> {
  static constexpr int kLanes = 8;
  SP_INLINE static Vec<uint16_t, 8> low(Vec<uint16_t, 8> a, Vec<uint16_t, 8> b) {
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  }
  SP_INLINE static Vec<uint16_t, 8> high(Vec<uint16_t, 8> a, Vec<uint16_t, 8> b) {
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  }
};
template <>
struct Halves<uint8_t> {
  static constexpr int kLanes = 16;
  SP_INLINE static Vec<uint8_t, 16> low(Vec<uint8_t, 16> a, Vec<uint8_t, 16> b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  }
  SP_INLINE static Vec<uint8_t, 16> high(Vec<uint8_t, 16> a, Vec<uint8_t, 16> b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
};

// rows[i][j] of kRows vectors, a power of two of at most kLanes, becomes element j * kRows + i of all of them in a row:
// each step is a perfect shuffle of the first half of the rows with the second.
template <int kRows, typename T, int kLanes>
SP_INLINE void interleave(Vec<T, kLanes>* rows) {
  SP_UNROLL for (int step = 1; step < kRows; step *= 2) {
    Vec<T, kLanes> next[kRows];
    SP_UNROLL for (int i = 0; i < kRows / 2; ++i) {
      next[2 * i] = Halves<T>::low(rows[i], rows[i + kRows / 2]);
      next[2 * i + 1] = Halves<T>::high(rows[i], rows[i + kRows / 2]);
    }
    SP_UNROLL for (int i = 0; i < kRows; ++i) rows[i] = next[i];
  }
}

// panel[j * kWidth + i] = element (i, j) for i < rows, zero for the other i < kWidth; j < length. Zero for length <= j
// < padded. `piece(i, j)` is the vector of elements j .. j + kLanes - 1 of row i, `single(i, j)` one element; `put(to,
// vector)` stores a vector, as wide elements if the panel's are wider.
template <int kWidth, typename T, typename To, typename Piece, typename Single, typename Put>
SP_INLINE void pack_narrow(int64_t rows, int64_t length, int64_t padded, To* panel, const Piece& piece,
                           const Single& single, const Put& put) {
  constexpr int kVector = Halves<T>::kLanes;
  constexpr int kTile = kWidth < kVector ? kWidth : kVector;  // rows of x interleaved at once
  const int64_t done = length / kVector * kVector;
  for (int64_t i = 0; i < kWidth; i += kTile) {
    for (int64_t j = 0; j < done; j += kVector) {
      Vec<T, kVector> tile[kTile];
      SP_UNROLL for (int q = 0; q < kTile; ++q) tile[q] = i + q < rows ? piece(i + q, j) : Vec<T, kVector>{};
      interleave<kTile, T, kVector>(tile);
      SP_UNROLL for (int q = 0; q < kTile; ++q) {
        put(panel + (j + q * kVector / kTile) * kWidth + i + q * kVector % kTile, tile[q]);
      }
    }
  }
  for (int64_t j = done; j < length; ++j) {
    for (int64_t i = 0; i < kWidth; ++i) panel[j * kWidth + i] = i < rows ? single(i, j) : To(0);
  }
  memset(panel + length * kWidth, 0, static_cast<size_t>((padded - length) * kWidth) * sizeof(To));
}

#if defined(__AVX512BW__)
// Index vector of a permute of words: index(dword, half). Opaque to the compiler, which would read a constant from
// memory at every use in a loop, 64 bytes each time.
template <typename F>
SP_INLINE __m512i words(const F& index) {
  alignas(64) uint16_t lanes[32];
  for (int i = 0; i < 32; ++i) lanes[i] = static_cast<uint16_t>(index(i / 2, i % 2));
  __m512i v = _mm512_load_si512(lanes);
  asm("" : "+v"(v));
  return v;
}

// panel[j * kWidth + i] = x[row(i) * stride + j], or zero if there is no such row; j < length. Zero for length <= j <
// padded. By `interleave` in whole registers, 32 columns of up to 16 rows at a time.
template <int kWidth, typename Row>
void pack_words(const uint16_t* x, int64_t stride, int64_t rows, int64_t length, int64_t padded, uint16_t* panel,
                const Row& row) {
  constexpr int kTile = kWidth < 16 ? kWidth : 16, kColumns = 32 / kTile;  // columns of them in a register
  const __m512i low = words([](int lane, int half) { return 32 * half + lane; });
  const __m512i high = words([](int lane, int half) { return 32 * half + 16 + lane; });
  static const uint16_t zeros[32] = {};
  const uint16_t* from[kWidth];
  int64_t step[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    const int q = row(i);
    from[i] = q < rows ? x + q * stride : zeros;
    step[i] = q < rows ? 32 : 0;
  }
  // The next columns, `live` of them, to `to`.
  const auto columns = [&](__mmask32 live, uint16_t* to) SP_ALWAYS_INLINE {
    for (int64_t i = 0; i < kWidth; i += kTile) {
      __m512i tile[kTile];
      SP_UNROLL for (int q = 0; q < kTile; ++q) {
        tile[q] = _mm512_maskz_loadu_epi16(live, from[i + q]);
        from[i + q] += step[i + q];
      }
      SP_UNROLL for (int half = 1; half < kTile; half *= 2) {
        __m512i next[kTile];
        SP_UNROLL for (int q = 0; q < kTile / 2; ++q) {
          next[2 * q] = _mm512_permutex2var_epi16(tile[q], low, tile[q + kTile / 2]);
          next[2 * q + 1] = _mm512_permutex2var_epi16(tile[q], high, tile[q + kTile / 2]);
        }
        SP_UNROLL for (int q = 0; q < kTile; ++q) tile[q] = next[q];
      }
      SP_UNROLL for (int q = 0; q < kTile; ++q) {
        if constexpr (kTile == kWidth) {
          _mm512_storeu_si512(to + q * 32, tile[q]);
        } else {
          uint16_t* at = to + q * kColumns * kWidth + i;
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_castsi512_si256(tile[q]));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + kWidth), _mm512_extracti64x4_epi64(tile[q], 1));
        }
      }
    }
  };
  int64_t j = 0;
  for (; j + 32 <= length; j += 32) columns(0xffffffff, panel + j * kWidth);
  if (j < length) {
    alignas(64) uint16_t last[32 * kWidth];
    columns(0xffffffff >> (32 - (length - j)), last);
    memcpy(panel + j * kWidth, last, static_cast<size_t>((length - j) * kWidth) * sizeof *panel);
  }
  memset(panel + length * kWidth, 0, static_cast<size_t>((padded - length) * kWidth) * sizeof *panel);
}
#endif

}  // namespace
}  // namespace sp
