// bcsr_linear_dw, CPU.   dw[N, K] = dy[M, N].T @ x[M, K], on kept blocks only
//
// dy, x  row-major and contiguous, float or double
// dw     dense [N, K], zero where pruned, or blocks [block][C][R] like the values of the forward product
// Maths  operands and accumulators in the type of x. Up to kFewGradRows: per cell one sum, row by row. More: per cell
//        one partial sum per vector lane and chunk of kGradRows
// Limits any R, C, M >= 0, N, K; blocks may stick out of the weight; the columns of a list ascend. Fast where R is a
//        multiple of 8
// Cost   few rows: eight outputs in vector lanes, x turned and broadcast: a multiply-add and a load per row and block.
//        More: x and dy are turned so that rows lie in vector lanes, SP_SLICE outputs x kColumns inputs share their
//        loads, and the sum over the lanes comes once per block and chunk. x is taken in panels of columns that stay
//        in the second cache. (Zen 5, one thread, 8x1 blocks: from cache 280 GFLOP/s, of a peak of 286; with blocks at
//        random and dy from the third cache 200. At 16 rows 75, where writing a dense dw is a quarter of the time.)
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

// With vectors of 512 bits half of the lanes would idle over eight outputs; rows fill them all.
constexpr int64_t kFewGradRows = SP_VECTOR_BYTES == 64 ? 24 : 256;

// Inputs per pass of kS outputs, rows in the lanes: the accumulators and their operands fill the registers.
template <int kS>
constexpr int kColumns = kS == 1 ? 8 : (SP_SLICE == 8 ? 16 : 8) / kS;
// Inputs per pass, outputs in the lanes: as many chains of additions as hide the latency of the multiply-add.
constexpr int kFewColumns = SP_VECTOR_BYTES >= 32 ? 8 : 4;

// Column j of x, j0 <= j < j1, in pieces of 16 rows that are `step` apart from place(j) on; 0 for rows <= i < length.
template <typename T, typename Place>
SP_INLINE void turn_columns(const T* x, int64_t stride, int64_t rows, int64_t j0, int64_t j1, int64_t length,
                            int64_t step, const Place& place) {
  for (int64_t j = j0; j < j1; j += 16) {
    const int64_t width = j1 - j < 16 ? j1 - j : 16;
    T* to[16];
    for (int64_t q = 0; q < width; ++q) to[q] = place(j + q);
    int64_t i = 0;
    if constexpr (sizeof(T) == 4) {
      if (width % 8 == 0) {
        for (; i + 8 <= rows; i += 8) {
          const int64_t at = i / 16 * step + i % 16;
          for (int64_t half = 0; half < width; half += 8) {
            const float* from[8];
            for (int q = 0; q < 8; ++q) from[q] = x + (i + q) * stride + j + half;
            Vec<float, 8> column[8];
            transpose8x8(from, column);
            SP_UNROLL for (int q = 0; q < 8; ++q) store<8>(to[half + q] + at, column[q]);
          }
        }
      }
    }
    for (; i < length; ++i) {
      const int64_t at = i / 16 * step + i % 16;
      for (int64_t q = 0; q < width; ++q) to[q][at] = i < rows ? x[i * stride + j + q] : T(0);
    }
  }
}

