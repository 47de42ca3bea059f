// bf16 products by vdpbf16ps: every dword lane adds two products, of an input pair (a, b) with the weights of one
// output.
//
// A pair is two columns of one slice, the eight (or last fewer) outputs of a block row: weights [pair][8][2], the
// columns of x [pair][2]. An even number of pairs: what is missing has weights 0 and names a column that x does not
// have, whose input is 0. Made once for a prepared product (arrange_bf16), else slice by slice into a buffer.
// Maths  vdpbf16ps: products exact, sums float, denormal operands and results taken as zero. M = 1: float multiply-adds
// Cost   bound by loads or dot products, whichever are more (a Zen 5 does two of each per cycle, 512 bits wide, a Zen 4
//        one), per pair: M = 1 2.5 / 2 loads; M = 2..4 3 loads; M = 5..8 4 and 4; above, per eight rows 4 dot products,
//        with 6 loads for up to 32 rows
#pragma once

#include "core/interleave-inl.h"
#include "core/lines-inl.h"
#include "core/widen-inl.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

namespace sp {
namespace {

SP_INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// --- pairs -----------------------------------------------------------------------------------------------------------
template <typename Index>
struct Pairs {
  const uint32_t* weights;
  const Index* inputs;
  int64_t count;  // without the one that makes them even
};

SP_INLINE int64_t slices_per_list(const ProductArgs& args) { return (args.r + 7) / 8; }
SP_INLINE int64_t padded_inputs(const ProductArgs& args) { return (args.in + args.c - 1) / args.c * args.c; }
SP_INLINE int64_t pairs_of_list(const ProductArgs& args, int64_t b) {
  return ((args.begin[b + 1] - args.begin[b]) * args.c + 1) / 2;
}

// Writes the pairs of outputs r0 .. r0 + 7 of block row b.
template <typename L, typename Index>
SP_INLINE void make_pairs(const L& lists, int64_t b, int64_t r0, int64_t padded, uint32_t* weights, Index* inputs) {
  const int64_t height = lists.r() - r0 < 8 ? lists.r() - r0 : 8;
  const Index none = static_cast<Index>(padded);
  const auto column = [&](const Bf16* from) SP_ALWAYS_INLINE {
    if (height == 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm_maskz_loadu_epi16(static_cast<__mmask8>((1 << height) - 1), from);
  };
  const auto put = [&](__m128i first, __m128i second, Index k, Index l) SP_ALWAYS_INLINE {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(weights), _mm_unpacklo_epi16(first, second));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(weights + 4), _mm_unpackhi_epi16(first, second));
    inputs[0] = k, inputs[1] = l;
    weights += 8, inputs += 2;
  };
  const uint32_t* start = weights;
  const __m128i zero = _mm_setzero_si128();
  int64_t e = lists.crow[b];
  const int64_t end = lists.crow[b + 1];
  const auto input = [&](int64_t e, int64_t j) SP_ALWAYS_INLINE { return static_cast<Index>(lists.input(e) + j); };
  if (lists.c() == 1) {
    for (; e + 2 <= end; e += 2) {
      put(column(lists.block(e) + r0), column(lists.block(e + 1) + r0), input(e, 0), input(e + 1, 0));
    }
    if (e < end) put(column(lists.block(e) + r0), zero, input(e, 0), none);
  } else {
    __m128i waiting = zero;
    Index at = none;
    bool odd = false;
    for (; e < end; ++e) {
      for (int64_t j = 0; j < lists.c(); ++j, odd = !odd) {
        const __m128i more = column(lists.block(e) + j * lists.r() + r0);
        if (odd) put(waiting, more, at, input(e, j));
        waiting = more, at = input(e, j);
      }
    }
    if (odd) put(waiting, zero, at, none);
  }
  if ((weights - start) % 16 != 0) put(zero, zero, none, none);
}

// Pairs of all slices in a row, and before them where each slice starts. Weights are 64-byte aligned.
struct ArrangedPairs {
  using Index = uint16_t;

