// bf16 products by vdpbf16ps: every dword lane adds two products, of an input pair (a, b) with the weights of one
// output.
//
// Layout pairs_bf16-inl.h
// Maths  vdpbf16ps: products exact, sums float, denormal operands and results taken as zero. M = 1: float multiply-adds
// Cost   a Zen 5 (4.2 GHz; two dot products and two vector loads a cycle) takes per pair: M = 1 1.9 cycles, M = 2 2.0,
//        M = 4 2.2, bound by loads; M = 8 3.4; up to 16 rows 4.8, up to 32 8.7, of which 4 and 8 are dot products. Per
//        slice, for sums and y: 15 cycles at M = 1, 36 at M = 8, 80 at M = 32, as much as 8 to 12 pairs. Packing x
//        comes once per panel
#pragma once

#include "core/interleave-inl.h"
#include "core/lines-inl.h"
#include "core/pairs_bf16-inl.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

namespace sp {
namespace {

SP_INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// A column of `kBytes` of a panel.
template <int kBytes, typename T>
SP_INLINE const T* column_at(const T* panel, int64_t twice) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(panel) + twice * (kBytes / 2));
}

// Calls sums(s, to) for every slice of block rows b0 .. b1 - 1: it writes what `rows` rows have for eight outputs.
template <int kRows, typename Sums>
SP_INLINE void for_slices(const ProductArgs& args, int64_t row, int64_t rows, int64_t b0, int64_t b1,
                          const Sums& sums) {
  const Epilogue<Bf16, float> epilogue(args);
  const Slices slices(args);
  Lines<kRows, Bf16> lines(epilogue, row, rows);
  for (int64_t s = b0 * slices.per_row; s < b1 * slices.per_row; ++s) {
    sums(s, lines.place(slices.output(s), slices.outputs(s)));
  }
  lines.flush();
}

// --- M = 1 -----------------------------------------------------------------------------------------------------------
// Weights of the first column are the low halves of the dwords, of the second the high halves, so that a shift and a
// mask widen them; two pairs at a time. x: floats, 0 behind the last.
template <typename Index>
SP_INLINE void dot_row(const Pairs<Index>& pairs, const float* x, float* to) {
  __m512 first[2] = {}, second[2] = {};
  const auto two = [&](int64_t k, int64_t l) SP_ALWAYS_INLINE {
    const auto one = [&](int64_t k) SP_ALWAYS_INLINE { return _mm_load_ss(column_at<4>(x, k)); };
    return _mm512_mask_broadcastss_ps(_mm512_broadcastss_ps(one(k)), 0xff00, one(l));
  };
  const auto add = [&](int64_t t, int q) SP_ALWAYS_INLINE {
    __m512i bits = _mm512_load_si512(pairs.weights + 8 * t);
    SP_KEEP(bits);  // one load, not one for each use
    fetch_ahead(pairs.cold, pairs.weights + 8 * t);
    Columns a, b;
    if constexpr (sizeof(Index) == 2) {
      uint64_t four;
      memcpy(&four, pairs.inputs + 2 * t, sizeof four);
      a = {static_cast<int64_t>(four & 0xffff), static_cast<int64_t>(four >> 16 & 0xffff)};
      b = {static_cast<int64_t>(four >> 32 & 0xffff), static_cast<int64_t>(four >> 48)};
    } else {
      a = columns_of(pairs.inputs, t), b = columns_of(pairs.inputs, t + 1);
    }
    const __m512i high = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    first[q] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), two(a.first, b.first), first[q]);
    second[q] = _mm512_fmadd_ps(_mm512_castsi512_ps(high), two(a.second, b.second), second[q]);
  };
  int64_t t = 0;
  for (; t + 2 < pairs.count; t += 4) {
    add(t, 0);
    add(t + 2, 1);
  }
  if (t < pairs.count) add(t, 0);
  const __m512 sum = (first[0] + second[0]) + (first[1] + second[1]);
  _mm256_storeu_ps(to, _mm512_castps512_ps256(sum) + _mm512_extractf32x8_ps(sum, 1));
}

// --- panels ----------------------------------------------------------------------------------------------------------
// A panel of kRows rows of x is K-major, row(i) the row in place i of each column. With 32 rows, a column is a
// register, and rows are placed so that unpacking makes the pairs: a Zen 5 unpacks four registers a cycle beside the
// dot products, where other permutes take the place of some.
SP_INLINE int row_as_it_is(int i) { return i; }
SP_INLINE int row_to_unpack(int i) { return i / 8 * 2 + i % 2 + i % 8 / 2 * 8; }

