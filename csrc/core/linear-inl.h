// bcsr_linear, forward, CPU.   y[M, N] = activation(x[M, K] @ W[N, K].T + bias[N]) + residual[M, N]
//
// W      block rows of R outputs, layout `bcsr`: values [block][C][R], crow [NB + 1] int32, col [entries] uint16/int32,
//        optionally pos [entries] int32: entry e then uses block pos[e] (several pathways over one set of values)
// x, y   row-major and contiguous, float or double
// Maths  operands and accumulators in the type of x; up to four partial sums per output at M = 1, two at 2 <= M <= 6
// Limits any R, C, M >= 0, N, K; blocks may stick out of the weight. Fast for R % 8 == 0 and for 4x4, tuned for 8x1
// Cost   M = 1: bound by the loads of values (one 32-byte block a cycle from L1; out of L2 by its bandwidth).
//        M in 2..8: outputs in vector lanes, one accumulator per row, x broadcast. Above: panels of x packed K-major,
//        rows in vector lanes, weights broadcast: bound by the multiply-adds.
//        Each panel reads all kept blocks once; pruned blocks are never touched
#pragma once

#include "core/epilogue-inl.h"
#include "core/simd-inl.h"

namespace sp {
namespace {

// The lists of the product with their types. kR and kC: the block shape where it is a constant to the compiler, else 0.
template <typename T, typename Col, bool kIndirect, int kR, int kC>
struct BlockRows {
  static constexpr int kHeight = kR, kWidth = kC;

  explicit BlockRows(const ProductArgs& args)
      : values(static_cast<const T*>(args.values)),
        crow(args.begin),
        col(static_cast<const Col*>(args.other)),
        pos(args.pos),
        out(args.out),
        in(args.in),
        height(args.r),
        width(args.c),
        cold(args.cold),
        epilogue(args) {}

  SP_INLINE int64_t r() const { return kR > 0 ? kR : height; }
  SP_INLINE int64_t c() const { return kC > 0 ? kC : width; }
  SP_INLINE const T* block(int64_t e) const { return values + (kIndirect ? pos[e] : e) * (r() * c()); }
  // First input of entry e.
  SP_INLINE int64_t input(int64_t e) const { return static_cast<int64_t>(col[e]) * c(); }
  // Outputs of block row b from r0 on, at most `most`; those past N do not exist.
  SP_INLINE int64_t live(int64_t b, int64_t r0, int64_t most) const {
    const int64_t left = out - b * r() - r0;
    return left < most ? left : most;
  }

