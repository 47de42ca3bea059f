// bf16 products by vdpbf16ps: every dword lane adds two products, of an input pair (a, b) with the weights of one
// output.
//
// A pair is two columns of one block row: two consecutive blocks when C = 1, else two neighbours in a block. Weights
// are stored column by column, so a vpermw makes the pairs of eight outputs; those of x come from a panel [K][rows].
// Maths  vdpbf16ps: products exact, sums float, denormal operands and results taken as zero
// Cost   M in 2..8: a Zen 4 spends 2 to 3 cycles a block on permutes and dot products together. Above: bound by the dot
//        products (one 512-bit a cycle), the weights of a block row are paired once per panel in a buffer in L1
#pragma once

#include "core/widen-inl.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

namespace sp {
namespace {

SP_INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

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

SP_INLINE __m128i eight(const Bf16* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

// Calls pair(a, b, k, l, set, both) for the pairs of slice r0 of block row b: weights at a and b, inputs k and l, a set
// of sums from 0 .. kSets - 1 that varies from pair to pair. `both` is Int<0> for a lone last column: then b and l are
// a, k.
template <int kSets, typename L, typename Pair>
SP_INLINE void pairs(const L& lists, int64_t b, int64_t r0, const Pair& pair) {
  int64_t e = lists.crow[b];
  const int64_t end = lists.crow[b + 1];
  if (lists.c() == 1) {
    const auto blocks = [&](int64_t p, int set) SP_ALWAYS_INLINE {
      pair(lists.block(p) + r0, lists.block(p + 1) + r0, lists.input(p), lists.input(p + 1), set, Int<1>{});
    };
    for (; e + 2 * kSets <= end; e += 2 * kSets) {
      SP_UNROLL for (int q = 0; q < kSets; ++q) blocks(e + 2 * q, q);
    }
    for (; e + 2 <= end; e += 2) blocks(e, 0);
    if (e < end) pair(lists.block(e) + r0, lists.block(e) + r0, lists.input(e), lists.input(e), 0, Int<0>{});
    return;
  }
  for (; e < end; ++e) {
    const Bf16* block = lists.block(e) + r0;
    const int64_t k = lists.input(e), r = lists.r();
    const auto columns = [&](int64_t j, int set) SP_ALWAYS_INLINE {
      pair(block + j * r, block + (j + 1) * r, k + j, k + j + 1, set, Int<1>{});
    };
    int64_t j = 0;
    for (; j + 2 * kSets <= lists.c(); j += 2 * kSets) {
      SP_UNROLL for (int q = 0; q < kSets; ++q) columns(j + 2 * q, q);
    }
    for (; j + 2 <= lists.c(); j += 2) columns(j, 0);
    if (j < lists.c()) pair(block + j * r, block + j * r, k + j, k + j, 0, Int<0>{});
  }
}

// Eight weights of a in the lower half of 32 bytes, of b (or zeros) in the upper.
template <bool kTogether, bool kBoth>
SP_INLINE __m512i weights_of(const Bf16* a, const Bf16* b) {
  if (!kBoth) return _mm512_zextsi128_si512(eight(a));
  if (kTogether) return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  return _mm512_castsi256_si512(_mm256_inserti128_si256(_mm256_castsi128_si256(eight(a)), eight(b), 1));
}

// One row of a panel [K][kWidth <= 8].
template <int kWidth>
SP_INLINE __m512i inputs_of(const Bf16* panel, int64_t k) {
  const Bf16* from = panel + k * kWidth;
  if constexpr (kWidth == 8) return _mm512_castsi128_si512(eight(from));
  if constexpr (kWidth == 4) return _mm512_castsi128_si512(_mm_loadu_si64(from));
  return _mm512_castsi128_si512(_mm_loadu_si32(from));
}

// 2 <= M <= 8, R % 8 == 0. kWidth 4 or 8: a vector of sums has four rows in its 128-bit parts, four outputs in each;
// both operands are expanded to that by permutes. kWidth 2: two rows of eight outputs.
template <int kWidth, typename L>
void dot_few_rows(const L& lists, const Epilogue<Bf16, float>& epilogue, const Bf16* panel, int64_t row, int64_t rows,
                  int64_t b0, int64_t b1) {
  constexpr int kRowParts = kWidth == 8 ? 2 : 1, kOutParts = kWidth == 2 ? 1 : 2;
  constexpr int kSets = 4 / (kRowParts * kOutParts) < 2 ? 2 : 4 / (kRowParts * kOutParts);
  __m512i expand_w[kOutParts], expand_x[kRowParts];
  for (int p = 0; p < kOutParts; ++p) {
    expand_w[p] = words([&](int lane, int half) { return 8 * half + (kWidth == 2 ? lane % 8 : 4 * p + lane % 4); });
  }
  for (int p = 0; p < kRowParts; ++p) {
    expand_x[p] = words([&](int lane, int half) { return 32 * half + (kWidth == 2 ? lane / 8 : 4 * p + lane / 4); });
  }
  alignas(64) float tile[kRowParts * 4][8];
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t r0 = 0; r0 < lists.r(); r0 += 8) {
      __m512 sum[kSets][kRowParts][kOutParts] = {};
      pairs<kSets>(lists, b, r0,
                   [&](const Bf16* a, const Bf16* c, int64_t k, int64_t l, int q, auto two) SP_ALWAYS_INLINE {
                     constexpr bool kBoth = decltype(two)::value == 1;
                     const __m512i both = weights_of<L::kContiguous, kBoth>(a, c);
                     const __m512i first = inputs_of<kWidth>(panel, k);
                     const __m512i second = kBoth ? inputs_of<kWidth>(panel, l) : _mm512_setzero_si512();
                     __m512i w[kOutParts];
                     SP_UNROLL for (int p = 0; p < kOutParts; ++p) w[p] = _mm512_permutexvar_epi16(expand_w[p], both);
                     SP_UNROLL for (int p = 0; p < kRowParts; ++p) {
                       const __m512i x = _mm512_permutex2var_epi16(first, expand_x[p], second);
                       SP_UNROLL for (int o = 0; o < kOutParts; ++o) sum[q][p][o] = dot(sum[q][p][o], w[o], x);
                     }
                   });
      SP_UNROLL for (int p = 0; p < kRowParts; ++p) {
        SP_UNROLL for (int o = 0; o < kOutParts; ++o) {
          __m512 total = sum[0][p][o];
          SP_UNROLL for (int q = 1; q < kSets; ++q) total += sum[q][p][o];
          if (kWidth == 2) {
            _mm512_store_ps(tile[0], total);
          } else {
            _mm_store_ps(tile[4 * p] + 4 * o, _mm512_castps512_ps128(total));
            _mm_store_ps(tile[4 * p + 1] + 4 * o, _mm512_extractf32x4_ps(total, 1));
            _mm_store_ps(tile[4 * p + 2] + 4 * o, _mm512_extractf32x4_ps(total, 2));
            _mm_store_ps(tile[4 * p + 3] + 4 * o, _mm512_extractf32x4_ps(total, 3));
          }
        }
      }
      const int64_t n = b * lists.r() + r0, live = lists.live(b, r0, 8);
      for (int64_t i = 0; i < rows; ++i) put_row<8>(epilogue, row + i, n, load<8>(tile[i]), live);
    }
  }
}

// The pairs of one block row as the panel kernel reads them: weights[t][8] dwords, one per output, and where the two
// columns of x start in the panel. A lone last column is paired with row `empty` of the panel, which holds zeros.
struct PairBuffer {
  uint32_t* weights;
  int32_t* starts;  // two per pair