template <int kRows>
void pack_panel_of(const Bf16* x, int64_t stride, int64_t rows, int64_t length, int64_t padded, Bf16* panel) {
  pack_words<kRows>(&x->bits, stride, rows, length, padded, &panel->bits, kRows == 32 ? row_to_unpack : row_as_it_is);
}

// --- M in 2..8 -------------------------------------------------------------------------------------------------------
// kWidth rows, 4 or 8, of a panel [K][kWidth], one pair at a time. With 4 rows, a vector of sums has two rows of eight
// outputs; with 8, four rows, in its 128-bit parts, of four outputs. With 4 rows, a permute makes the inputs of a part;
// with 8, one puts a row of each part beside the other, and shuffles, which are cheaper, spread them.
template <int kWidth>
struct SquareSums {
  static constexpr int kParts = 2, kHalves = kWidth / 4;  // of the rows, of the outputs

  __m512i expand[kParts], expand_block[kHalves];

  SquareSums() {
    for (int h = 0; h < kHalves; ++h) {
      expand_block[h] =
          words([&](int lane, int half) { return 8 * half + (kWidth == 8 ? 4 * h + lane % 4 : lane % 8); });
    }
    for (int p = 0; p < kParts; ++p) {
      expand[p] = words(
          [&](int lane, int half) { return 32 * half + (kWidth == 8 ? lane / 4 + lane % 2 * 4 : 2 * p + lane / 8); });
    }
  }

  SP_INLINE static __m512i column(const Bf16* panel, int64_t k) {
    const Bf16* from = column_at<2 * kWidth>(panel, k);
    if constexpr (kWidth == 4) return _mm512_castsi128_si512(_mm_loadu_si64(from));
    return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }

  // Weights of the outputs of half h, as often as there are rows in a part.
  SP_INLINE static __m512i spread(const uint32_t* weights, int h) {
    if constexpr (kWidth == 4) {
      return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights)));
    }
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + 4 * h)));
  }

  template <typename Index>
  SP_INLINE void operator()(const Pairs<Index>& pairs, const Bf16* panel, float* to) const {
    Sums sum = {};
    const auto add = [&](int64_t t, int q) SP_ALWAYS_INLINE {
      const Columns k = columns_of(pairs.inputs, t);
      fetch_ahead(pairs.cold, pairs.weights + 8 * t);
      __m512i w[kHalves];
      SP_UNROLL for (int h = 0; h < kHalves; ++h) w[h] = spread(pairs.weights + 8 * t, h);
      add_pair(column(panel, k.first), column(panel, k.second), w, sum[q]);
    };
    int64_t t = 0;
    for (; t + kSets <= pairs.count; t += kSets) {
      SP_UNROLL for (int q = 0; q < kSets; ++q) add(t + q, q);
    }
    for (; t < pairs.count; ++t) add(t, 0);
    put(sum, to);
  }

  // The same of 8x1 blocks as they are in the lists.
  template <typename L>
  SP_INLINE void operator()(const L& lists, int64_t b, const Bf16* panel, float* to) const {
    Sums sum = {};
    const auto add = [&](int64_t e, int q) SP_ALWAYS_INLINE {
      __m256i both;
      if constexpr (L::kContiguous) {
        both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lists.block(e)));
      } else {
        both = _mm256_inserti128_si256(_mm256_castsi128_si256(block(lists, e)), block(lists, e + 1), 1);
      }
      __m512i w[kHalves];
      SP_UNROLL for (int h = 0; h < kHalves; ++h) w[h] = spread_block(both, h);
      add_pair(column(panel, 2 * lists.input(e)), column(panel, 2 * lists.input(e + 1)), w, sum[q]);
    };
    int64_t e = lists.crow[b];
    const int64_t end = lists.crow[b + 1];
    for (; e + 2 * kSets <= end; e += 2 * kSets) {
      SP_UNROLL for (int q = 0; q < kSets; ++q) add(e + 2 * q, q);
    }
    for (; e + 2 <= end; e += 2) add(e, 0);
    if (e < end) {
      __m512i w[kHalves];
      SP_UNROLL for (int h = 0; h < kHalves; ++h) w[h] = spread_block(_mm256_zextsi128_si256(block(lists, e)), h);
      add_pair(column(panel, 2 * lists.input(e)), _mm512_setzero_si512(), w, sum[0]);
    }
    put(sum, to);
  }

 private:
  static constexpr int kSets = 4;  // chains of additions: the latency of the dot product
  using Sums = __m512[kSets][kParts][kHalves];

  template <typename L>
  SP_INLINE static __m128i block(const L& lists, int64_t e) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(lists.block(e)));
  }
  SP_INLINE __m512i spread_block(__m256i both, int h) const {
    return _mm512_permutexvar_epi16(expand_block[h], _mm512_castsi256_si512(both));
  }

  SP_INLINE void add_pair(__m512i first, __m512i second, const __m512i* w, __m512 (*sum)[kHalves]) const {
    __m512i both = first;
    if constexpr (kWidth == 8) both = _mm512_permutex2var_epi16(first, expand[0], second);
    SP_UNROLL for (int p = 0; p < kParts; ++p) {
      __m512i x;
      if constexpr (kWidth == 8) {
        x = p == 0 ? _mm512_shuffle_epi32(both, _MM_PERM_AAAA) : _mm512_shuffle_epi32(both, _MM_PERM_BBBB);
      } else {
        x = _mm512_permutex2var_epi16(first, expand[p], second);
      }
      SP_UNROLL for (int h = 0; h < kHalves; ++h) sum[p][h] = dot(sum[p][h], x, w[h]);
    }
  }

  SP_INLINE static void put(const Sums& sum, float* to) {
    SP_UNROLL for (int p = 0; p < kParts; ++p) {
      SP_UNROLL for (int h = 0; h < kHalves; ++h) {
        const __m512 v = (sum[0][p][h] + sum[1][p][h]) + (sum[2][p][h] + sum[3][p][h]);
        float* at = to + kWidth / 2 * p * kLineStride + 4 * h;
        if constexpr (kWidth == 4) {
          _mm256_storeu_ps(at, _mm512_castps512_ps256(v));
          _mm256_storeu_ps(at + kLineStride, _mm512_extractf32x8_ps(v, 1));
        } else {
          _mm_storeu_ps(at, _mm512_castps512_ps128(v));
          _mm_storeu_ps(at + kLineStride, _mm512_extractf32x4_ps(v, 1));
          _mm_storeu_ps(at + 2 * kLineStride, _mm512_extractf32x4_ps(v, 2));
          _mm_storeu_ps(at + 3 * kLineStride, _mm512_extractf32x4_ps(v, 3));
        }
      }
    }
  }
};