  const T* values;
  const int32_t* crow;
  const Col* col;
  const int32_t* pos;
  int64_t out, in, height, width;
  bool cold;
  Epilogue<T, T> epilogue;
};

// M = 1, kS outputs of block row b from r0 on. Four chains of additions hide the latency of the multiply-add.
template <int kS, typename T, typename W>
SP_INLINE void gemv_slice(const W& w, const T* x, int64_t row, int64_t b, int64_t r0) {
  Vec<T, kS> sum[4] = {};
  int64_t e = w.crow[b];
  const int64_t end = w.crow[b + 1];
  if (w.c() == 1) {
    const auto add = [&](int64_t e, Vec<T, kS>& chain)
                         SP_ALWAYS_INLINE { chain += load<kS>(w.block(e) + r0) * x[w.input(e)]; };
    for (; e + 4 <= end; e += 4) {
      fetch_ahead(w.cold, w.block(e));
      fetch_ahead(w.cold, w.block(e + 2));
      SP_UNROLL for (int q = 0; q < 4; ++q) add(e + q, sum[q]);
    }
    for (; e < end; ++e) add(e, sum[0]);
  } else {
    for (; e < end; ++e) {
      const T* block = w.block(e) + r0;
      const T* from = x + w.input(e);
      const int64_t across = w.in - w.input(e) < w.c() ? w.in - w.input(e) : w.c();
      int64_t j = 0;
      for (; j + 4 <= across; j += 4) {
        SP_UNROLL for (int q = 0; q < 4; ++q) sum[q] += load<kS>(block + (j + q) * w.r()) * from[j + q];
      }
      for (; j < across; ++j) sum[0] += load<kS>(block + j * w.r()) * from[j];
    }
  }
  w.epilogue.template put<kS>(row, b * w.r() + r0, (sum[0] + sum[1]) + (sum[2] + sum[3]), w.live(b, r0, kS));
}

template <typename T, typename W>
void gemv(const W& w, const T* x, int64_t row, int64_t b0, int64_t b1) {
  for (int64_t b = b0; b < b1; ++b) {
    int64_t r0 = 0;
    if constexpr (W::kHeight != 8 && SP_VECTOR_BYTES == 64 && sizeof(T) == 4) {
      for (; r0 + 16 <= w.r(); r0 += 16) gemv_slice<16>(w, x, row, b, r0);
    }
    for (; r0 + 8 <= w.r(); r0 += 8) gemv_slice<8>(w, x, row, b, r0);
    if constexpr (W::kHeight != 8) {
      for (; r0 + 4 <= w.r(); r0 += 4) gemv_slice<4>(w, x, row, b, r0);
      for (; r0 < w.r(); ++r0) gemv_slice<1>(w, x, row, b, r0);
    }
  }
}

// kM rows of x, 4x4 blocks, K % 4 == 0: a block is one vector of four columns, each row's four inputs are spread over
// it.
template <int kM, typename W>
void square_rows(const W& w, const float* x, int64_t row, int64_t b0, int64_t b1) {
  constexpr int kSets = kM == 1 ? 4 : (kM <= 4 ? 2 : 1);
  for (int64_t b = b0; b < b1; ++b) {
    Vec<float, 16> sum[kSets][kM] = {};
    const auto add = [&](int64_t e, Vec<float, 16>* chain) SP_ALWAYS_INLINE {
      const Vec<float, 16> block = load<16>(w.block(e));
      const float* from = x + w.input(e);
      SP_UNROLL for (int i = 0; i < kM; ++i) {
        const Vec<float, 4> xs = load<4>(from + i * w.in);
        chain[i] += block * __builtin_shufflevector(xs, xs, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
      }
    };
    int64_t e = w.crow[b];
    const int64_t end = w.crow[b + 1];
    for (; e + kSets <= end; e += kSets) {
      SP_UNROLL for (int q = 0; q < kSets; ++q) add(e + q, sum[q]);
    }
    for (; e < end; ++e) add(e, sum[0]);
    SP_UNROLL for (int i = 0; i < kM; ++i) {
      SP_UNROLL for (int q = 1; q < kSets; ++q) sum[0][i] += sum[q][i];
      const Vec<float, 16> v = sum[0][i];
      const Vec<float, 8> half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
      const Vec<float, 4> total =
          __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
      w.epilogue.template put<4>(row + i, b * 4, total, w.live(b, 0, 4));
    }
  }
}

// Where the kM rows of x are: as they came (few of them: their lines fit L1 beside the weights), or packed
// [K][kStride].
template <bool kPacked, int kStride>
struct FewRows {
  const float* x;
  int64_t stride;
  SP_INLINE const float* at(int64_t k) const { return kPacked ? x + k * kStride : x + k; }
  SP_INLINE float one(const float* column, int i) const { return kPacked ? column[i] : column[i * stride]; }
};

// 2 <= kM <= 8, R % 8 == 0: eight outputs in the lanes, one accumulator per row; y comes out row-major. Two sets of
// accumulators where one alone would wait for the multiply-add. The loads are the bound: one of eight weights and kM
// broadcasts of x for kM multiply-adds; so of a packed x the first three rows come from one load of four inputs, spread
// by permutes within 128-bit lanes. (On a Zen 4 at M = 4 that takes 2.6 cycles a block for 2.9, at M = 8 4.9 for 5.4;
// whole-register permutes, two rows to a 512-bit vector, take 3.7 and 6.5.)
template <int kM, bool kPacked, typename W>
void few_rows(const W& w, const FewRows<kPacked, kM <= 4 ? 4 : kM> x, int64_t row, int64_t b0, int64_t b1) {
  constexpr int kSets = kM == 2 ? 4 : (kM <= 6 ? 2 : 1);
  constexpr int kSpread = kPacked && kM >= 3 && SP_VECTOR_BYTES >= 32 ? 3 : 0;
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t r0 = 0; r0 < w.r(); r0 += 8) {
      Vec<float, 8> sum[kSets][kM] = {};
      const auto add = [&](int64_t e, Vec<float, 8>* chain) SP_ALWAYS_INLINE {
        const float* block = w.block(e) + r0;
        const int64_t first = w.input(e);
        fetch_ahead(w.cold, block);
        for (int64_t j = 0; j < w.c(); ++j) {
          const float* column = x.at(first + j);
          const Vec<float, 8> weight = load<8>(block + j * w.r());
          if constexpr (kSpread > 0) {
            const Vec<float, 4> four = load<4>(column);
            Vec<float, 8> twice = __builtin_shufflevector(four, four, 0, 1, 2, 3, 0, 1, 2, 3);
            SP_KEEP(twice);  // else the compiler makes broadcasts of it again
            chain[0] += weight * __builtin_shufflevector(twice, twice, 0, 0, 0, 0, 4, 4, 4, 4);
            chain[1] += weight * __builtin_shufflevector(twice, twice, 1, 1, 1, 1, 5, 5, 5, 5);
            chain[2] += weight * __builtin_shufflevector(twice, twice, 2, 2, 2, 2, 6, 6, 6, 6);
          }
          SP_UNROLL for (int i = kSpread; i < kM; ++i) chain[i] += weight * x.one(column, i);
        }
      };
      int64_t e = w.crow[b];
      const int64_t end = w.crow[b + 1];
      for (; e + kSets <= end; e += kSets) {
        SP_UNROLL for (int q = 0; q < kSets; ++q) add(e + q, sum[q]);
      }
      for (; e < end; ++e) add(e, sum[0]);
      const int64_t live = w.live(b, r0, 8);
      SP_UNROLL for (int i = 0; i < kM; ++i) {
        SP_UNROLL for (int q = 1; q < kSets; ++q) sum[0][i] += sum[q][i];
        w.epilogue.template put<8>(row + i, b * w.r() + r0, sum[0][i], live);
      }
    }
  }
}

#if SP_VECTOR_BYTES == 64
// The same for processors that work on 512 bits at once: two rows of eight outputs to a vector. One load serves the
// weights of all rows, one load their x; per two rows there are a permute and a multiply-add. (On a Zen 5 at M = 2, 4,
// 8 that takes 1.5, 2.0 and 3.4 cycles a block, few_rows 2.2, 2.6 and 4.7; on a Zen 4 it is the slower one.)
template <int kM, int kStride, typename W>
void row_pairs(const W& w, const float* x, int64_t row, int64_t b0, int64_t b1) {
  constexpr int kPairs = (kM + 1) / 2, kSets = kPairs == 1 ? 4 : 3;
  __m512i spread[kPairs];
  SP_UNROLL for (int p = 0; p < kPairs; ++p) {
    spread[p] = _mm512_inserti64x4(_mm512_set1_epi32(2 * p), _mm256_set1_epi32(2 * p + 1), 1);
    SP_KEEP(spread[p]);  // else it is read from memory at every use
  }
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t r0 = 0; r0 < w.r(); r0 += 8) {
      __m512 sum[kSets][kPairs] = {};
      const auto add = [&](int64_t e, __m512* chain) SP_ALWAYS_INLINE {
        const float* block = w.block(e) + r0;
        const float* column = x + w.input(e) * kStride;
        fetch_ahead(w.cold, block);
        for (int64_t j = 0; j < w.c(); ++j, column += kStride) {
          const __m512 weight = _mm512_broadcast_f32x8(_mm256_loadu_ps(block + j * w.r()));
          const __m512 xs = kPairs > 2 ? _mm512_castps256_ps512(_mm256_loadu_ps(column))
                                       : _mm512_castps128_ps512(_mm_loadu_ps(column));
          SP_UNROLL for (int p = 0; p < kPairs; ++p) {
            chain[p] = _mm512_fmadd_ps(_mm512_permutexvar_ps(spread[p], xs), weight, chain[p]);
          }
        }
      };
      int64_t e = w.crow[b];
      const int64_t end = w.crow[b + 1];
      for (; e + kSets <= end; e += kSets) {
        SP_UNROLL for (int q = 0; q < kSets; ++q) add(e + q, sum[q]);
      }
      SP_UNROLL for (int q = 0; q + 1 < kSets; ++q) {
        if (e + q < end) add(e + q, sum[q]);
      }
      const int64_t live = w.live(b, r0, 8), n = b * w.r() + r0;
      SP_UNROLL for (int p = 0; p < kPairs; ++p) {
        __m512 total = sum[0][p];
        SP_UNROLL for (int q = 1; q < kSets; ++q) total += sum[q][p];
        w.epilogue.template put<8>(row + 2 * p, n, (Vec<float, 8>)_mm512_castps512_ps256(total), live);
        if (2 * p + 1 < kM) {
          w.epilogue.template put<8>(row + 2 * p + 1, n, (Vec<float, 8>)_mm512_extractf32x8_ps(total, 1), live);
        }
      }
    }
  }
}
#endif

