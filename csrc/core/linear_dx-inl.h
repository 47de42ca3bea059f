// bcsr_linear_dx, CPU.   dx[M, K] = dy[M, N] @ W[N, K]
//
// W      the values of the forward product [block][C][R] and either pair of its lists: `linear_dx` takes those of the
//        forward product (block rows), `linear_dx_few` the transposed ones (crow_t, row_t and pos_t, the index of each
//        block in `values`)
// dy, dx row-major and contiguous, float or double
// Maths  operands and accumulators in the type of dy; an input's terms are added block row by block row
// Limits linear_dx: any R, C, M >= 0, N, K; fast where R is a multiple of 4. Lists cannot be shared between threads
//        (every block row adds to the same inputs), rows can. linear_dx_few: float, R a multiple of 8, M <= kDxFewRows
// Cost   linear_dx: dx is kept K-major for up to 32 rows, rows in vector lanes; the dy of a block row stays in
//        registers, so a block costs R multiply-adds per vector of rows, a load and a store: bound by the
//        multiply-adds. linear_dx_few: eight outputs in the lanes, bound by the loads of values
#pragma once

#include "core/simd-inl.h"

namespace sp {
namespace {

// y[i * stride + j] = panel[j * kWidth + i] for i < rows, j < count: along eight rows at a time, cache line by cache
// line. (Rows are often a power of two apart and then share cache sets: written column by column, lines of y are
// evicted and fetched again, which doubles the time of a product of 90 % pruned.)
template <int kWidth, typename T>
void turn_back(const T* panel, int64_t rows, int64_t count, T* y, int64_t stride) {
  int64_t done = 0;
  if constexpr (sizeof(T) == 4 && kWidth % 8 == 0) {
    done = count / 16 * 16;
    for (int64_t i = 0; i < rows; i += 8) {
      const int64_t live = rows - i < 8 ? rows - i : 8;
      for (int64_t j = 0; j < done; j += 16) {
        const float* from[16];
        for (int q = 0; q < 16; ++q) from[q] = panel + (j + q) * kWidth + i;
        Vec<float, 8> low[8], high[8];
        transpose8x8(from, low);
        transpose8x8(from + 8, high);
        SP_UNROLL for (int q = 0; q < 8; ++q) {
          if (q >= live) break;
          store<8>(y + (i + q) * stride + j, low[q]);
          store<8>(y + (i + q) * stride + j + 8, high[q]);
        }
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = done; j < count; ++j) y[i * stride + j] = panel[j * kWidth + i];
  }
}

template <typename T, typename Col, bool kIndirect>
struct LinearDx {
  const ProductArgs& args;
  int64_t m0, m1;
  T* panel;  // dx [K, whole blocks][kWidth], then dy [lists * R][kWidth]

  // Adds outputs r0 .. r0 + kS - 1 of block row b, whose dy is `tile` [kS][kWidth], to the panel.
  template <int kS, int kZ, bool k8x1>
  SP_INLINE void slice(const T* tile, int64_t b, int64_t r0) const {
    constexpr int kL = kLanes<T>, kWidth = kL * kZ;
    const int64_t r = k8x1 ? 8 : args.r, c = k8x1 ? 1 : args.c;
    const T* values = static_cast<const T*>(args.values) + r0;
    const Col* col = static_cast<const Col*>(args.other);
    Vec<T, kL> dy[kS][kZ];
    SP_UNROLL for (int i = 0; i < kS; ++i) {
      SP_UNROLL for (int z = 0; z < kZ; ++z) dy[i][z] = load<kL>(tile + i * kWidth + z * kL);
    }
    const int64_t end = args.begin[b + 1];
    for (int64_t e = args.begin[b]; e < end; ++e) {
      const T* block = values + (kIndirect ? args.pos[e] : e) * (r * c);
      T* to = panel + static_cast<int64_t>(col[e]) * c * kWidth;
      for (int64_t j = 0; j < c; ++j, block += r, to += kWidth) {
        // Two chains where one vector alone would wait for the multiply-add.
        constexpr int kChains = kZ == 1 && kS > 1 ? 2 : 1;
        Vec<T, kL> sum[kChains][kZ] = {};
        SP_UNROLL for (int z = 0; z < kZ; ++z) sum[0][z] = load<kL>(to + z * kL);
        SP_UNROLL for (int i = 0; i < kS; ++i) {
          const T weight = block[i];
          SP_UNROLL for (int z = 0; z < kZ; ++z) sum[i % kChains][z] += dy[i][z] * weight;
        }
        SP_UNROLL for (int z = 0; z < kZ; ++z) {
          if (kChains == 2) sum[0][z] += sum[kChains - 1][z];
          store<kL>(to + z * kL, sum[0][z]);
        }
      }
    }
  }

  template <int kZ, bool k8x1>
  void panel_rows(int64_t row, int64_t rows) const {
    constexpr int kWidth = kLanes<T> * kZ;
    const int64_t r = k8x1 ? 8 : args.r;
    const int64_t padded = (args.out + args.c - 1) / args.c * args.c;
    memset(static_cast<void*>(panel), 0, static_cast<size_t>(padded * kWidth) * sizeof(T));
    T* dys = panel + padded * kWidth;
    pack_panel<kWidth>(static_cast<const T*>(args.x) + row * args.in, args.in, rows, args.in, args.lists * r, dys);
    for (int64_t b = 0; b < args.lists; ++b) {
      if (args.begin[b] == args.begin[b + 1]) continue;
      const T* tile = dys + b * r * kWidth;
      int64_t q = 0;
      for (; q + SP_SLICE <= r; q += SP_SLICE) slice<SP_SLICE, kZ, k8x1>(tile + q * kWidth, b, q);
      if constexpr (!k8x1) {
        for (; q + 4 <= r; q += 4) slice<4, kZ, k8x1>(tile + q * kWidth, b, q);
        for (; q < r; ++q) slice<1, kZ, k8x1>(tile + q * kWidth, b, q);
      }
    }
    turn_back<kWidth>(panel, rows, args.out, static_cast<T*>(args.y) + row * args.out, args.out);
  }

  template <bool k8x1>
  void rows() const {
    constexpr int kL = kLanes<T>;
    for (int64_t m = m0; m < m1;) {
      const int64_t left = m1 - m;
      if (left > kL) {
        const int64_t taken = left < 2 * kL ? left : 2 * kL;
        panel_rows<2, k8x1>(m, taken);
        m += taken;
      } else {
        panel_rows<1, k8x1>(m, left);
        m += left;
      }
    }
  }
};

template <typename T>
struct LinearDxOfType {
  const ProductArgs& args;
  int64_t m0, m1;
  T* scratch;

  template <typename Col, bool kIndirect>
  void run() const {
    const LinearDx<T, Col, kIndirect> product{args, m0, m1, scratch};
    if (args.r == 8 && args.c == 1) {
      product.template rows<true>();
    } else {
      product.template rows<false>();
    }
  }
};

// All block rows whatever the range of lists: see the limits above.
template <typename T>
void linear_dx(const ProductArgs& args, int64_t m0, int64_t m1, int64_t, int64_t, void* scratch) {
  with_index_types(args, LinearDxOfType<T>{args, m0, m1, static_cast<T*>(scratch)});
}

// A few rows of dx, R % 8 == 0: eight products in the lanes, summed over the lanes for eight inputs at once.
template <typename Row, bool kIndirect>
struct LinearDxFew {
  const ProductArgs& args;
  int64_t l0, l1;

  template <int kM>
  void rows(const float* dy, int64_t stride, float* dx) const {
    constexpr int kSets = 4 / kM;  // up to four chains of additions hide the multiply-add's latency
    const Row* row = static_cast<const Row*>(args.other);
    const int64_t last = l1 * args.c < args.out ? l1 * args.c : args.out;
    alignas(64) float lanes[kM][64];
    for (int64_t k = l0 * args.c; k < last; k += 8) {
      const int64_t group = last - k < 8 ? last - k : 8;
      for (int64_t q = 0; q < group; ++q) {
        const int64_t list = args.c == 1 ? k + q : (k + q) / args.c;
        const float* column = static_cast<const float*>(args.values) + (k + q - list * args.c) * args.r;
        Vec<float, 8> sum[kSets][kM] = {};
        const auto add = [&](int64_t j, Vec<float, 8>* chain) SP_ALWAYS_INLINE {
          const float* block = column + (kIndirect ? args.pos[j] : j) * args.c * args.r;
          const float* from = dy + static_cast<int64_t>(row[j]) * args.r;
          int64_t i = 0;
          do {
            const Vec<float, 8> weight = load<8>(block + i);
            SP_UNROLL for (int m = 0; m < kM; ++m) chain[m] += load<8>(from + m * stride + i) * weight;
            i += 8;
          } while (i < args.r);
        };
        int64_t j = args.begin[list];
        const int64_t end = args.begin[list + 1];
        for (; j + kSets <= end; j += kSets) {
          SP_UNROLL for (int set = 0; set < kSets; ++set) add(j + set, sum[set]);
        }
        for (; j < end; ++j) add(j, sum[0]);
        SP_UNROLL for (int m = 0; m < kM; ++m) {
          SP_UNROLL for (int set = 1; set < kSets; ++set) sum[0][m] += sum[set][m];
          store<8>(lanes[m] + q * 8, sum[0][m]);
        }
      }
      for (int m = 0; m < kM; ++m) {
        const float* from[8];
        Vec<float, 8> column[8];
        for (int q = 0; q < 8; ++q) from[q] = lanes[m] + (q < group ? q : 0) * 8;
        transpose8x8(from, column);
        Vec<float, 8> total = column[0];
        for (int q = 1; q < 8; ++q) total += column[q];
        store_first<8>(dx + m * args.out + k, total, group);
      }
    }
  }
};

struct LinearDxFewOfType {
  const ProductArgs& args;
  int64_t m0, m1, l0, l1;
  float* scratch;

  template <typename Row, bool kIndirect>
  void run() const {
    const LinearDxFew<Row, kIndirect> product{args, l0, l1};
    const int64_t padded = (args.in + args.r - 1) / args.r * args.r;
    for (int64_t m = m0; m < m1;) {
      const int64_t taken = m1 - m < kDxFewRows ? m1 - m : kDxFewRows;
      const float* dy = static_cast<const float*>(args.x) + m * args.in;
      float* dx = static_cast<float*>(args.y) + m * args.out;
      if (padded != args.in) {  // blocks stick out of the weight: whole vectors of dy must exist
        for (int64_t i = 0; i < taken; ++i) {
          memcpy(scratch + i * padded, dy + i * args.in, static_cast<size_t>(args.in) * sizeof(float));
          memset(scratch + i * padded + args.in, 0, static_cast<size_t>(padded - args.in) * sizeof(float));
        }
        dy = scratch;
      }
      if (taken == 1) {
        product.template rows<1>(dy, padded, dx);
      } else {
        product.template rows<2>(dy, padded, dx);
      }
      m += taken;
    }
  }
};

inline void linear_dx_few(const ProductArgs& args, int64_t m0, int64_t m1, int64_t l0, int64_t l1, void* scratch) {
  with_index_types(args, LinearDxFewOfType{args, m0, m1, l0, l1, static_cast<float*>(scratch)});
}

}  // namespace
}  // namespace sp