  // Room for two pairs per three columns, which blocks of C = 3 need; other C need less.
  PairBuffer(float* buffer, int64_t padded)
      : weights(reinterpret_cast<uint32_t*>(buffer)),
        starts(reinterpret_cast<int32_t*>(weights + (padded * 2 / 3 + 2) * 8)) {}
};

// Fills the buffer for outputs r0 .. r0 + height - 1 (weights of the others: zero). Returns the number of pairs.
template <typename L>
SP_INLINE int64_t pair_columns(const L& lists, int64_t b, int64_t r0, int64_t height, int64_t width, int64_t empty,
                               const PairBuffer& buffer) {
  const __m512i interleave = words([](int lane, int half) { return 8 * half + lane % 8; });
  int64_t t = 0;
  pairs<1>(lists, b, r0, [&](const Bf16* a, const Bf16* c, int64_t k, int64_t l, int, auto two) SP_ALWAYS_INLINE {
    constexpr bool kBoth = decltype(two)::value == 1;
    if (height == 8) {
      const __m512i both = _mm512_permutexvar_epi16(interleave, weights_of<false, kBoth>(a, c));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer.weights + t * 8), _mm512_castsi512_si256(both));
    } else {
      for (int64_t i = 0; i < 8; ++i) {
        const uint32_t low = i < height ? a[i].bits : 0, high = i < height && kBoth ? c[i].bits : 0;
        buffer.weights[t * 8 + i] = low | high << 16;
      }
    }
    buffer.starts[2 * t] = static_cast<int32_t>(k * width);
    buffer.starts[2 * t + 1] = static_cast<int32_t>((kBoth ? l : empty) * width);
    ++t;
  });
  return t;
}

// Sums of kS outputs and 16 * kZ rows of a K-major panel.
template <int kS, int kZ>
struct PanelSums {
  static constexpr int kWidth = 16 * kZ;
  __m512 sum[kS][kZ] = {};
  const __m512i low = words([](int lane, int half) { return 32 * half + lane; });
  const __m512i high = words([](int lane, int half) { return 32 * half + 16 + lane; });