// Rows of a K-major panel in kZ vectors, kS outputs of block row b from r0 on, into tile[kS][kWidth].
template <int kS, int kZ, typename T, typename W>
SP_INLINE void panel_slice(const W& w, const T* panel, int64_t b, int64_t r0, T* tile) {
  constexpr int kL = kLanes<T>, kWidth = kL * kZ;
  Vec<T, kL> sum[kS][kZ] = {};
  const int64_t end = w.crow[b + 1];
  for (int64_t e = w.crow[b]; e < end; ++e) {
    const T* block = w.block(e) + r0;
    const T* x = panel + w.input(e) * kWidth;
    fetch_ahead(w.cold, block);
    for (int64_t j = 0; j < w.c(); ++j) {
      Vec<T, kL> xs[kZ];
      SP_UNROLL for (int z = 0; z < kZ; ++z) xs[z] = load<kL>(x + j * kWidth + z * kL);
      SP_UNROLL for (int r = 0; r < kS; ++r) {
        Vec<T, kL> weight = block[j * w.r() + r] - Vec<T, kL>{};
        if constexpr (kZ > 1 && sizeof(T) == 4) SP_KEEP(weight);  // one broadcast for all, not one in each multiply-add
        SP_UNROLL for (int z = 0; z < kZ; ++z) sum[r][z] += xs[z] * weight;
      }
    }
  }
  SP_UNROLL for (int r = 0; r < kS; ++r) {
    SP_UNROLL for (int z = 0; z < kZ; ++z) store<kL>(tile + r * kWidth + z * kL, sum[r][z]);
  }
}

