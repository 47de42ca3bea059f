// bcsr_linear, forward, CPU.   y[M, N] = x[M, K] @ W[N, K].T + bias[N]
//
// W      block rows of R outputs, layout `bcsr`: values [block][C][R], crow [NB + 1] int32, col [entries] uint16/int32,
//        optionally pos [entries] int32: entry e then uses block pos[e] (several pathways over one set of values)
// x, y   row-major and contiguous, float or double; bias N or null
// Maths  operands and accumulators in the type of x; up to four partial sums per output at M = 1, two at 2 <= M <= 8
// Limits any R, C, M >= 0, N, K; blocks may stick out of the weight. Fast for R % 8 == 0, tuned for 8x1
// Cost   M = 1: bound by the loads of values (one 32-byte block a cycle from L1). M in 2..8: x packed as [K][4 or 8].
//        Above: panels of x packed K-major, rows in vector lanes, weights broadcast: bound by the multiply-adds.
//        Each panel reads all kept blocks once; pruned blocks are never touched
#pragma once

#include "core/epilogue-inl.h"
#include "core/simd-inl.h"

namespace sp {
namespace {

// The lists of the product with their types; R = 8 and C = 1 are constants to the compiler when k8x1.
template <typename T, typename Col, bool kIndirect, bool k8x1>
struct BlockRows {
  static constexpr bool kEightByOne = k8x1;

  explicit BlockRows(const ProductArgs& args)
      : values(static_cast<const T*>(args.values)),
        crow(args.begin),
        col(static_cast<const Col*>(args.other)),
        pos(args.pos),
        out(args.out),
        in(args.in),
        height(args.r),
        width(args.c),
        epilogue(args) {}

  SP_INLINE int64_t r() const { return k8x1 ? 8 : height; }
  SP_INLINE int64_t c() const { return k8x1 ? 1 : width; }
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
  Epilogue<T, T> epilogue;
};

// M = 1, kS outputs of block row b from r0 on. Four chains of additions hide the latency of the multiply-add.
template <int kS, typename T, typename W>
SP_INLINE void gemv_slice(const W& w, const T* x, int64_t row, int64_t b, int64_t r0) {
  Vec<T, kS> sum[4] = {};
  const auto add = [&](int64_t e, Vec<T, kS>& chain) SP_ALWAYS_INLINE {
    const T* block = w.block(e) + r0;
    const int64_t first = w.input(e);
    const int64_t last = first + w.c() < w.in ? first + w.c() : w.in;
    if (w.c() == 1) {
      chain += load<kS>(block) * x[first];
    } else {
      for (int64_t k = first; k < last; ++k) chain += load<kS>(block + (k - first) * w.r()) * x[k];
    }
  };
  int64_t e = w.crow[b];
  const int64_t end = w.crow[b + 1];
  for (; e + 4 <= end; e += 4) {
    SP_UNROLL for (int q = 0; q < 4; ++q) add(e + q, sum[q]);
  }
  for (; e < end; ++e) add(e, sum[0]);
  w.epilogue.template put<kS>(row, b * w.r() + r0, (sum[0] + sum[1]) + (sum[2] + sum[3]), w.live(b, r0, kS));
}

template <typename T, typename W>
void gemv(const W& w, const T* x, int64_t row, int64_t b0, int64_t b1) {
  for (int64_t b = b0; b < b1; ++b) {
    int64_t r0 = 0;
    for (; r0 + 8 <= w.r(); r0 += 8) gemv_slice<8>(w, x, row, b, r0);
    if constexpr (!W::kEightByOne) {
      for (; r0 + 4 <= w.r(); r0 += 4) gemv_slice<4>(w, x, row, b, r0);
      for (; r0 < w.r(); ++r0) gemv_slice<1>(w, x, row, b, r0);
    }
  }
}

// 2 <= M <= 8, R % 8 == 0: eight outputs in the lanes, one accumulator per row of the panel [K][kWidth]; y comes out
// row-major. Two sets of accumulators at kWidth = 4, where one set alone would wait for the multiply-add. (In AVX-512,
// x expanded by in-register permutes to two rows a vector took 1.2 times as long on a Zen 4: 13.6 us for 11.2 at
// 512x512.)
template <int kWidth, typename T, typename W>
void few_rows(const W& w, const T* panel, int64_t row, int64_t rows, int64_t b0, int64_t b1) {
  constexpr int kSets = kWidth == 4 ? 2 : 1;
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t r0 = 0; r0 < w.r(); r0 += 8) {
      Vec<T, 8> sum[kSets][kWidth] = {};
      const auto add = [&](int64_t e, Vec<T, 8>* chain) SP_ALWAYS_INLINE {
        const T* block = w.block(e) + r0;
        const T* x = panel + w.input(e) * kWidth;
        for (int64_t j = 0; j < w.c(); ++j) {
          const Vec<T, 8> weight = load<8>(block + j * w.r());
          SP_UNROLL for (int i = 0; i < kWidth; ++i) chain[i] += weight * x[j * kWidth + i];
        }
      };
      int64_t e = w.crow[b];
      const int64_t end = w.crow[b + 1];
      for (; e + kSets <= end; e += kSets) {
        SP_UNROLL for (int q = 0; q < kSets; ++q) add(e + q, sum[q]);
      }
      for (; e < end; ++e) add(e, sum[0]);
      const int64_t live = w.live(b, r0, 8);
      SP_UNROLL for (int i = 0; i < kWidth; ++i) {
        if (kSets == 2) sum[0][i] += sum[1][i];
        if (i < rows) w.epilogue.template put<8>(row + i, b * w.r() + r0, sum[0][i], live);
      }
    }
  }
}

