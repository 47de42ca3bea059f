// bcsr_linear_dw, CPU.   dw[N, K] = dy[M, N].T @ x[M, K], on kept blocks only
//
// dy, x  row-major and contiguous, float or double
// dw     dense [N, K], zero where pruned, or blocks [block][C][R] like the values of the forward product
// Maths  operands and accumulators in the type of x: per cell one partial sum per vector lane and chunk of kGradRows
// Limits any R, C, M >= 0, N, K; blocks may stick out of the weight. Fast where R is a multiple of SP_SLICE
// Cost   x and the dy of a block row are turned so that rows of the batch lie in vector lanes; SP_SLICE outputs x
//        kColumns inputs share their loads. The sum over the lanes comes once per block and chunk, so few rows are
//        slow: on a Zen 4, 8x1 blocks, 60 GFLOP/s at 512 rows (a dense product 90), 24 at 64 rows (60)
#pragma once

#include "core/simd-inl.h"

// Keeps the compiler from loading a value anew, as an operand from memory, in each instruction that uses it.
#if defined(__x86_64__)
#define SP_IN_REGISTER(vector) __asm__("" : "+v"(vector))
#else
#define SP_IN_REGISTER(vector) static_cast<void>(vector)
#endif

namespace sp {
namespace {

// Inputs per pass of kS outputs: the accumulators and their operands fill the registers.
constexpr int kMostColumns = 8;
template <int kS>
constexpr int kColumns = kS == 1 ? kMostColumns : (SP_SLICE == 8 ? 24 : 8) / kS;

// packed[(j - j0) * turned_stride(rows) + i] = x[i * stride + j] for j0 <= j < j1, i < rows; 0 up to a whole vector.
template <typename T>
SP_INLINE void turn(const T* x, int64_t stride, int64_t rows, int64_t j0, int64_t j1, T* packed) {
  const int64_t length = turned_stride(rows);
  for (int64_t j = j0; j < j1; j += 16) {
    const int64_t width = j1 - j < 16 ? j1 - j : 16;
    T* to = packed + (j - j0) * length;
    int64_t i = 0;
    if constexpr (sizeof(T) == 4) {
      if (width % 8 == 0) {
        for (; i + 8 <= rows; i += 8) {
          const float* from[8];
          for (int64_t half = 0; half < width; half += 8) {
            for (int q = 0; q < 8; ++q) from[q] = x + (i + q) * stride + j + half;
            Vec<float, 8> column[8];
            transpose8x8(from, column);
            SP_UNROLL for (int q = 0; q < 8; ++q) store<8>(to + (half + q) * length + i, column[q]);
          }
        }
      }
    }
    for (int64_t q = 0; q < width; ++q) {
      for (int64_t t = i; t < rows; ++t) to[q * length + t] = x[t * stride + j + q];
      memset(static_cast<void*>(to + q * length + rows), 0,
             static_cast<size_t>(turned_length(rows) - rows) * sizeof(T));
    }
  }
}

// sums[q] = sum of the lanes of acc[q].
template <int kS, typename T, int kL>
SP_INLINE void add_lanes(const typename VecOf<T, kL>::type* acc, T* sums) {
  if constexpr (sizeof(T) == 4 && kL > kS && kS >= 4) {
    Vec<T, kL / 2> half[kS];
    SP_UNROLL for (int q = 0; q < kS; ++q) {
      alignas(64) T lanes[kL];
      store<kL>(lanes, acc[q]);
      half[q] = load<kL / 2>(lanes) + load<kL / 2>(lanes + kL / 2);
    }
    add_lanes<kS, T, kL / 2>(half, sums);
  } else if constexpr (sizeof(T) == 4 && kL == 8 && kS == 8) {
    Vec<T, 8> pair[4], quad[2];
    SP_UNROLL for (int q = 0; q < 4; ++q) {
      pair[q] = __builtin_shufflevector(acc[2 * q], acc[2 * q + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
                __builtin_shufflevector(acc[2 * q], acc[2 * q + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    SP_UNROLL for (int q = 0; q < 2; ++q) {
      quad[q] = __builtin_shufflevector(pair[2 * q], pair[2 * q + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                __builtin_shufflevector(pair[2 * q], pair[2 * q + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    store<8>(sums, __builtin_shufflevector(quad[0], quad[1], 0, 1, 2, 3, 8, 9, 10, 11) +
                       __builtin_shufflevector(quad[0], quad[1], 4, 5, 6, 7, 12, 13, 14, 15));
  } else if constexpr (sizeof(T) == 4 && kL == 4 && kS == 4) {
    Vec<T, 4> pair[2];
    SP_UNROLL for (int q = 0; q < 2; ++q) {
      pair[q] = __builtin_shufflevector(acc[2 * q], acc[2 * q + 1], 0, 4, 2, 6) +
                __builtin_shufflevector(acc[2 * q], acc[2 * q + 1], 1, 5, 3, 7);
    }
    store<4>(sums, __builtin_shufflevector(pair[0], pair[1], 0, 1, 4, 5) +
                       __builtin_shufflevector(pair[0], pair[1], 2, 3, 6, 7));
  } else {
    SP_UNROLL for (int q = 0; q < kS; ++q) {
      T sum = 0;
      for (int i = 0; i < kL; ++i) sum += acc[q][i];
      sums[q] = sum;
    }
  }
}

// One input of one block: its packed column of x, and where the gradient of its R outputs goes.
template <typename T>
struct GradCell {
  const T* x;
  T* to;
};

template <typename T, typename Col, bool kIndirect>
struct LinearDw {
  const WeightGradArgs& args;
  const T* columns;
  int64_t rows;
  bool add;  // to what the chunks of rows before left

  // Outputs r0 .. r0 + kS - 1 (dy packed) of kG cells; outputs from `live` on do not exist.
  template <int kS, int kG>
  SP_INLINE void cells(const T* dy, const GradCell<T>* cell, int64_t r0, int64_t live) const {
    constexpr int kL = kLanes<T>;
    Vec<T, kL> sum[kG][kS] = {};
    const int64_t length = turned_length(rows), apart = turned_stride(rows);
    const T* from[kG];
    SP_UNROLL for (int g = 0; g < kG; ++g) from[g] = cell[g].x;
    for (int64_t i = 0; i < length; i += kL) {
      Vec<T, kL> x[kG];
      SP_UNROLL for (int g = 0; g < kG; ++g) x[g] = load<kL>(from[g] + i);
      SP_UNROLL for (int q = 0; q < kS; ++q) {
        Vec<T, kL> one = load<kL>(dy + q * apart + i);
        SP_IN_REGISTER(one);
        SP_UNROLL for (int g = 0; g < kG; ++g) sum[g][q] += one * x[g];
      }
    }
    const int64_t stride = args.dense ? args.k : 1;
    SP_UNROLL for (int g = 0; g < kG; ++g) {
      T sums[kS];
      add_lanes<kS, T, kL>(sum[g], sums);
      T* to = cell[g].to + r0 * stride;
      for (int64_t q = 0; q < kS && q < live; ++q) to[q * stride] = add ? to[q * stride] + sums[q] : sums[q];
    }
  }

  template <int kS>
  SP_INLINE void flush(const T* dy, const GradCell<T>* cell, int64_t count, int64_t r0, int64_t live) const {
    if (count == kColumns<kS>) {
      cells<kS, kColumns<kS>>(dy, cell, r0, live);
    } else {
      for (int64_t g = 0; g < count; ++g) cells<kS, 1>(dy, cell + g, r0, live);
    }
  }

  // Outputs r0 .. r0 + kS - 1 of all blocks of block row b.
  template <int kS>
  SP_INLINE void slice(const T* dy, int64_t b, int64_t r0) const {
    const Col* col = static_cast<const Col*>(args.other);
    T* dw = static_cast<T*>(args.dw);
    const int64_t live = args.n - b * args.r - r0;
    GradCell<T> cell[kColumns<kS>];
    int64_t count = 0;
    for (int64_t e = args.begin[b]; e < args.begin[b + 1]; ++e) {
      const int64_t first = static_cast<int64_t>(col[e]) * args.c;
      const int64_t width = args.k - first < args.c ? args.k - first : args.c;
      const int64_t block = kIndirect ? args.pos[e] : e;
      for (int64_t j = 0; j < width; ++j) {
        T* to = args.dense ? dw + b * args.r * args.k + first + j : dw + (block * args.c + j) * args.r;
        cell[count++] = {columns + (first + j) * turned_stride(rows), to};
        if (count == kColumns<kS>) {
          flush<kS>(dy, cell, count, r0, live);
          count = 0;
        }
      }
    }
    flush<kS>(dy, cell, count, r0, live);
  }

  // What no product is written to: pruned cells of a dense gradient, the padding of blocks that stick out.
  void clear(int64_t b) const {
    T* dw = static_cast<T*>(args.dw);
    const int64_t live = args.n - b * args.r < args.r ? args.n - b * args.r : args.r;
    if (args.dense) {
      memset(static_cast<void*>(dw + b * args.r * args.k), 0, static_cast<size_t>(live * args.k) * sizeof(T));
      return;
    }
    const Col* col = static_cast<const Col*>(args.other);
    const int64_t size = args.r * args.c;
    for (int64_t e = args.begin[b]; e < args.begin[b + 1]; ++e) {
      if (live == args.r && (static_cast<int64_t>(col[e]) + 1) * args.c <= args.k) continue;
      memset(static_cast<void*>(dw + (kIndirect ? args.pos[e] : e) * size), 0, static_cast<size_t>(size) * sizeof(T));
    }
  }

  void block_row(int64_t b, const T* dy, T* turned) const {
    if (!add) clear(b);
    if (args.begin[b] == args.begin[b + 1]) return;
    const int64_t length = turned_stride(rows);
    for (int64_t r0 = 0; r0 < args.r; r0 += 8) {
      const int64_t height = args.r - r0 < 8 ? args.r - r0 : 8;
      const int64_t n = b * args.r + r0;
      const int64_t live = args.n - n < height ? args.n - n : height;
      if (live <= 0) return;
      turn(dy, args.n, rows, n, n + live, turned);
      memset(static_cast<void*>(turned + live * length), 0, static_cast<size_t>((height - live) * length) * sizeof(T));
      int64_t q = 0;
      for (; q + SP_SLICE <= height; q += SP_SLICE) slice<SP_SLICE>(turned + q * length, b, r0 + q);
      for (; q + 4 <= height; q += 4) slice<4>(turned + q * length, b, r0 + q);
      for (; q < height; ++q) slice<1>(turned + q * length, b, r0 + q);
    }
  }
};

template <typename T>
struct LinearDwOfType {
  const WeightGradArgs& args;
  int64_t m0, m1, l0, l1;
  const T* columns;
  T* scratch;

  template <typename Col, bool kIndirect>
  void run() const {
    const LinearDw<T, Col, kIndirect> product{args, columns, m1 - m0, m0 > 0};
    const T* dy = static_cast<const T*>(args.dy) + m0 * args.n;
    for (int64_t b = l0; b < l1; ++b) product.block_row(b, dy, scratch);
  }
};

template <typename T>
void turn_columns(const WeightGradArgs& args, int64_t m0, int64_t m1, int64_t k0, int64_t k1, void* columns) {
  const T* x = static_cast<const T*>(args.x) + m0 * args.k;
  turn(x, args.k, m1 - m0, k0, k1, static_cast<T*>(columns) + k0 * turned_stride(m1 - m0));
}

template <typename T>
void linear_dw(const WeightGradArgs& args, int64_t m0, int64_t m1, int64_t l0, int64_t l1, const void* columns,
               void* scratch) {
  with_index_types(args,
                   LinearDwOfType<T>{args, m0, m1, l0, l1, static_cast<const T*>(columns), static_cast<T*>(scratch)});
}

template <typename T>
constexpr WeightGradKernel kWeightGrad = {&turn_columns<T>, &linear_dw<T>};

}  // namespace
}  // namespace sp