  explicit ArrangedPairs(const ProductArgs& args, void* to)
      : args(args),
        starts(static_cast<int32_t*>(to)),
        weights(reinterpret_cast<uint32_t*>(starts + (args.lists * slices_per_list(args) + 16) / 16 * 16)),
        inputs(nullptr) {}

  explicit ArrangedPairs(const ProductArgs& args) : ArrangedPairs(args, const_cast<void*>(args.arranged)) {
    inputs = reinterpret_cast<Index*>(weights + 8 * starts[args.lists * slices_per_list(args)]);
  }

  SP_INLINE Pairs<Index> slice(int64_t b, int64_t r0) const {
    const int64_t start = starts[b * slices_per_list(args) + r0 / 8];
    return {weights + 8 * start, inputs + 2 * start, pairs_of_list(args, b)};
  }

  const ProductArgs& args;
  int32_t* starts;
  uint32_t* weights;
  Index* inputs;
};

// Arrange (types.h) for linear_bf16.
size_t arrange_bf16(const ProductArgs& args, void* to) {
  const int64_t padded = padded_inputs(args);
  if (padded > 0xffff) return 0;
  int64_t pairs = 0;
  ArrangedPairs arranged(args, to);
  int64_t slice = 0;
  for (int64_t b = 0; b < args.lists; ++b) {
    for (int64_t r0 = 0; r0 < args.r; r0 += 8) {
      if (to != nullptr) arranged.starts[slice++] = static_cast<int32_t>(pairs);
      pairs += (pairs_of_list(args, b) + 1) / 2 * 2;
    }
  }
  const int64_t slices = args.lists * slices_per_list(args);
  if (to != nullptr) {
    arranged.starts[slices] = static_cast<int32_t>(pairs);
    arranged.inputs = reinterpret_cast<uint16_t*>(arranged.weights + 8 * pairs);
    with_lists<Bf16>(args, [&](const auto& lists) {
      for (int64_t b = 0; b < args.lists; ++b) {
        for (int64_t r0 = 0; r0 < args.r; r0 += 8) {
          const int64_t start = arranged.starts[b * slices_per_list(args) + r0 / 8];
          make_pairs(lists, b, r0, padded, arranged.weights + 8 * start, arranged.inputs + 2 * start);
        }
      }
    });
  }
  return static_cast<size_t>((slices + 16) / 16 * 64 + pairs * (32 + 4));
}

// Pairs of the slice asked for last, in a buffer.
template <typename L>
struct BufferedPairs {
  using Index = int32_t;

  // Room for all columns of x in one slice.
  BufferedPairs(const ProductArgs& args, const L& lists, void* buffer)
      : args(args),
        lists(lists),
        padded(padded_inputs(args)),
        weights(static_cast<uint32_t*>(buffer)),
        inputs(reinterpret_cast<Index*>(weights + (padded / 2 + 2) * 8)) {}

  SP_INLINE Pairs<Index> slice(int64_t b, int64_t r0) const {
    make_pairs(lists, b, r0, padded, weights, inputs);
    return {weights, inputs, pairs_of_list(args, b)};
  }

  const ProductArgs& args;
  const L& lists;
  int64_t padded;
  uint32_t* weights;
  Index* inputs;
};

// Calls sums(pairs, to) for every slice of block rows b0 .. b1 - 1: it writes what `rows` rows have for eight outputs.
template <int kRows, typename Source, typename Sums>
SP_INLINE void for_slices(const ProductArgs& args, const Source& source, int64_t row, int64_t rows, int64_t b0,
                          int64_t b1, const Sums& sums) {
  const Epilogue<Bf16, float> epilogue(args);
  Lines<kRows, Bf16> lines(epilogue, row, rows);
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t r0 = 0; r0 < args.r; r0 += 8) {
      sums(source.slice(b, r0), lines.place(b * args.r + r0, args.r - r0 < 8 ? args.r - r0 : 8));
    }
  }
  lines.flush();
}

