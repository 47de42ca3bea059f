// Products whose stored weights are narrower than their sums: bf16 and int8 weights widened to float on the way.
//
// y[M, N] = x[M, K] @ W[N, K].T, layout `bcsr` as in linear-inl.h, W bf16 or int8. x is float by then, packed by the
// caller: bf16 widened, float as it is, or float holding the integers -127..127 of quantised rows.
// Maths  float. kExact (quantised rows): sums of at most kExactColumns products of int8 are integers below 2^24, which
//        float adds without rounding; longer sums are put together in double and rounded once
// Limits any R, C, M, N, K
// Cost   M = 1: a load of 8 weights, their widening, a broadcast of x per block. M in 2..8 (R % 8 == 0): one
// multiply-add
//        per row. Above: weights of a block row are widened once per panel into a buffer that stays in L1, then
//        the multiply-adds of fp32
#pragma once

#include "core/epilogue-inl.h"
#include "core/interleave-inl.h"

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 sees it in the casts of its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace sp {
namespace {

// kN weights as floats. By intrinsics where GCC 12 would convert eight lanes in two halves.
template <int kN>
SP_INLINE Vec<float, kN> weights(const int8_t* from) {
#if defined(__AVX2__)
  if constexpr (kN == 8) return (Vec<float, 8>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(from)));
#endif
  return __builtin_convertvector(load<kN>(from), typename VecOf<float, kN>::type);
}
template <int kN>
SP_INLINE Vec<float, kN> weights(const Bf16* from) {
#if defined(__AVX2__)
  if constexpr (kN == 8) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return (Vec<float, 8>)_mm256_slli_epi32(bits, 16);
  }
#endif
  return load_wide<kN>(from);
}

constexpr int64_t kExactColumns = 1024;  // 1024 * 127 * 128 < 2^24

// The lists of the product. k8x1: R = 8, C = 1, uint16 ids, and whether there are positions (kIndirect) is known to the
// compiler. Otherwise all of that is looked up: blocks of several columns make up for it, and it keeps the code small.
template <typename Weight, bool kIndirect, bool k8x1>
struct Lists {
  static constexpr bool kEightByOne = k8x1, kContiguous = k8x1 && !kIndirect, kTwoBytes = sizeof(Weight) == 2;

  explicit Lists(const ProductArgs& args)
      : values(static_cast<const Weight*>(args.values)),
        crow(args.begin),
        col(static_cast<const uint16_t*>(args.other)),
        wide_col(static_cast<const int32_t*>(args.other)),
        pos(args.pos),
        out(args.out),
        height(args.r),
        width(args.c),
        narrow(args.narrow) {}

  SP_INLINE int64_t r() const { return k8x1 ? 8 : height; }
  SP_INLINE int64_t c() const { return k8x1 ? 1 : width; }
  SP_INLINE const Weight* block(int64_t e) const {
    return values + ((k8x1 ? kIndirect : pos != nullptr) ? pos[e] : e) * (r() * c());
  }
  SP_INLINE int64_t input(int64_t e) const { return static_cast<int64_t>(k8x1 || narrow ? col[e] : wide_col[e]) * c(); }
  SP_INLINE int64_t live(int64_t b, int64_t r0, int64_t most) const {
    const int64_t left = out - b * r() - r0;
    return left < most ? left : most;
  }
  const Weight* values;
  const int32_t* crow;
  const uint16_t* col;
  const int32_t* wide_col;
  const int32_t* pos;
  int64_t out, height, width;
  bool narrow;
};

// Calls body(lists) with the lists of `args` as the type that suits them.
template <typename Weight, typename Body>
SP_INLINE void with_lists(const ProductArgs& args, const Body& body) {
  if (args.r != 8 || args.c != 1 || !args.narrow) {
    body(Lists<Weight, false, false>(args));
  } else if (args.pos != nullptr) {
    body(Lists<Weight, true, true>(args));
  } else {
    body(Lists<Weight, false, true>(args));
  }
}

// The epilogue with its activations once for all kernels: inlined into each of them it is most of their code.
template <int kN, typename Y>
__attribute__((noinline)) void put_row(const Epilogue<Y, float>& epilogue, int64_t row, int64_t n, Vec<float, kN> sum,
                                       int64_t live) {
  epilogue.template put<kN>(row, n, sum, live);
}
template <int kWidth, typename Y>
__attribute__((noinline)) void put_panel(const Epilogue<Y, float>& epilogue, const float* tile, int64_t row,
                                         int64_t rows, int64_t n, int64_t height) {
  put_tile<kWidth>(epilogue, tile, row, rows, n, height);
}