// Outputs are collected until a tile of them makes whole cache lines of y.
template <int kZ, typename T, typename W>
void panel_rows(const W& w, const T* panel, int64_t row, int64_t rows, int64_t b0, int64_t b1) {
  constexpr int kWidth = kLanes<T> * kZ, kGroup = kTileOutputs<float>;
  alignas(64) T tile[kGroup * kWidth];
  int64_t waiting = 0, first = 0;  // outputs in the tile, and the number of the first
  const auto flush = [&]() SP_ALWAYS_INLINE {
    const int64_t live = w.out - first < waiting ? w.out - first : waiting;
    if (live > 0) put_tile<kWidth>(w.epilogue, tile, row, rows, first, live);
    waiting = 0;
  };
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t r0 = 0; r0 < w.r(); r0 += 8) {
      const int64_t height = w.r() - r0 < 8 ? w.r() - r0 : 8;
      if (waiting + height > kGroup) flush();
      if (waiting == 0) first = b * w.r() + r0;
      T* to = tile + waiting * kWidth;
      int64_t r = 0;
      for (; r + SP_SLICE <= height; r += SP_SLICE) panel_slice<SP_SLICE, kZ>(w, panel, b, r0 + r, to + r * kWidth);
      if constexpr (W::kHeight != 8) {
        for (; r + 4 <= height; r += 4) panel_slice<4, kZ>(w, panel, b, r0 + r, to + r * kWidth);
        for (; r < height; ++r) panel_slice<1, kZ>(w, panel, b, r0 + r, to + r * kWidth);
      }
      waiting += height;
    }
  }
  flush();
}

template <typename T>
struct Linear {
  const ProductArgs& args;
  int64_t m0, m1, l0, l1;
  T* scratch;

  template <typename Col, bool kIndirect>
  void run() const {
    const int64_t r = args.r, c = args.c;
    if (r == 8 && c == 1) return rows(BlockRows<T, Col, kIndirect, 8, 1>(args));
    if constexpr (sizeof(T) == 4 && sizeof(Col) == 2) {
      if (r == 8 && c == 4) return rows(BlockRows<T, Col, kIndirect, 8, 4>(args));
      if (r == 16 && c == 1) return rows(BlockRows<T, Col, kIndirect, 16, 1>(args));
      if (r == 16 && c == 16) return rows(BlockRows<T, Col, kIndirect, 16, 16>(args));
      if (r == 4 && c == 4) return rows(BlockRows<T, Col, kIndirect, 4, 4>(args));
    }
    rows(BlockRows<T, Col, kIndirect, 0, 0>(args));
  }