// kRows rows, 2 to 5, of a panel [K][4 or 8]. A vector of sums belongs to one row, eight outputs for each of two pairs
// at a time, whose weights so lie as they are needed. Four columns of the panel become the pairs of four rows, once in
// each 128-bit part, by steps that a Zen 5 does four of in a cycle: broadcasts that need no permute, unpacking, and a
// shuffle within the parts that spreads one row. (M = 4: 1.8 cycles a pair for 2.1. Processors that take two turns for
// 512 bits lose by it, and so do more rows.)
template <int kRows>
struct RowSums {
  static constexpr int kWidth = kRows <= 4 ? 4 : 8;

  // Column k in the lower half, l in the upper.
  SP_INLINE static __m512i columns(const Bf16* panel, int64_t k, int64_t l) {
    const Bf16 *first = column_at<2 * kWidth>(panel, k), *second = column_at<2 * kWidth>(panel, l);
    if constexpr (kWidth == 4) {
      const auto four = [](const Bf16* from) SP_ALWAYS_INLINE {
        return _mm512_broadcastsd_pd(_mm_load_sd(reinterpret_cast<const double*>(from)));
      };
      return _mm512_castpd_si512(_mm512_mask_mov_pd(four(first), 0xf0, four(second)));
    } else {
      const auto eight = [](const Bf16* from) SP_ALWAYS_INLINE {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      };
      return _mm512_inserti64x4(_mm512_castsi256_si512(eight(first)), eight(second), 1);
    }
  }