// A sum put together from parts of at most kExactColumns products.
template <int kN, bool kExact>
struct Total {
  Vec<double, kN> sum = {};
  SP_INLINE void add(Vec<float, kN> part) { sum += __builtin_convertvector(part, typename VecOf<double, kN>::type); }
  SP_INLINE Vec<float, kN> value() const { return __builtin_convertvector(sum, typename VecOf<float, kN>::type); }
};
template <int kN>
struct Total<kN, false> {
  Vec<float, kN> sum = {};
  SP_INLINE void add(Vec<float, kN> part) { sum = part; }
  SP_INLINE Vec<float, kN> value() const { return sum; }
};

// Calls part(e0, e1, j0, j1) for entries e0 .. e1 - 1 of block row b and columns j0 .. j1 - 1 of each, together at most
// kExactColumns inputs if kExact, else all of them at once.
template <bool kExact, typename L, typename Part>
SP_INLINE void in_parts(const L& lists, int64_t b, const Part& part) {
  const int64_t end = lists.crow[b + 1];
  if constexpr (!kExact) {
    part(int64_t(lists.crow[b]), end, int64_t(0), lists.c());
  } else {
    const int64_t across = lists.c() < kExactColumns ? lists.c() : kExactColumns;
    const int64_t entries = kExactColumns / across;
    for (int64_t e = lists.crow[b]; e < end; e += entries) {
      for (int64_t j = 0; j < lists.c(); j += across) {
        part(e, e + entries < end ? e + entries : end, j, j + across < lists.c() ? j + across : lists.c());
      }
    }
  }
}

// M = 1, outputs r0 .. r0 + kS - 1 of block row b; x padded with zeros to whole blocks.
template <int kS, bool kExact, typename L>
SP_INLINE Vec<float, kS> widened_dot(const L& lists, const float* x, int64_t b, int64_t r0) {
  Total<kS, kExact> total;
  in_parts<kExact>(lists, b, [&](int64_t e, int64_t end, int64_t j0, int64_t j1) SP_ALWAYS_INLINE {
    Vec<float, kS> sum[4] = {};
    const auto add = [&](int64_t entry, Vec<float, kS>& chain) SP_ALWAYS_INLINE {
      const auto* block = lists.block(entry) + r0;
      const float* from = x + lists.input(entry);
      if (L::kEightByOne) {
        chain += weights<kS>(block) * from[0];
      } else {
        for (int64_t j = j0; j < j1; ++j) chain += weights<kS>(block + j * lists.r()) * from[j];
      }
    };
    for (; e + 4 <= end; e += 4) {
      SP_UNROLL for (int q = 0; q < 4; ++q) add(e + q, sum[q]);
    }
    for (; e < end; ++e) add(e, sum[0]);
    total.add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  });
  return total.value();
}

// M = 1, 8x1 blocks of bf16, two at a time: the even outputs of both are the low halves of their 32 bytes, the odd ones
// the high halves, so that a shift and a mask widen them. x[k] of the first block in lanes 0 - 3, of the second in 4
// - 7.
template <typename L>
SP_INLINE Vec<float, 8> widened_dot_8x1(const L& lists, const float* x, int64_t b) {
  using F = Vec<float, 8>;
  using U = Vec<uint32_t, 8>;
  constexpr int kSets = 4;  // chains of additions: the latency of the multiply-add
  F even[kSets] = {}, odd[kSets] = {};
  const auto add = [&](int64_t e, int q) SP_ALWAYS_INLINE {
    U bits;
    if constexpr (L::kContiguous) {
      bits = load<8>(reinterpret_cast<const uint32_t*>(lists.block(e)));
    } else {
      const auto first = load<4>(reinterpret_cast<const uint32_t*>(lists.block(e)));
      const auto second = load<4>(reinterpret_cast<const uint32_t*>(lists.block(e + 1)));
      bits = __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7);
    }
    const float s = x[lists.input(e)], t = x[lists.input(e + 1)];
    const F xs = {s, s, s, s, t, t, t, t};
    even[q] += (F)(bits << 16) * xs;
    odd[q] += (F)(bits & 0xffff0000u) * xs;
  };
  int64_t e = lists.crow[b];
  const int64_t end = lists.crow[b + 1];
  for (; e + 2 * kSets <= end; e += 2 * kSets) {
    SP_UNROLL for (int q = 0; q < kSets; ++q) add(e + 2 * q, q);
  }
  for (; e + 2 <= end; e += 2) add(e, 0);
  const F low = (even[0] + even[1]) + (even[2] + even[3]), high = (odd[0] + odd[1]) + (odd[2] + odd[3]);
  const F sum = __builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11) +
                __builtin_shufflevector(low, high, 4, 12, 5, 13, 6, 14, 7, 15);
  return e < end ? sum + weights<8>(lists.block(e)) * x[lists.input(e)] : sum;
}