  const T* x(int64_t row) const { return static_cast<const T*>(args.x) + row * args.in; }

  // The next rows packed [K][kWidth] in `scratch`, `taken` of them, zero padded to whole blocks of K.
  template <int kWidth>
  const T* pack(int64_t row, int64_t taken) const {
    const int64_t padded = (args.in + args.c - 1) / args.c * args.c;
    pack_panel<kWidth>(x(row), args.in, taken, args.in, padded, scratch);
    return scratch;
  }

  template <int kM, typename W>
  void few(const W& w, int64_t row) const {
    constexpr int kWidth = kM <= 4 ? 4 : kM;
#if SP_VECTOR_BYTES == 64
    if (wide_datapath) return row_pairs<kM, kWidth>(w, pack<kWidth>(row, kM), row, l0, l1);
#endif
    if constexpr (kM <= 3) {
      // Whole blocks of x exist in every row, or the packed copy must supply their zeros.
      if (W::kWidth == 1 || args.in % w.c() == 0) {
        return few_rows<kM, false>(w, FewRows<false, 4>{x(row), args.in}, row, l0, l1);
      }
    }
    few_rows<kM, true>(w, FewRows<true, kWidth>{pack<kWidth>(row, kM), 0}, row, l0, l1);
  }

  // Rows row .. row + m - 1, m <= 8, by the kernel of exactly m rows. False if blocks of this height have none.
  template <typename W>
  bool few_of(const W& w, int64_t row, int64_t m) const {
    const bool square = W::kHeight == 4 && W::kWidth == 4 && SP_VECTOR_BYTES >= 32 && args.in % 4 == 0;
    const auto call = [&](auto rows) SP_ALWAYS_INLINE {
      constexpr int kM = decltype(rows)::value;
      if constexpr (W::kHeight == 4 && SP_VECTOR_BYTES >= 32) {
        square_rows<kM>(w, x(row), row, l0, l1);
      } else if constexpr (W::kHeight != 4 && kM > 1) {
        few<kM>(w, row);
      }
    };
    if (!square && (m == 1 || w.r() % 8 != 0)) return false;
    switch (m) {
      case 1:
        return call(Number<1>{}), true;
      case 2:
        return call(Number<2>{}), true;
      case 3:
        return call(Number<3>{}), true;
      case 4:
        return call(Number<4>{}), true;
      case 5:
        return call(Number<5>{}), true;
      case 6:
        return call(Number<6>{}), true;
      case 7:
        return call(Number<7>{}), true;
      default:
        return call(Number<8>{}), true;
    }
  }

  // Cuts the rows into panels of two vectors, so that each broadcast of a weight serves two multiply-adds, then one.
  // Few rows more than eight are eight rows and the others: a panel costs as much as all its lanes.
  template <typename W>
  void rows(const W& w) const {
    constexpr int kL = kLanes<T>, kZ = 2;
    for (int64_t m = m0; m < m1;) {
      const int64_t left = m1 - m;
      int64_t taken = left;
      if constexpr (sizeof(T) == 4) {
        taken = left <= 8 ? left : 8;
        if (left <= (kL == 16 ? 12 : 8) && few_of(w, m, taken)) {
          m += taken;
          continue;
        }
      }
      if (left == 1) {
        gemv(w, x(m), m, l0, l1);
        return;
      }
      taken = left;
      if (kZ == 2 && left > kL + 4) {
        if (taken > 2 * kL) taken = 2 * kL;
        panel_rows<kZ>(w, pack<kZ * kL>(m, taken), m, taken, l0, l1);
      } else {
        if (taken > kL) taken = kL;
        panel_rows<1>(w, pack<kL>(m, taken), m, taken, l0, l1);
      }
      m += taken;
    }
  }

  template <int kN>
  struct Number {
    static constexpr int value = kN;
  };
};

template <typename T>
void linear(const ProductArgs& args, int64_t m0, int64_t m1, int64_t l0, int64_t l1, void* scratch) {
  with_index_types(args, Linear<T>{args, m0, m1, l0, l1, static_cast<T*>(scratch)});
}

}  // namespace
}  // namespace sp