  template <typename Index>
  SP_INLINE void operator()(const Pairs<Index>& pairs, const Bf16* panel, float* to) const {
    __m512 sum[2][kRows] = {};  // two chains of additions: the latency of the dot product
    const auto add = [&](int64_t t, int q) SP_ALWAYS_INLINE {
      const Columns k = columns_of(pairs.inputs, t), l = columns_of(pairs.inputs, t + 1);
      const __m512i a = columns(panel, k.first, l.first), b = columns(panel, k.second, l.second);
      const __m512i w = _mm512_load_si512(pairs.weights + 8 * t);
      fetch_ahead(pairs.cold, pairs.weights + 8 * t);
      const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
      const auto row = [&](auto number) SP_ALWAYS_INLINE {
        constexpr int kRow = decltype(number)::value;
        if constexpr (kRow < kRows) {
          const __m512i x = _mm512_shuffle_epi32(kRow < 4 ? low : high, static_cast<_MM_PERM_ENUM>(kRow % 4 * 0x55));
          sum[q][kRow] = dot(sum[q][kRow], x, w);
        }
      };
      row(Int<0>{}), row(Int<1>{}), row(Int<2>{}), row(Int<3>{});
      row(Int<4>{}), row(Int<5>{}), row(Int<6>{}), row(Int<7>{});
    };
    int64_t t = 0;
    for (; t + 2 < pairs.count; t += 4) {
      add(t, 0);
      add(t + 2, 1);
    }
    if (t < pairs.count) add(t, 0);
    SP_UNROLL for (int i = 0; i < kRows; ++i) {
      const __m512 v = sum[0][i] + sum[1][i];
      _mm256_storeu_ps(to + i * kLineStride, _mm512_castps512_ps256(v) + _mm512_extractf32x8_ps(v, 1));
    }
  }
};

// --- M > 8 -----------------------------------------------------------------------------------------------------------
// 8 * kZ rows of a panel: a vector of sums has eight rows of two outputs, so that a pair of inputs of all
// rows takes two loads, and a weight is broadcast two outputs at a time.
template <int kZ>
struct PanelSums {
  static constexpr int kWidth = kZ == 2 ? 16 : 32;
  static constexpr int kSets = kZ <= 3 ? 2 : 1;  // chains of additions: the latency of the dot product

  // kWidth 16: pairs of rows 0, 1, 8, 9 in the first 128 bits, and so on
  const __m512i paired =
      words([](int lane, int half) { return 32 * half + lane / 4 * 2 + lane % 2 + lane % 4 / 2 * 8; });

  // x[z]: pairs of rows 8 * z .., each twice.
  SP_INLINE void inputs(const Bf16* panel, const Columns& k, __m512i* x) const {
    const Bf16 *first = column_at<2 * kWidth>(panel, k.first), *second = column_at<2 * kWidth>(panel, k.second);
    if constexpr (kZ == 2) {
      const __m512i a = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
      const __m512i b = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
      const __m512i both = _mm512_permutex2var_epi16(a, paired, b);
      x[0] = _mm512_unpacklo_epi32(both, both);
      x[1] = _mm512_unpackhi_epi32(both, both);
    } else {
      const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
      const __m512i l = _mm512_unpacklo_epi16(a, b), h = _mm512_unpackhi_epi16(a, b);
      x[0] = _mm512_unpacklo_epi32(l, l);
      x[1] = _mm512_unpackhi_epi32(l, l);
      x[2] = _mm512_unpacklo_epi32(h, h);
      if constexpr (kZ == 4) x[3] = _mm512_unpackhi_epi32(h, h);
    }
  }

  // total[z][p]: rows 8 * z .., outputs 2 * p and 2 * p + 1; start[p] of all rows.
  template <typename Index>
  SP_INLINE void operator()(const Pairs<Index>& pairs, const Bf16* panel, const __m512* start,
                            __m512 (*total)[4]) const {
    __m512 sum[kSets][kZ][4] = {};
    SP_UNROLL for (int z = 0; z < kZ; ++z) { SP_UNROLL for (int p = 0; p < 4; ++p) sum[0][z][p] = start[p]; }
    const auto add = [&](int64_t t, int q) SP_ALWAYS_INLINE {
      __m512i x[kZ];
      inputs(panel, columns_of(pairs.inputs, t), x);
      fetch_ahead(pairs.cold, pairs.weights + 8 * t);
      const double* weights = reinterpret_cast<const double*>(pairs.weights + 8 * t);
      SP_UNROLL for (int p = 0; p < 4; ++p) {
        const __m512i w = _mm512_castpd_si512(_mm512_broadcastsd_pd(_mm_load_sd(weights + p)));
        SP_UNROLL for (int z = 0; z < kZ; ++z) sum[q][z][p] = dot(sum[q][z][p], x[z], w);
      }
    };
    int64_t t = 0;
    for (; t + kSets <= pairs.count; t += kSets) {
      SP_UNROLL for (int q = 0; q < kSets; ++q) add(t + q, q);
    }
    if (kSets == 2 && t < pairs.count) add(t, 0);
    SP_UNROLL for (int z = 0; z < kZ; ++z) {
      SP_UNROLL for (int p = 0; p < 4; ++p) total[z][p] =
          kSets == 2 ? sum[0][z][p] + sum[kSets - 1][z][p] : sum[0][z][p];
    }
  }
};