// `factor` multiplies the sums of the row before the epilogue: the scale of a quantised row.
template <bool kExact, typename L, typename Y>
void widened_gemv(const L& lists, const Epilogue<Y, float>& epilogue, const float* x, int64_t row, float factor,
                  int64_t b0, int64_t b1) {
  for (int64_t b = b0; b < b1; ++b) {
    int64_t r0 = 0;
    const auto slice = [&](auto size) SP_ALWAYS_INLINE {
      constexpr int kS = decltype(size)::value;
      Vec<float, kS> sum;
      if constexpr (L::kEightByOne && L::kTwoBytes && kS == 8) {
        sum = widened_dot_8x1(lists, x, b);
      } else {
        sum = widened_dot<kS, kExact>(lists, x, b, r0);
      }
      put_row<kS>(epilogue, row, b * lists.r() + r0, kExact ? sum * factor : sum, lists.live(b, r0, kS));
      r0 += kS;
    };
    while (r0 + 8 <= lists.r()) slice(Int<8>{});
    if constexpr (!L::kEightByOne) {
      while (r0 + 4 <= lists.r()) slice(Int<4>{});
      while (r0 < lists.r()) slice(Int<1>{});
    }
  }
}

// 2 <= M <= 8, R % 8 == 0: eight outputs in the lanes, one accumulator per row of the panel [K][kWidth].
template <int kWidth, bool kExact, typename L, typename Y>
void widened_few_rows(const L& lists, const Epilogue<Y, float>& epilogue, const float* panel, int64_t row, int64_t rows,
                      const float* factors, int64_t b0, int64_t b1) {
  constexpr int kSets = kWidth == 4 ? 2 : 1;
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t r0 = 0; r0 < lists.r(); r0 += 8) {
      Total<8, kExact> total[kWidth];
      in_parts<kExact>(lists, b, [&](int64_t e, int64_t end, int64_t j0, int64_t j1) SP_ALWAYS_INLINE {
        Vec<float, 8> sum[kSets][kWidth] = {};
        const auto add = [&](int64_t entry, Vec<float, 8>* chain) SP_ALWAYS_INLINE {
          const auto* block = lists.block(entry) + r0;
          const float* x = panel + lists.input(entry) * kWidth;
          for (int64_t j = j0; j < j1; ++j) {
            const Vec<float, 8> weight = weights<8>(block + j * lists.r());
            SP_UNROLL for (int i = 0; i < kWidth; ++i) chain[i] += weight * x[j * kWidth + i];
          }
        };
        for (; e + kSets <= end; e += kSets) {
          SP_UNROLL for (int q = 0; q < kSets; ++q) add(e + q, sum[q]);
        }
        for (; e < end; ++e) add(e, sum[0]);
        SP_UNROLL for (int i = 0; i < kWidth; ++i) total[i].add(kSets == 2 ? sum[0][i] + sum[1][i] : sum[0][i]);
      });
      const int64_t live = lists.live(b, r0, 8);
      SP_UNROLL for (int i = 0; i < kWidth; ++i) {
        const Vec<float, 8> sum = kExact ? total[i].value() * factors[i] : total[i].value();
        if (i < rows) put_row<8>(epilogue, row + i, b * lists.r() + r0, sum, live);
      }
    }
  }
}