// --- M = 1 -----------------------------------------------------------------------------------------------------------
// Weights of the first column are the low halves of the dwords, of the second the high halves, so that a shift and a
// mask widen them; two pairs at a time. x: floats, 0 behind the last.
template <typename Index>
SP_INLINE void dot_row(const Pairs<Index>& pairs, const float* x, float* to) {
  constexpr int kSets = 2;
  __m512 first[kSets] = {}, second[kSets] = {};
  const auto two = [&](int64_t k, int64_t l) SP_ALWAYS_INLINE {
    return _mm512_mask_broadcastss_ps(_mm512_broadcastss_ps(_mm_load_ss(x + k)), 0xff00, _mm_load_ss(x + l));
  };
  const auto add = [&](int64_t t, int q) SP_ALWAYS_INLINE {
    __m512i bits = _mm512_load_si512(pairs.weights + 8 * t);
    SP_KEEP(bits);  // one load, not one for each use
    const Index* in = pairs.inputs + 2 * t;
    const __m512i high = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    first[q] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), two(in[0], in[2]), first[q]);
    second[q] = _mm512_fmadd_ps(_mm512_castsi512_ps(high), two(in[1], in[3]), second[q]);
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

// --- M in 2..8 -------------------------------------------------------------------------------------------------------
// One column of a panel [K][kWidth <= 8].
template <int kWidth>
SP_INLINE __m512i inputs_of(const Bf16* panel, int64_t k) {
  const Bf16* from = panel + k * kWidth;
  if constexpr (kWidth == 8) return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  if constexpr (kWidth == 4) return _mm512_castsi128_si512(_mm_loadu_si64(from));
  return _mm512_castsi128_si512(_mm_loadu_si32(from));
}

// kWidth 2 or 4: a vector of sums has two rows of eight outputs. 8: four rows, in its 128-bit parts, of four outputs.
template <int kWidth>
struct FewSums {
  static constexpr int kParts = kWidth == 8 ? 2 : kWidth / 2;  // of the rows
  static constexpr int kHalves = kWidth == 8 ? 2 : 1;          // of the outputs
  static constexpr int kSets = 4;                              // chains of additions: the latency of the dot product

  __m512i expand[kParts];

  FewSums() {
    for (int p = 0; p < kParts; ++p) {
      expand[p] = words([&](int lane, int half) { return 32 * half + (kWidth == 8 ? 4 * p + lane / 4 : 2 * p + lane / 8); });
    }
  }

  template <typename Index>
  SP_INLINE void operator()(const Pairs<Index>& pairs, const Bf16* panel, float* to) const {
    __m512 sum[kSets][kParts][kHalves] = {};
    const auto add = [&](int64_t t, int q) SP_ALWAYS_INLINE {
      const uint32_t* from = pairs.weights + 8 * t;
      const __m512i first = inputs_of<kWidth>(panel, pairs.inputs[2 * t]);
      const __m512i second = inputs_of<kWidth>(panel, pairs.inputs[2 * t + 1]);
      __m512i w[kHalves];
      SP_UNROLL for (int h = 0; h < kHalves; ++h) {
        if constexpr (kHalves == 2) {
          w[h] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 4 * h)));
        } else {
          w[h] = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        }
      }
      SP_UNROLL for (int p = 0; p < kParts; ++p) {
        const __m512i x = _mm512_permutex2var_epi16(first, expand[p], second);
        SP_UNROLL for (int h = 0; h < kHalves; ++h) sum[q][p][h] = dot(sum[q][p][h], x, w[h]);
      }
    };
    int64_t t = 0;
    for (; t + kSets <= pairs.count; t += kSets) {
      SP_UNROLL for (int q = 0; q < kSets; ++q) add(t + q, q);
    }
    for (; t < pairs.count; ++t) add(t, 0);
    SP_UNROLL for (int p = 0; p < kParts; ++p) {
      SP_UNROLL for (int h = 0; h < kHalves; ++h) {
        SP_UNROLL for (int q = 1; q < kSets; ++q) sum[0][p][h] += sum[q][p][h];
        const __m512 v = sum[0][p][h];
        if constexpr (kHalves == 2) {
          float* at = to + 4 * p * kLineStride + 4 * h;
          _mm_storeu_ps(at, _mm512_castps512_ps128(v));
          _mm_storeu_ps(at + kLineStride, _mm512_extractf32x4_ps(v, 1));
          _mm_storeu_ps(at + 2 * kLineStride, _mm512_extractf32x4_ps(v, 2));
          _mm_storeu_ps(at + 3 * kLineStride, _mm512_extractf32x4_ps(v, 3));
        } else {
          _mm256_storeu_ps(to + 2 * p * kLineStride, _mm512_castps512_ps256(v));
          _mm256_storeu_ps(to + (2 * p + 1) * kLineStride, _mm512_extractf32x8_ps(v, 1));
        }
      }
    }
  }
};