// Eight rows of eight outputs, as PanelSums leaves them, to rows kLineStride apart: what belongs to a row is one
// quadword of four vectors.
SP_INLINE void put_square(const __m512* sum, float* to) {
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  SP_UNROLL for (int odd = 0; odd < 2; ++odd) {
    const auto quads = [&](int p) SP_ALWAYS_INLINE {
      const __m512d a = _mm512_castps_pd(sum[p]), b = _mm512_castps_pd(sum[p + 1]);
      return odd ? _mm512_unpackhi_pd(a, b) : _mm512_unpacklo_pd(a, b);
    };
    const __m512d left = quads(0), right = quads(2);
    const __m512 top = _mm512_castpd_ps(_mm512_permutex2var_pd(left, low, right));
    const __m512 bottom = _mm512_castpd_ps(_mm512_permutex2var_pd(left, high, right));
    float* at = to + odd * kLineStride;
    _mm256_storeu_ps(at, _mm512_castps512_ps256(top));
    _mm256_storeu_ps(at + 2 * kLineStride, _mm512_extractf32x8_ps(top, 1));
    _mm256_storeu_ps(at + 4 * kLineStride, _mm512_castps512_ps256(bottom));
    _mm256_storeu_ps(at + 6 * kLineStride, _mm512_extractf32x8_ps(bottom, 1));
  }
}

__attribute__((noinline)) void activate_all(__m512* sums, int64_t count, Activation activation) {
  for (int64_t i = 0; i < count; ++i) sums[i] = (__m512)activate<float, 16>((Vec<float, 16>)sums[i], activation);
}

// Eight rows of four slices, from the sums of each as bf16: dword i of a half of a vector is two outputs of row i.
template <int kZ>
SP_INLINE void turn(const __m512i (*slices)[kZ][2], int z, __m512i* line) {
  const __m512i low = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
  __m512i part[2][4];  // four rows, in 128-bit parts, of the eight outputs of a slice
  SP_UNROLL for (int s = 0; s < 4; ++s) {
    const __m512i a = slices[s][z][0], b = slices[s][z][1];
    part[0][s] = _mm512_permutex2var_epi32(a, low, b);
    part[1][s] = _mm512_permutex2var_epi32(a, high, b);
  }
  SP_UNROLL for (int half = 0; half < 2; ++half) {
    const __m512i* p = part[half];
    const __m512i low0 = _mm512_shuffle_i32x4(p[0], p[1], 0x44), high0 = _mm512_shuffle_i32x4(p[0], p[1], 0xee);
    const __m512i low1 = _mm512_shuffle_i32x4(p[2], p[3], 0x44), high1 = _mm512_shuffle_i32x4(p[2], p[3], 0xee);
    line[4 * half] = _mm512_shuffle_i32x4(low0, low1, 0x88);
    line[4 * half + 1] = _mm512_shuffle_i32x4(low0, low1, 0xdd);
    line[4 * half + 2] = _mm512_shuffle_i32x4(high0, high1, 0x88);
    line[4 * half + 3] = _mm512_shuffle_i32x4(high0, high1, 0xdd);
  }
}

// The bias of eight outputs, `live` of which there are, two to a vector as in PanelSums.
SP_INLINE void start_from(const Bf16* bias, int64_t live, __m512* start) {
  uint32_t pairs[4] = {};
  if (bias != nullptr) {
    if (__builtin_expect(live >= 8, 1)) {
      memcpy(pairs, bias, sizeof pairs);
    } else {
      memcpy(pairs, bias, static_cast<size_t>(live) * sizeof *bias);
    }
  }
  const __m512i odd = _mm512_set1_epi64(16), high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  SP_UNROLL for (int p = 0; p < 4; ++p) {
    const __m512i two = _mm512_sllv_epi32(_mm512_set1_epi32(static_cast<int>(pairs[p])), odd);
    start[p] = _mm512_castsi512_ps(_mm512_and_si512(two, high));
  }
}