// Rows of a K-major panel in kZ vectors, kS outputs of block row b from r0 on, into tile[kS][kWidth].
template <int kS, int kZ, typename T, typename W>
SP_INLINE void panel_slice(const W& w, const T* panel, int64_t b, int64_t r0, T* tile) {
  constexpr int kL = kLanes<T>, kWidth = kL * kZ;
  Vec<T, kL> sum[kS][kZ] = {};
  const int64_t end = w.crow[b + 1];
  for (int64_t e = w.crow[b]; e < end; ++e) {
    const T* block = w.block(e) + r0;
    const T* x = panel + w.input(e) * kWidth;
    for (int64_t j = 0; j < w.c(); ++j) {
      Vec<T, kL> xs[kZ];
      SP_UNROLL for (int z = 0; z < kZ; ++z) xs[z] = load<kL>(x + j * kWidth + z * kL);
      SP_UNROLL for (int r = 0; r < kS; ++r) {
        const T weight = block[j * w.r() + r];
        SP_UNROLL for (int z = 0; z < kZ; ++z) sum[r][z] += xs[z] * weight;
      }
    }
  }
  SP_UNROLL for (int r = 0; r < kS; ++r) {
    SP_UNROLL for (int z = 0; z < kZ; ++z) store<kL>(tile + r * kWidth + z * kL, sum[r][z]);
  }
}

template <int kZ, typename T, typename W>
void panel_rows(const W& w, const T* panel, int64_t row, int64_t rows, int64_t b0, int64_t b1) {
  constexpr int kWidth = kLanes<T> * kZ;
  alignas(64) T tile[8 * kWidth];
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t r0 = 0; r0 < w.r(); r0 += 8) {
      const int64_t height = w.r() - r0 < 8 ? w.r() - r0 : 8;
      int64_t r = 0;
      for (; r + SP_SLICE <= height; r += SP_SLICE) panel_slice<SP_SLICE, kZ>(w, panel, b, r0 + r, tile + r * kWidth);
      if constexpr (!W::kEightByOne) {
        for (; r + 4 <= height; r += 4) panel_slice<4, kZ>(w, panel, b, r0 + r, tile + r * kWidth);
        for (; r < height; ++r) panel_slice<1, kZ>(w, panel, b, r0 + r, tile + r * kWidth);
      }
      put_tile<kWidth>(w.epilogue, tile, row, rows, b * w.r() + r0, w.live(b, r0, height));
    }
  }
}

template <typename T>
struct Linear {
  const ProductArgs& args;
  int64_t m0, m1, l0, l1;
  T* scratch;

  template <typename Col, bool kIndirect>
  void run() const {
    if (args.r == 8 && args.c == 1) {
      rows(BlockRows<T, Col, kIndirect, true>(args));
    } else {
      rows(BlockRows<T, Col, kIndirect, false>(args));
    }
  }

  // Cuts the rows into panels of the widths this instruction set has.
  template <typename W>
  void rows(const W& w) const {
    constexpr int kL = kLanes<T>;
    const int64_t padded = (args.in + args.c - 1) / args.c * args.c;
    const bool eights = args.r % 8 == 0;
    for (int64_t m = m0; m < m1;) {
      const int64_t left = m1 - m;
      const int64_t row = m;
      const T* x = static_cast<const T*>(args.x) + row * args.in;
      const auto pack = [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        const int64_t taken = left < kWidth ? left : kWidth;
        pack_panel<kWidth>(x, args.in, taken, args.in, padded, scratch);
        m += taken;
        return taken;
      };
      if (left == 1) {
        gemv(w, x, row, l0, l1);
        m += 1;
        continue;
      }
      if constexpr (sizeof(T) == 4) {
        if (eights && left <= 8) {
          if (left <= 4) {
            few_rows<4>(w, scratch, row, pack(Width<4>{}), l0, l1);
          } else {
            few_rows<8>(w, scratch, row, pack(Width<8>{}), l0, l1);
          }
          continue;
        }
      }
      if (left > 2 * kL - 8) {
        panel_rows<2>(w, scratch, row, pack(Width<2 * kL>{}), l0, l1);
      } else {
        panel_rows<1>(w, scratch, row, pack(Width<kL>{}), l0, l1);
      }
    }
  }

  template <int kN>
  struct Width {
    static constexpr int value = kN;
  };
};

template <typename T>
void linear(const ProductArgs& args, int64_t m0, int64_t m1, int64_t l0, int64_t l1, void* scratch) {
  with_index_types(args, Linear<T>{args, m0, m1, l0, l1, static_cast<T*>(scratch)});
}

}  // namespace
}  // namespace sp