// Columns of a block row, whatever its blocks: to[t][kS] of outputs r0 .. r0 + kS - 1, and where column t of x
// starts in a panel [K][width]. Returns their number.
template <int kS, typename L>
SP_INLINE int64_t widen_columns(const L& lists, int64_t b, int64_t r0, int64_t width, float* to, int64_t* starts) {
  int64_t t = 0;
  const int64_t end = lists.crow[b + 1];
  for (int64_t e = lists.crow[b]; e < end; ++e) {
    const auto* block = lists.block(e) + r0;
    for (int64_t j = 0; j < lists.c(); ++j, ++t) {
      store<kS>(to + t * kS, weights<kS>(block + j * lists.r()));
      starts[t] = (lists.input(e) + j) * width;
    }
  }
  return t;
}

// Rows of a K-major panel in kZ vectors, kS outputs, into tile[kS][kWidth].
template <int kS, int kZ, bool kExact>
SP_INLINE void widened_slice(const float* panel, const float* columns_of, const int64_t* starts, int64_t columns,
                             float* tile) {
  constexpr int kL = kLanes<float>, kWidth = kL * kZ;
  Total<kL, kExact> total[kS][kZ];
  for (int64_t t = 0; t < columns || t == 0;) {
    const int64_t end = kExact && columns - t > kExactColumns ? t + kExactColumns : columns;
    Vec<float, kL> sum[kS][kZ] = {};
    for (; t < end; ++t) {
      const float* x = panel + starts[t];
      Vec<float, kL> xs[kZ];
      SP_UNROLL for (int z = 0; z < kZ; ++z) xs[z] = load<kL>(x + z * kL);
      SP_UNROLL for (int r = 0; r < kS; ++r) {
        SP_UNROLL for (int z = 0; z < kZ; ++z) sum[r][z] += xs[z] * columns_of[t * kS + r];
      }
    }
    if (!kExact || columns <= kExactColumns) {
      SP_UNROLL for (int r = 0; r < kS; ++r) {
        SP_UNROLL for (int z = 0; z < kZ; ++z) store<kL>(tile + r * kWidth + z * kL, sum[r][z]);
      }
      return;
    }
    for (int r = 0; r < kS; ++r) {
      for (int z = 0; z < kZ; ++z) total[r][z].add(sum[r][z]);
    }
  }
  for (int r = 0; r < kS; ++r) {
    for (int z = 0; z < kZ; ++z) store<kL>(tile + r * kWidth + z * kL, total[r][z].value());
  }
}

// tile[r][i] *= factors[i]
template <int kWidth>
SP_INLINE void scale_tile(float* tile, int64_t height, const float* factors) {
  for (int64_t r = 0; r < height; ++r) {
    for (int i = 0; i < kWidth; ++i) tile[r * kWidth + i] *= factors[i];
  }
}

// `buffer` holds the widened columns of one block row.
template <int kZ, bool kExact, typename L, typename Y>
void widened_panel(const L& lists, const Epilogue<Y, float>& epilogue, const float* panel, float* buffer,
                   int64_t padded, int64_t row, int64_t rows, const float* factors, int64_t b0, int64_t b1) {
  constexpr int kWidth = kLanes<float> * kZ;
  alignas(64) float tile[8 * kWidth];
  int64_t* starts = reinterpret_cast<int64_t*>(buffer);
  float* widened = buffer + 2 * padded;
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t r0 = 0; r0 < lists.r(); r0 += 8) {
      const int64_t height = lists.r() - r0 < 8 ? lists.r() - r0 : 8;
      int64_t r = 0;
      const auto slice = [&](auto size) SP_ALWAYS_INLINE {
        constexpr int kS = decltype(size)::value;
        const int64_t columns = widen_columns<kS>(lists, b, r0 + r, kWidth, widened, starts);
        widened_slice<kS, kZ, kExact>(panel, widened, starts, columns, tile + r * kWidth);
        r += kS;
      };
      while (r + SP_SLICE <= height) slice(Int<SP_SLICE>{});
      if constexpr (!L::kEightByOne) {
        while (r + 4 <= height) slice(Int<4>{});
        while (r < height) slice(Int<1>{});
      }
      if (kExact) scale_tile<kWidth>(tile, height, factors);
      put_panel<kWidth>(epilogue, tile, row, rows, b * lists.r() + r0, lists.live(b, r0, height));
    }
  }
}

}  // namespace
}  // namespace sp