// For R % 8 == 0 and y of bf16 without a residual, which is added before the rounding. Finished outputs are kept as
// bf16 until eight cache lines of each row are there: with N a multiple of 2048 all rows of y share one set of the
// first cache, and a line that is written alone waits 15 cycles for the second cache (Zen 5); of eight neighbours,
// eight rows at a time, each takes two. They are written in parts between the slices of the next outputs, beside their
// dot products.
template <int kZ, typename Source>
void dot_panel_plain(const ProductArgs& args, const Source& source, const Bf16* panel, int64_t row, int64_t rows,
                     int64_t s0, int64_t s1) {
  constexpr int64_t kTile = 32;  // slices
  alignas(64) __m512i tile[2][kTile][kZ][2];
  const PanelSums<kZ> sums;
  const Source own = source;  // known to be nobody else's
  const Bf16* bias = static_cast<const Bf16*>(args.bias);
  Bf16* y = static_cast<Bf16*>(args.y) + row * args.out;
  const int64_t out = args.out;
  const Activation activation = args.activation;
  int side = 0;
  int64_t begin = 0, end = 0, part = 0, parts = 0;  // outputs that wait in the other side of the tile, and in parts
  const auto write = [&]() SP_ALWAYS_INLINE {
    const int64_t z = part / 8, n = begin / 256 * 256 + part % 8 * 32;
    ++part;
    if (n + 32 <= begin || n >= end) return;
    __m512i line[8];
    turn<kZ>(tile[side ^ 1] + n % 256 / 8, static_cast<int>(z), line);
    Bf16* to = y + 8 * z * out + n;
    const int64_t before = begin > n ? begin - n : 0, after = end < n + 32 ? n + 32 - end : 0, left = rows - 8 * z;
    if (__builtin_expect(left >= 8 && before + after == 0, 1)) {
      SP_UNROLL for (int i = 0; i < 8; ++i) _mm512_storeu_si512(to + i * out, line[i]);
    } else {
      const __mmask32 live = (0xffffffffu << before) & (0xffffffffu >> after);
      SP_UNROLL for (int i = 0; i < 8; ++i) {
        if (i < left) _mm512_mask_storeu_epi16(to + i * out, live, line[i]);
      }
    }
  };
  for (int64_t s = s0;; side ^= 1) {
    const int64_t first = s;
    for (; s < s1 && (s == first || s % kTile != 0); ++s) {
      __m512 start[4], sum[kZ][4];
      start_from(bias == nullptr ? nullptr : bias + 8 * s, out - 8 * s, start);
      sums(own.slice(s), panel, start, sum);
      if (__builtin_expect(activation != Activation::kNone, 0)) {
        __m512 copy[kZ][4];  // `sum` itself must not have an address, or it would live in memory
        SP_UNROLL for (int i = 0; i < 4 * kZ; ++i) copy[i / 4][i % 4] = sum[i / 4][i % 4];
        activate_all(copy[0], 4 * kZ, activation);
        SP_UNROLL for (int i = 0; i < 4 * kZ; ++i) sum[i / 4][i % 4] = copy[i / 4][i % 4];
      }
      __m512i(*to)[2] = tile[side][s % kTile];
      SP_UNROLL for (int z = 0; z < kZ; ++z) {
        SP_UNROLL for (int h = 0; h < 2; ++h) to[z][h] = (__m512i)_mm512_cvtne2ps_pbh(sum[z][2 * h + 1], sum[z][2 * h]);
      }
      if (part < parts) write();
    }
    while (part < parts) write();
    if (first == s) return;
    begin = 8 * first, end = 8 * s < out ? 8 * s : out;
    part = 0, parts = (rows + 7) / 8 * 8;
  }
}

template <int kZ, typename Source>
void dot_panel(const ProductArgs& args, const Source& source, const Bf16* panel, int64_t row, int64_t rows, int64_t b0,
               int64_t b1) {
  if (args.r % 8 == 0 && args.residual == nullptr && args.initial == nullptr && !args.wide_y) {
    const int64_t per_row = Slices(args).per_row, all = (args.out + 7) / 8;  // some may lie past the last output
    const int64_t end = b1 * per_row < all ? b1 * per_row : all;
    return dot_panel_plain<kZ>(args, source, panel, row, rows, b0 * per_row, end);
  }
  const PanelSums<kZ> sums;
  const __m512 zero[4] = {};
  for_slices<8 * kZ>(args, row, rows, b0, b1, [&](int64_t s, float* to) SP_ALWAYS_INLINE {
    __m512 sum[kZ][4];
    sums(source.slice(s), panel, zero, sum);
    for (int z = 0; z < kZ; ++z) put_square(sum[z], to + 8 * z * kLineStride);
  });
}

}  // namespace
}  // namespace sp

#define SP_DOT_BF16 1
#endif