// sums[q] = sum of the lanes of acc[q].
template <int kS, typename T, int kL>
SP_INLINE void add_lanes(const typename VecOf<T, kL>::type* acc, T* sums) {
  if constexpr (sizeof(T) == 4 && kL == 16 && kS == 16) {
    // Each step adds two halves of two vectors; in this order the sums come out as they are numbered.
    Vec<T, 16> four[4];
    SP_UNROLL for (int q = 0; q < 4; ++q) {
      Vec<T, 16> two[2];
      SP_UNROLL for (int p = 0; p < 2; ++p) {
        const Vec<T, 16> a = acc[8 * p + q], b = acc[8 * p + 4 + q];
        two[p] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                 __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
      }
      four[q] = __builtin_shufflevector(two[0], two[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                __builtin_shufflevector(two[0], two[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    Vec<T, 16> pair[2];
    SP_UNROLL for (int q = 0; q < 2; ++q) {
      const Vec<T, 16> a = four[2 * q], b = four[2 * q + 1];
      pair[q] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    store<16>(
        sums,
        __builtin_shufflevector(pair[0], pair[1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
            __builtin_shufflevector(pair[0], pair[1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
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
  } else if constexpr (sizeof(T) == 4 && kL == 4 && kS == 8) {
    add_lanes<4, T, 4>(acc, sums);
    add_lanes<4, T, 4>(acc + 4, sums + 4);
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

// One input of one block: its turned column of x, and where the gradient of its outputs goes.
template <typename T>
struct GradCell {
  const T* x;
  T* to;
};

// What is done with sums: output q of a cell goes to to[q * stride]; outputs from `live` on do not exist.
struct GradPut {
  int64_t stride, live;
  bool add;  // to what the chunks of rows before left
};

template <int kS, typename T>
SP_INLINE void put(const GradPut& how, const T* sums, T* to) {
  if (how.live >= kS && how.stride == 1) {
    Vec<T, kS> sum = load<kS>(sums);
    if (how.add) sum += load<kS>(to);
    store<kS>(to, sum);
  } else if (how.live >= kS && !how.add) {
    SP_UNROLL for (int q = 0; q < kS; ++q) to[q * how.stride] = sums[q];
  } else {
    for (int64_t q = 0; q < kS && q < how.live; ++q) {
      to[q * how.stride] = how.add ? to[q * how.stride] + sums[q] : sums[q];
    }
  }
}

// kS outputs of `count` cells; behind those stand as many as fill kG. Functions of their own: their loops need all
// registers.
//
// Many rows, in the lanes, `length` of them: output q of dy in pieces of 16 rows, `step` apart from dy + 16 * q on.
template <int kS, int kG, typename T>
__attribute__((noinline)) void cells_by_rows(const T* dy, int64_t step, int64_t length, const GradCell<T>* cell,
                                             int64_t count, const GradPut& how) {
  constexpr int kL = kLanes<T>;
  for (; count > 0; count -= kG, cell += kG) {
    Vec<T, kL> sum[kG * kS] = {};
    const T* from[kG];
    SP_UNROLL for (int g = 0; g < kG; ++g) from[g] = cell[g].x;
    const T* tile = dy;
    for (int64_t i = 0; i < length; i += 16, tile += step) {
      SP_UNROLL for (int z = 0; z < 16; z += kL) {
        Vec<T, kL> x[kG];
        SP_UNROLL for (int g = 0; g < kG; ++g) x[g] = load<kL>(from[g] + i + z);
        SP_UNROLL for (int q = 0; q < kS; ++q) {
          Vec<T, kL> one = load<kL>(tile + q * 16 + z);
          SP_IN_REGISTER(one);
          SP_UNROLL for (int g = 0; g < kG; ++g) sum[g * kS + q] += one * x[g];
        }
      }
    }
    alignas(64) T sums[kG * kS];
    constexpr int kTogether = kL == 16 && kG * kS == 16 ? 16 : kS;
    SP_UNROLL for (int s = 0; s < kG * kS; s += kTogether) add_lanes<kTogether, T, kL>(sum + s, sums + s);
    SP_UNROLL for (int g = 0; g < kG; ++g) {
      if (g < count) put<kS>(how, sums + g * kS, cell[g].to);
    }
  }
}

// Few rows: outputs in the lanes, dy as [rows][8].
template <int kS, int kG, typename T>
__attribute__((noinline)) void cells_by_outputs(const T* dy, int64_t rows, const GradCell<T>* cell, int64_t count,
                                                const GradPut& how) {
  for (; count > 0; count -= kG, cell += kG) {
    Vec<T, kS> sum[kG] = {};
    const T* from[kG];
    SP_UNROLL for (int g = 0; g < kG; ++g) from[g] = cell[g].x;
    for (int64_t i = 0; i < rows; ++i) {
      const Vec<T, kS> one = load<kS>(dy + i * 8);
      SP_UNROLL for (int g = 0; g < kG; ++g) sum[g] += one * from[g][i];
    }
    alignas(64) T sums[kG][kS];
    SP_UNROLL for (int g = 0; g < kG; ++g) store<kS>(sums[g], sum[g]);
    SP_UNROLL for (int g = 0; g < kG; ++g) {
      if (g < count) put<kS>(how, sums[g], cell[g].to);
    }
  }
}

template <typename T, typename Col, bool kIndirect>
struct LinearDw {
  const WeightGradArgs& args;
  const T* columns;  // of x, turned: column k at (k - k0) * apart
  int64_t rows, apart, k0;
  bool add;

  // Outputs r0 .. r0 + kS - 1 of entries [begin, end) of block row b; dy as the functions above want it.
  template <int kS, bool kFew>
  void slice(const T* dy, int64_t b, int64_t r0, int64_t begin, int64_t end) const {
    constexpr int kG = kFew ? kFewColumns : kColumns<kS>, kRoom = 64;
    const GradPut how{args.dense ? args.k : 1, args.n - b * args.r - r0, add};
    const Col* col = static_cast<const Col*>(args.other);
    T* dw = static_cast<T*>(args.dw) + r0 * how.stride;
    GradCell<T> cells[kRoom + kG];
    const auto cell = [&](int64_t e, int64_t k, int64_t j) SP_ALWAYS_INLINE -> GradCell<T> {
      const int64_t block = kIndirect ? args.pos[e] : e;
      return {columns + (k - k0) * apart, dw + (args.dense ? b * args.r * args.k + k : (block * args.c + j) * args.r)};
    };
    int64_t j = 0;
    for (int64_t e = begin; e < end;) {
      int64_t count = 0;
      if (args.c == 1) {
        count = end - e < kRoom ? end - e : kRoom;
        for (int64_t i = 0; i < count; ++i) cells[i] = cell(e + i, col[e + i], 0);
        e += count;
      }
      for (; count < kRoom && e < end; ++count) {
        const int64_t k = static_cast<int64_t>(col[e]) * args.c + j;
        cells[count] = cell(e, k, j);
        if (++j == args.c || k + 1 == args.k) j = 0, ++e;
      }
      for (int64_t g = count; g < count + kG; ++g) cells[g] = cells[0];
      if constexpr (kFew) {
        cells_by_outputs<kS, kG>(dy, rows, cells, count, how);
      } else {
        cells_by_rows<kS, kG>(dy, args.r * 16, turned_length(rows), cells, count, how);
      }
    }
  }

  // What no product is written to, of columns [k0, k1) and entries [begin, end): pruned cells of a dense gradient, the
  // padding of blocks that stick out.
  void clear(int64_t b, int64_t k1, int64_t begin, int64_t end) const {
    T* dw = static_cast<T*>(args.dw);
    const int64_t live = args.n - b * args.r < args.r ? args.n - b * args.r : args.r;
    if (args.dense) {
      const bool whole = k0 == 0 && k1 == args.k;  // then its rows are one piece
      for (int64_t i = 0; i < (whole ? 1 : live); ++i) {
        memset(static_cast<void*>(dw + (b * args.r + i) * args.k + k0), 0,
               static_cast<size_t>((k1 - k0) * (whole ? live : 1)) * sizeof(T));
      }
      return;
    }
    const Col* col = static_cast<const Col*>(args.other);
    const int64_t size = args.r * args.c;
    for (int64_t e = begin; e < end; ++e) {
      if (live == args.r && (static_cast<int64_t>(col[e]) + 1) * args.c <= args.k) continue;
      memset(static_cast<void*>(dw + (kIndirect ? args.pos[e] : e) * size), 0, static_cast<size_t>(size) * sizeof(T));
    }
  }

  // Block row b by its turned dy, [R][apart]: the entries of columns [k0, k1), which begin at *cursor.
  void many(int64_t b, int64_t k1, const T* dy, int32_t* cursor) const {
    const Col* col = static_cast<const Col*>(args.other);
    const int64_t begin = k0 == 0 ? args.begin[b] : *cursor;
    int64_t end = begin;
    while (end < args.begin[b + 1] && static_cast<int64_t>(col[end]) * args.c < k1) ++end;
    *cursor = static_cast<int32_t>(end);
    if (!add) clear(b, k1, begin, end);
    if (begin == end) return;
    int64_t q = 0;
    for (; q + SP_SLICE <= args.r; q += SP_SLICE) slice<SP_SLICE, false>(dy + q * 16, b, q, begin, end);
    for (; q + 4 <= args.r; q += 4) slice<4, false>(dy + q * 16, b, q, begin, end);
    for (; q < args.r; ++q) slice<1, false>(dy + q * 16, b, q, begin, end);
  }

  // Block row b, all its entries. `tile`: room for [rows][8].
  void few(int64_t b, T* tile) const {
    const int64_t begin = args.begin[b], end = args.begin[b + 1];
    clear(b, args.k, begin, end);
    if (begin == end) return;
    for (int64_t r0 = 0; r0 < args.r; r0 += 8) {
      const int64_t height = args.r - r0 < 8 ? args.r - r0 : 8;
      const T* dy = static_cast<const T*>(args.dy) + b * args.r + r0;
      const int64_t live = args.n - b * args.r - r0;
      if (live <= 0) return;
      for (int64_t i = 0; i < rows; ++i, dy += args.n) {
        if (live >= 8) {
          store<8>(tile + i * 8, load<8>(dy));
        } else {
          for (int64_t q = 0; q < 8; ++q) tile[i * 8 + q] = q < live ? dy[q] : T(0);
        }
      }
      int64_t q = 0;
      for (; q + 8 <= height; q += 8) slice<8, true>(tile + q, b, r0 + q, begin, end);
      for (; q + 4 <= height; q += 4) slice<4, true>(tile + q, b, r0 + q, begin, end);
      for (; q < height; ++q) slice<1, true>(tile + q, b, r0 + q, begin, end);
    }
  }
};

template <typename T>
struct LinearDwOfType {
  const WeightGradArgs& args;
  const WeightGradShare& share;

  template <typename Col, bool kIndirect>
  void run() const {
    const int64_t rows = share.m1 - share.m0;
    const T* columns = static_cast<const T*>(share.columns);
    if (args.m <= kFewGradRows) {
      const LinearDw<T, Col, kIndirect> product{args, columns, rows, few_stride(rows), 0, false};
      for (int64_t b = share.l0; b < share.l1; ++b) product.few(b, static_cast<T*>(share.scratch));
    } else {
      const LinearDw<T, Col, kIndirect> product{args, columns, rows, turned_stride(rows), share.k0, share.m0 > 0};
      const int64_t apart = args.r * turned_length(rows);
      for (int64_t b = share.l0; b < share.l1; ++b) {
        product.many(b, share.k1, static_cast<const T*>(share.dys) + b * apart, share.cursor + b);
      }
    }
  }
};

template <typename T>
void linear_dw(const WeightGradArgs& args, const WeightGradShare& share) {
  with_index_types(args, LinearDwOfType<T>{args, share});
}

template <typename T>
void turn_x(const WeightGradArgs& args, const WeightGradShare& share, int64_t k0, int64_t k1) {
  const int64_t rows = share.m1 - share.m0;
  const bool few = args.m <= kFewGradRows;
  const int64_t apart = few ? few_stride(rows) : turned_stride(rows);
  T* to = static_cast<T*>(share.columns);
  turn_columns(static_cast<const T*>(args.x) + share.m0 * args.k, args.k, rows, k0, k1,
               few ? apart : turned_length(rows), 16,
               [&](int64_t k) SP_ALWAYS_INLINE { return to + (k - share.k0) * apart; });
}

template <typename T>
void turn_dy(const WeightGradArgs& args, const WeightGradShare& share, int64_t n0, int64_t n1) {
  const int64_t rows = share.m1 - share.m0, length = turned_length(rows), r = args.r;
  T* to = static_cast<T*>(share.dys);
  if (n1 == args.n && n1 % r != 0) {  // outputs that the last blocks have and the weight has not
    memset(static_cast<void*>(to + n1 / r * r * length), 0, static_cast<size_t>(r * length) * sizeof(T));
  }
  const T* from = static_cast<const T*>(args.dy) + share.m0 * args.n;
  turn_columns(from, args.n, rows, n0, n1, length, r * 16,
               [&](int64_t n) { return to + n / r * r * length + n % r * 16; });
}

template <typename T>
constexpr WeightGradKernel kWeightGrad = {kFewGradRows, &turn_x<T>, &turn_dy<T>, &linear_dw<T>};

}  // namespace
}  // namespace sp