  SP_INLINE void add(const Bf16* a, const Bf16* b, const uint32_t* weights) {
    __m512i x[kZ];
    if constexpr (kZ == 2) {
      const __m512i first = _mm512_loadu_si512(a), second = _mm512_loadu_si512(b);
      x[0] = _mm512_permutex2var_epi16(first, low, second);
      x[1] = _mm512_permutex2var_epi16(first, high, second);
    } else {
      const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
      const __m512i second = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
      x[0] = _mm512_permutex2var_epi16(first, low, second);
    }
    SP_UNROLL for (int r = 0; r < kS; ++r) {
      const __m512i w = _mm512_set1_epi32(static_cast<int>(weights[r]));
      SP_UNROLL for (int z = 0; z < kZ; ++z) sum[r][z] = dot(sum[r][z], x[z], w);
    }
  }

  SP_INLINE void put(float* tile) const {
    SP_UNROLL for (int r = 0; r < kS; ++r) {
      SP_UNROLL for (int z = 0; z < kZ; ++z) _mm512_store_ps(tile + r * kWidth + z * 16, sum[r][z]);
    }
  }
};

template <int kS, int kZ>
SP_INLINE void dot_slice(const Bf16* panel, const PairBuffer& buffer, int64_t count, float* tile) {
  PanelSums<kS, kZ> sums;
  for (int64_t t = 0; t < count; ++t) {
    sums.add(panel + buffer.starts[2 * t], panel + buffer.starts[2 * t + 1], buffer.weights + 8 * t);
  }
  sums.put(tile);
}

// The same for 8x1 blocks, whose pairs are made kAhead pairs before their use, in the shadow of the dot products.
template <int kZ, typename L>
SP_INLINE void dot_slice_8x1(const L& lists, const Bf16* panel, int64_t b, int64_t empty, const PairBuffer& buffer,
                             float* tile) {
  constexpr int64_t kAhead = 8;
  const __m512i interleave = words([](int lane, int half) { return 8 * half + lane % 8; });
  const int64_t begin = lists.crow[b], length = lists.crow[b + 1] - begin, count = length / 2;
  const auto make = [&](int64_t t, auto two) SP_ALWAYS_INLINE {
    const Bf16 *first = lists.block(begin + 2 * t), *second = lists.block(begin + 2 * t + decltype(two)::value);
    const __m512i both = weights_of<L::kContiguous, decltype(two)::value == 1>(first, second);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer.weights + t * 8),
                        _mm512_castsi512_si256(_mm512_permutexvar_epi16(interleave, both)));
  };
  const auto* col = lists.col + begin;
  PanelSums<8, kZ> sums;
  for (int64_t t = 0; t < kAhead && t < count; ++t) make(t, Int<1>{});
  const auto add = [&](int64_t t) SP_ALWAYS_INLINE {
    sums.add(panel + int64_t(col[2 * t]) * (16 * kZ), panel + int64_t(col[2 * t + 1]) * (16 * kZ),
             buffer.weights + 8 * t);
  };
  int64_t t = 0;
  for (; t + kAhead < count; ++t) {
    make(t + kAhead, Int<1>{});
    add(t);
  }
  for (; t < count; ++t) add(t);
  if (length % 2 != 0) {
    make(count, Int<0>{});
    sums.add(panel + int64_t(col[2 * count]) * (16 * kZ), panel + empty * (16 * kZ), buffer.weights + 8 * count);
  }
  sums.put(tile);
}

// `buffer` has room for the pairs of one block row; row `padded` of the panel holds zeros.
template <int kZ, typename L>
void dot_panel(const L& lists, const Epilogue<Bf16, float>& epilogue, const Bf16* panel, float* buffer, int64_t padded,
               int64_t row, int64_t rows, int64_t b0, int64_t b1) {
  constexpr int kWidth = 16 * kZ;
  alignas(64) float tile[8 * kWidth];
  const PairBuffer pairs(buffer, padded);
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t r0 = 0; r0 < lists.r(); r0 += 8) {
      const int64_t height = lists.r() - r0 < 8 ? lists.r() - r0 : 8;
      if constexpr (L::kEightByOne) {
        dot_slice_8x1<kZ>(lists, panel, b, padded, pairs, tile);
      } else {
        const int64_t count = pair_columns(lists, b, r0, height, kWidth, padded, pairs);
        if (height > 4) {
          dot_slice<8, kZ>(panel, pairs, count, tile);
        } else {
          dot_slice<4, kZ>(panel, pairs, count, tile);
        }
      }
      put_panel<kWidth>(epilogue, tile, row, rows, b * lists.r() + r0, lists.live(b, r0, height));
    }
  }
}

}  // namespace
}  // namespace sp

#define SP_DOT_BF16 1
#endif
