// bcsr_linear_dx, CPU.   dx[M, K] = dy[M, N] @ W[N, K]
//
// W      the values of the forward product [block][C][R]; lists in transposed order: crow_t [KB + 1], and per entry the
//        block row row_t (uint16/int32) and pos_t, the index of its block in `values`
// dy, dx row-major and contiguous, float or double
// Maths  operands and accumulators in the type of dy; four partial sums per input when R = 8
// Limits any R, C, M >= 0, N, K. Fast for R = 8 and M >= 16; smaller M pays for a full panel
// Cost   dy is packed K-major ([N][rows]), rows in vector lanes: per block R multiply-adds of whole vectors, each with
// a
//        weight broadcast and one load of dy: bound by loads
#pragma once

#include "core/simd-inl.h"

namespace sp {
namespace {

template <typename T, typename Row, bool kIndirect>
struct LinearDx {
  const ProductArgs& args;
  int64_t m0, m1, l0, l1;
  T* scratch;

  // Column `k` of dx for the rows of a panel, kZ vectors of them.
  template <int kZ, bool kEight>
  SP_INLINE void column(const T* panel, int64_t k, T* sums) const {
    constexpr int kL = kLanes<T>, kWidth = kL * kZ;
    const int64_t r = kEight ? 8 : args.r;
    const int64_t list = args.c == 1 ? k : k / args.c;
    const T* values = static_cast<const T*>(args.values) + (k - list * args.c) * r;
    const Row* row = static_cast<const Row*>(args.other);
    const int64_t block_size = args.c * r;
    Vec<T, kL> sum[4][kZ] = {};
    const int64_t end = args.begin[list + 1];
    for (int64_t j = args.begin[list]; j < end; ++j) {
      const T* block = values + (kIndirect ? args.pos[j] : j) * block_size;
      const T* dy = panel + static_cast<int64_t>(row[j]) * r * kWidth;
      if (kEight) {
        SP_UNROLL for (int i = 0; i < 8; ++i) {
          SP_UNROLL for (int z = 0; z < kZ; ++z) sum[i % 4][z] += load<kL>(dy + i * kWidth + z * kL) * block[i];
        }
      } else {
        for (int64_t i = 0; i < r; ++i) {
          SP_UNROLL for (int z = 0; z < kZ; ++z) sum[0][z] += load<kL>(dy + i * kWidth + z * kL) * block[i];
        }
      }
    }
    SP_UNROLL for (int z = 0; z < kZ; ++z) {
      store<kL>(sums + z * kL, (sum[0][z] + sum[1][z]) + (sum[2][z] + sum[3][z]));
    }
  }

  template <int kZ, bool kEight>
  void panel_rows(const T* dy, int64_t rows, T* dx) const {
    constexpr int kWidth = kLanes<T> * kZ;
    const int64_t padded = (args.in + args.r - 1) / args.r * args.r;
    pack_panel<kWidth>(dy, args.in, rows, args.in, padded, scratch);
    alignas(64) T tile[8 * kWidth];
    const int64_t last = l1 * args.c < args.out ? l1 * args.c : args.out;
    for (int64_t k = l0 * args.c; k < last; k += 8) {
      const int64_t group = last - k < 8 ? last - k : 8;
      for (int64_t q = 0; q < group; ++q) column<kZ, kEight>(scratch, k + q, tile + q * kWidth);
      store_tile<kWidth>(tile, rows, group, dx + k, args.out);
    }
  }

  // kM rows of dx, R = 8, N % 8 == 0, float: eight products in the lanes, summed over the lanes for eight columns at
  // once.
  template <int kM>
  void few_rows(const T* dy, T* dx) const {
    constexpr int kSets = 4 / kM;  // up to four chains of additions hide the multiply-add's latency
    const T* values = static_cast<const T*>(args.values);
    const Row* row = static_cast<const Row*>(args.other);
    const int64_t last = l1 * args.c < args.out ? l1 * args.c : args.out;
    alignas(64) T lanes[kM][64];
    for (int64_t k = l0 * args.c; k < last; k += 8) {
      const int64_t group = last - k < 8 ? last - k : 8;
      for (int64_t q = 0; q < group; ++q) {
        const int64_t list = args.c == 1 ? k + q : (k + q) / args.c;
        const T* column = values + (k + q - list * args.c) * 8;
        Vec<T, 8> sum[kSets][kM] = {};
        const auto add = [&](int64_t j, Vec<T, 8>* chain) SP_ALWAYS_INLINE {
          const Vec<T, 8> weight = load<8>(column + (kIndirect ? args.pos[j] : j) * args.c * 8);
          const T* from = dy + static_cast<int64_t>(row[j]) * 8;
          SP_UNROLL for (int i = 0; i < kM; ++i) chain[i] += load<8>(from + i * args.in) * weight;
        };
        int64_t j = args.begin[list];
        const int64_t end = args.begin[list + 1];
        for (; j + kSets <= end; j += kSets) {
          SP_UNROLL for (int set = 0; set < kSets; ++set) add(j + set, sum[set]);
        }
        for (; j < end; ++j) add(j, sum[0]);
        SP_UNROLL for (int i = 0; i < kM; ++i) {
          SP_UNROLL for (int set = 1; set < kSets; ++set) sum[0][i] += sum[set][i];
          store<8>(lanes[i] + q * 8, sum[0][i]);
        }
      }
      for (int i = 0; i < kM; ++i) {
        const T* from[8];
        Vec<T, 8> column[8];
        for (int q = 0; q < 8; ++q) from[q] = lanes[i] + (q < group ? q : 0) * 8;
        transpose8x8(from, column);
        Vec<T, 8> total = column[0];
        for (int q = 1; q < 8; ++q) total += column[q];
        store_first<8>(dx + i * args.out + k, total, group);
      }
    }
  }

  template <bool kEight>
  void rows() const {
    constexpr int kL = kLanes<T>;
    for (int64_t m = m0; m < m1;) {
      const T* dy = static_cast<const T*>(args.x) + m * args.in;
      T* dx = static_cast<T*>(args.y) + m * args.out;
      const int64_t left = m1 - m;
      if constexpr (kEight && sizeof(T) == 4) {
        if (left <= (kL < 8 ? kL : 8) && args.in % 8 == 0) {
          switch (left) {
            case 1:
              few_rows<1>(dy, dx), m += 1;
              break;
            case 2:
              few_rows<2>(dy, dx), m += 2;
              break;
            case 3:
              few_rows<3>(dy, dx), m += 3;
              break;
            default:
              few_rows<4>(dy, dx), m += 4;
          }
          continue;
        }
      }
      if (left > kL) {
        const int64_t taken = left < 2 * kL ? left : 2 * kL;
        panel_rows<2, kEight>(dy, taken, dx);
        m += taken;
      } else {
        panel_rows<1, kEight>(dy, left, dx);
        m += left;
      }
    }
  }
};

template <typename T>
struct LinearDxOfType {
  const ProductArgs& args;
  int64_t m0, m1, l0, l1;
  T* scratch;

  template <typename Row, bool kIndirect>
  void run() const {
    const LinearDx<T, Row, kIndirect> product{args, m0, m1, l0, l1, scratch};
    if (args.r == 8) {
      product.template rows<true>();
    } else {
      product.template rows<false>();
    }
  }
};

template <typename T>
void linear_dx(const ProductArgs& args, int64_t m0, int64_t m1, int64_t l0, int64_t l1, void* scratch) {
  with_index_types(args, LinearDxOfType<T>{args, m0, m1, l0, l1, static_cast<T*>(scratch)});
}

}  // namespace
}  // namespace sp