// --- M > 8 -----------------------------------------------------------------------------------------------------------
// 8 * kZ rows of a panel [K][kWidth]: a vector of sums has eight rows of two outputs, so that a pair of inputs of all
// rows takes two loads, and a weight is broadcast two outputs at a time.
template <int kZ, int kWidth>
struct PanelSums {
  static constexpr int kSets = kZ == 2 ? 2 : 1;  // chains of additions: the latency of the dot product

  __m512i expand[kZ];

  PanelSums() {
    for (int z = 0; z < kZ; ++z) {
      expand[z] = words([&](int lane, int half) { return 32 * half + 8 * z + lane / 2; });
    }
  }

  SP_INLINE static __m512i column(const Bf16* panel, int64_t k) {
    if constexpr (kWidth == 32) return _mm512_loadu_si512(panel + k * kWidth);
    return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + k * kWidth)));
  }

  template <typename Index>
  SP_INLINE void operator()(const Pairs<Index>& pairs, const Bf16* panel, float* to) const {
    __m512 sum[kSets][kZ][4] = {};
    const auto add = [&](int64_t t, int q) SP_ALWAYS_INLINE {
      const __m512i first = column(panel, pairs.inputs[2 * t]), second = column(panel, pairs.inputs[2 * t + 1]);
      __m512i x[kZ];
      SP_UNROLL for (int z = 0; z < kZ; ++z) x[z] = _mm512_permutex2var_epi16(first, expand[z], second);
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
    if constexpr (kSets == 2) {
      SP_UNROLL for (int z = 0; z < kZ; ++z) {
        SP_UNROLL for (int p = 0; p < 4; ++p) sum[0][z][p] += sum[1][z][p];
      }
    }
    // To rows of eight outputs: a row's are the quadwords of one place in four vectors.
    SP_UNROLL for (int z = 0; z < kZ; ++z) {
      const auto quads = [&](int p, bool odd) SP_ALWAYS_INLINE {
        const __m512d a = _mm512_castps_pd(sum[0][z][p]), b = _mm512_castps_pd(sum[0][z][p + 1]);
        return odd ? _mm512_unpackhi_pd(a, b) : _mm512_unpacklo_pd(a, b);
      };
      const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
      SP_UNROLL for (int odd = 0; odd < 2; ++odd) {
        const __m512d left = quads(0, odd != 0), right = quads(2, odd != 0);
        const __m512 top = _mm512_castpd_ps(_mm512_permutex2var_pd(left, low, right));
        const __m512 bottom = _mm512_castpd_ps(_mm512_permutex2var_pd(left, high, right));
        float* at = to + (8 * z + odd) * kLineStride;
        _mm256_storeu_ps(at, _mm512_castps512_ps256(top));
        _mm256_storeu_ps(at + 2 * kLineStride, _mm512_extractf32x8_ps(top, 1));
        _mm256_storeu_ps(at + 4 * kLineStride, _mm512_castps512_ps256(bottom));
        _mm256_storeu_ps(at + 6 * kLineStride, _mm512_extractf32x8_ps(bottom, 1));
      }
    }
  }
};

}  // namespace
}  // namespace sp

#define SP_DOT_BF16 1
#endif
