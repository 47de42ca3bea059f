// int8 products by vpdpbusd whose weight was arranged once: nothing about the weight is left to do but to multiply.
//
// A slice is kS = 8 or 4 outputs of a block row, a step sixteen dwords of its weights: kQuads = 16 / kS quads of four
// columns for the kS outputs, dword output * kQuads + quad. The columns of a step lie within two neighbouring lines of
// 64 bytes of a row of x, so that one permute of bytes fetches from there what the step multiplies, each input for all
// its outputs. What is missing of the last step of such a stretch repeats a column with weights of zero.
// Layout see Arranged. Maths exact int32 sums, as dot_i8-inl.h; a slice's sum starts at -128 times that of its weights
// Limits R % 4 == 0, K <= kArrangedColumns; any C, ids, pos: looked up when arranging
// Cost   cycles of a Zen 5 per step: M = 1 .. 3: 1 + M and more, loads; M = 4 .. 8: 6 to 9, permutes; 16 rows: 11, 32
//        rows: 17 (the dot products alone take 16). Some 20 a slice besides; 3 for 16 outputs of a row of y
#pragma once

#include "core/dot_i8-inl.h"
#include "core/pack_i8-inl.h"

#if defined(SP_DOT_I8)

namespace sp {
namespace {

// sum += x * w, in place: around the intrinsic the compiler copies sums from one iteration to the next.
SP_INLINE __m512i dot(__m512i sum, __m512i x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
  return sum;
}

constexpr int64_t kArrangedColumns = 16384;  // four times a column's number fits 16 bits

// Outputs of a slice; 0: such blocks are not arranged.
SP_INLINE int64_t slice_height(const ProductArgs& args) { return args.r % 8 == 0 ? 8 : args.r % 4 == 0 ? 4 : 0; }

// Where the parts of an arranged weight lie, each on a cache line of its own.
struct Arranged {
  uint32_t* first;  // [slices + 1] number of the slice's first step
  int32_t* start;   // [slices * kS] what an output's sum starts with: -128 times the sum of its weights
  uint16_t* line;   // per step: of its inputs, the first is in or after x[64 * line]
  uint8_t* index;   // per step kQuads * 4: where in those two lines, quad by quad
  uint16_t* place;  // per step kQuads * 4: four times the number of the column
  int8_t* weights;  // per step 64
  size_t bytes;

  Arranged(const void* memory, const ProductArgs& args, int64_t steps) {
    const int64_t s = slice_height(args), slices = args.lists * args.r / s;
    bytes = 0;
    const auto take = [&](auto*& part, int64_t count) SP_ALWAYS_INLINE {
      char* at = static_cast<char*>(const_cast<void*>(memory)) + bytes;
      memcpy(&part, &at, sizeof at);
      bytes += static_cast<size_t>(whole_lines(count * static_cast<int64_t>(sizeof *part)));
    };
    take(first, slices + 1);
    if (steps < 0) steps = first[slices];  // arranged already
    take(start, slices * s);
    take(line, steps);
    take(index, steps * (64 / s));
    take(place, steps * (64 / s));
    take(weights, steps * 64);
  }
};

// The columns of slice r0 of block row b, in order: column(weights of its outputs, number).
template <typename Column>
SP_INLINE void each_column(const ProductArgs& args, int64_t b, int64_t r0, const Column& column) {
  const Lists<int8_t, true, false> lists(args);
  for (int64_t e = lists.crow[b]; e < lists.crow[b + 1]; ++e) {
    const int64_t k = lists.input(e);
    for (int64_t j = 0; j < args.c && k + j < args.in; ++j) column(lists.block(e) + r0 + j * args.r, k + j);
  }
}

// Cuts the columns of a slice into steps: calls start(line) before and column(weights, number) for the columns of each.
template <typename Start, typename Column>
SP_INLINE void each_step(const ProductArgs& args, int64_t b, int64_t r0, int64_t most, const Start& start,
                         const Column& column) {
  int64_t count = most, line = 0;
  each_column(args, b, r0, [&](const int8_t* w, int64_t k) SP_ALWAYS_INLINE {
    if (count == most || k < line * kLine || k >= (line + 2) * kLine) {
      line = k / kLine;
      count = 0;
      start(line);
    }
    column(w, k);
    ++count;
  });
}

size_t arrange_i8(const ProductArgs& args, void* to) {
  const int64_t s = slice_height(args), columns = s == 0 ? 0 : 64 / s;
  if (!args.quantise_x || s == 0 || args.in > kArrangedColumns) return 0;
  int64_t steps = 0;
  const auto each_slice = [&](const auto& body) {
    for (int64_t b = 0; b < args.lists; ++b) {
      for (int64_t r0 = 0; r0 < args.r; r0 += s) body(b, r0, (b * args.r + r0) / s);
    }
  };
  each_slice([&](int64_t b, int64_t r0, int64_t) {
    each_step(args, b, r0, columns, [&](int64_t) { ++steps; }, [](const int8_t*, int64_t) {});
  });
  if (steps > INT32_MAX) return 0;
  if (to == nullptr) return Arranged(nullptr, args, steps).bytes;
  const Arranged a(to, args, steps);
  memset(to, 0, a.bytes);
  const int64_t quads = columns / 4;
  int64_t next = 0;
  each_slice([&](int64_t b, int64_t r0, int64_t slice) {
    a.first[slice] = static_cast<uint32_t>(next);
    const int8_t* w[16];
    int64_t k[16], count = 0, line = 0;
    const auto flush = [&]() {
      if (count == 0) return;
      a.line[next] = static_cast<uint16_t>(line);
      for (int64_t j = 0; j < columns; ++j) {
        a.index[next * columns + j] = static_cast<uint8_t>(k[j < count ? j : 0] - line * kLine);
        a.place[next * columns + j] = static_cast<uint16_t>(k[j < count ? j : 0] * 4);
        for (int64_t r = 0; r < s && j < count; ++r) {
          a.weights[next * 64 + (r * quads + j / 4) * 4 + j % 4] = w[j][r];
          a.start[slice * s + r] -= 128 * w[j][r];
        }
      }
      ++next;
    };
    each_step(
        args, b, r0, columns,
        [&](int64_t first) {
          flush();
          line = first;
          count = 0;
        },
        [&](const int8_t* weights, int64_t column) {
          w[count] = weights;
          k[count++] = column;
        });
    flush();
  });
  a.first[args.lists * args.r / s] = static_cast<uint32_t>(next);
  return a.bytes;
}

// Index vector of a permute of bytes, at the start of a slice: read anew there, since the compiler would spill one that
// lives longer and read it at every use.
struct ByteIndex {
  alignas(64) uint8_t lanes[64];

  template <typename F>
  explicit ByteIndex(const F& index) {
    for (int i = 0; i < 64; ++i) lanes[i] = static_cast<uint8_t>(index(i / 4, i % 4));
  }
  SP_INLINE __m512i read() const {
    __m512i v;
    asm volatile("vmovdqa64 %1, %0" : "=v"(v) : "m"(lanes));
    return v;
  }
};

SP_INLINE __m256i joined(__m128i low, __m128i high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
SP_INLINE __m512i joined(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }

// Sums of neighbours, those of a before those of b.
SP_INLINE __m512i sum_pairs(__m512i a, __m512i b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_add_epi32(_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b));
}

SP_INLINE int32_t dword(const void* from) {
  int32_t v;
  memcpy(&v, from, 4);
  return v;
}

// Outputs that a row of y is written by: eight cache lines. Written line by line, sixteen rows one after the other,
// each line waits for its own turn in the second cache, since rows a power of two apart share a set of the first.
constexpr int64_t kRun = 128;
template <int kParts>  // dwords of a sum
constexpr int64_t kRunStride = kRun * kParts + 16;

// A product of bytes x with an arranged weight.
class ArrangedI8 {
 public:
  ArrangedI8(const ProductArgs& args, const float* factors)
      : a_(args.arranged, args, -1), args_(args), epilogue_(args), factors_(factors), cold_(args.cold) {}

  // A few rows x[i * stride]: a step's inputs fetched from where it says, row by row.
  template <int kS, int kM>
  __attribute__((noinline)) void by_lookup(const uint8_t* x, int64_t stride, int64_t row, int64_t s0,
                                           int64_t s1) const {
    constexpr int kSets = kM == 1 ? 4 : kM <= 3 ? 2 : 1, kColumns = 64 / kS;
    in_runs<kS, kM, 16 / kS>(row, kM, s0, s1, [&](int64_t s, int32_t* to) SP_ALWAYS_INLINE {
      __m512i sum[kSets][kM] = {};
      const auto add = [&](int64_t t, int q) SP_ALWAYS_INLINE {
        __m512i index;
        if constexpr (kS == 8) {
          int64_t eight;
          memcpy(&eight, a_.index + t * kColumns, 8);
          index = _mm512_set1_epi64(eight);
        } else {
          index = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a_.index + t * kColumns)));
        }
        const __m512i w = _mm512_load_si512(a_.weights + t * 64);
        fetch_ahead(cold_, a_.weights + t * 64);
        const uint8_t* from = x + a_.line[t] * kLine;
        SP_UNROLL for (int i = 0; i < kM; ++i) {
          const __m512i low = _mm512_load_si512(from + i * stride), high = _mm512_load_si512(from + i * stride + kLine);
          sum[q][i] = dot(sum[q][i], _mm512_permutex2var_epi8(low, index, high), w);
        }
      };
      int64_t t = a_.first[s];
      const int64_t end = a_.first[s + 1];
      for (; t + kSets <= end; t += kSets) {
        SP_UNROLL for (int q = 0; q < kSets; ++q) add(t + q, q);
      }
      for (; t < end; ++t) add(t, 0);
      SP_UNROLL for (int i = 0; i < kM; ++i) {
        SP_UNROLL for (int q = 1; q < kSets; ++q) sum[0][i] = _mm512_add_epi32(sum[0][i], sum[q][i]);
        _mm512_store_si512(to + i * kRunStride<16 / kS>, sum[0][i]);
      }
    });
  }

  // 4 to 8 rows of a panel [K][4 or 8], slices of eight: the inputs of a step together in one vector.
  template <int kM>
  __attribute__((noinline)) void by_columns(const uint8_t* panel, int64_t row, int64_t s0, int64_t s1) const {
    constexpr int kWidth = kM <= 4 ? 4 : 8;
    // Row 0's inputs for every output of a step; those of row i are i bytes on.
    const ByteIndex first([](int lane, int j) { return kWidth * (lane % 2 * 4 + j); });
    in_runs<8, kM, 2>(row, kM, s0, s1, [&](int64_t s, int32_t* to) SP_ALWAYS_INLINE {
      __m512i sum[kM] = {}, of_row[kM];
      of_row[0] = first.read();
      SP_UNROLL for (int i = 1; i < kM; ++i) {
        of_row[i] = _mm512_add_epi8(of_row[0], _mm512_set1_epi8(static_cast<char>(i)));
        asm volatile("" : "+v"(of_row[i]));
      }
      for (int64_t t = a_.first[s]; t < a_.first[s + 1]; ++t) {
        const auto at = [&](int j) SP_ALWAYS_INLINE { return input<8, kWidth>(panel, t, j); };
        // By inserts: to a masked broadcast the processor gives as much of its permute units.
        __m512i x;
        if constexpr (kWidth == 8) {
          const auto two = [&](int j) SP_ALWAYS_INLINE {
            const __m128 low = _mm_castsi128_ps(_mm_loadu_si64(at(j)));
            return _mm_castps_si128(_mm_loadh_pi(low, reinterpret_cast<const __m64*>(at(j + 1))));
          };
          x = joined(joined(two(0), two(2)), joined(two(4), two(6)));
        } else {
          const auto four = [&](int j) SP_ALWAYS_INLINE {
            __m128i v = _mm_loadu_si32(at(j));
            v = _mm_insert_epi32(v, dword(at(j + 1)), 1);
            v = _mm_insert_epi32(v, dword(at(j + 2)), 2);
            return _mm_insert_epi32(v, dword(at(j + 3)), 3);
          };
          x = _mm512_castsi256_si512(joined(four(0), four(4)));
        }
        const __m512i w = _mm512_load_si512(a_.weights + t * 64);
        fetch_ahead(cold_, a_.weights + t * 64);
        SP_UNROLL for (int i = 0; i < kM; ++i) sum[i] = dot(sum[i], _mm512_permutexvar_epi8(of_row[i], x), w);
      }
      SP_UNROLL for (int i = 0; i < kM; ++i) _mm512_store_si512(to + i * kRunStride<2>, sum[i]);
    });
  }

  // Rows of a panel [K][16 * kZ], at most so many.
  template <int kS, int kZ>
  __attribute__((noinline)) void by_panel(const uint8_t* panel, int64_t row, int64_t rows, int64_t s0,
                                          int64_t s1) const {
    constexpr int kWidth = 16 * kZ, kGroup = 16 / kS;
    alignas(64) int32_t tile[16 * kWidth];
    int waiting = 0;  // slices in the tile
    in_runs<kS, kWidth, 1>(row, rows, s0, s1, [&](int64_t s, int32_t* to) SP_ALWAYS_INLINE {
      if constexpr (kS == 8 && kZ == 1) {
        slice_of_pairs(panel, s, tile + waiting * kS * kWidth);
      } else {
        slice_of_quads<kS, kZ>(panel, s, tile + waiting * kS * kWidth);
      }
      if (++waiting < kGroup && s + 1 < s1)
        return;  // the last run may end within a tile: what is left of it is not read
      to -= (waiting - 1) * kS;
      waiting = 0;
      SP_UNROLL for (int z = 0; z < kZ; ++z) {
        __m512i square[16];
        SP_UNROLL for (int r = 0; r < 16; ++r) square[r] = _mm512_load_si512(tile + r * kWidth + 16 * z);
        transpose16x16(square);
        SP_UNROLL for (int i = 0; i < 16; ++i) _mm512_store_si512(to + (16 * z + i) * kRunStride<1>, square[i]);
      }
    });
  }

 private:
  // Input j of step t in a panel [K][kWidth].
  template <int kS, int kWidth>
  SP_INLINE const uint8_t* input(const uint8_t* panel, int64_t t, int j) const {
    return panel + static_cast<size_t>(a_.place[t * (64 / kS) + j]) * (kWidth / 4);
  }

  // Calls body(slice, to) for slices [s0, s1), which puts the sums of kRows rows, kParts dwords for each output, to
  // to[i * kRunStride<kParts>]; and finishes what has come together of y.
  template <int kS, int kRows, int kParts, typename Body>
  SP_INLINE void in_runs(int64_t row, int64_t rows, int64_t s0, int64_t s1, const Body& body) const {
    alignas(64) int32_t run[kRows * kRunStride<kParts>];
    for (int64_t s = s0; s < s1;) {
      const int64_t first = s, end = s1 - s < kRun / kS ? s1 : s + kRun / kS;
      for (; s < end; ++s) body(s, run + (s - first) * kS * kParts);
      finish<kParts>(run, row, rows, first * kS, (end - first) * kS);
    }
  }

  // Sums of sixteen outputs from kParts dwords for each.
  template <int kParts>
  SP_INLINE static __m512i sixteen(const int32_t* from) {
    if constexpr (kParts == 1) {
      return _mm512_load_si512(from);
    } else {
      return sum_pairs(sixteen<kParts / 2>(from), sixteen<kParts / 2>(from + 8 * kParts));
    }
  }

  // Outputs n .. n + count - 1 of y from the sums of bytes; those of one part start where they should.
  template <int kParts>
  __attribute__((noinline)) void finish(const int32_t* run, int64_t row, int64_t rows, int64_t n, int64_t count) const {
    const int64_t live = args_.out - n < count ? args_.out - n : count;
    const Epilogue<float, float> e = epilogue_;  // a copy: y might else change it, for all the compiler knows
    const float *scale = e.scale + n, *bias = e.bias == nullptr ? nullptr : e.bias + n;
    const auto scaled = [&](int64_t i, int64_t j, __mmask16 there) SP_ALWAYS_INLINE {
      __m512i sum = sixteen<kParts>(run + i * kRunStride<kParts> + j * kParts);
      if (kParts > 1) sum = _mm512_add_epi32(sum, _mm512_maskz_loadu_epi32(there, a_.start + n + j));
      return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(factors_[i]));
    };
    if (live == kRun && e.initial == nullptr && e.residual == nullptr && e.activation == Activation::kNone) {
      constexpr int kLines = kRun / 16;
      __m512 by[kLines], more[kLines];
      SP_UNROLL for (int q = 0; q < kLines; ++q) {
        by[q] = _mm512_loadu_ps(scale + 16 * q);
        more[q] = bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(bias + 16 * q);
      }
      for (int64_t i = 0; i < rows; ++i) {
        float* y = e.y + (row + i) * e.out + n;
        SP_UNROLL for (int q = 0; q < kLines; ++q) {
          _mm512_storeu_ps(y + 16 * q, _mm512_add_ps(_mm512_mul_ps(scaled(i, 16 * q, 0xffff), by[q]), more[q]));
        }
      }
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t cell = (row + i) * e.out + n;
      for (int64_t j = 0; j < live; j += 16) {
        const __mmask16 there = static_cast<__mmask16>(live - j < 16 ? (1 << (live - j)) - 1 : 0xffff);
        const auto take = [&](const float* from)
                              SP_ALWAYS_INLINE { return (Vec<float, 16>)_mm512_maskz_loadu_ps(there, from + j); };
        Vec<float, 16> v = (Vec<float, 16>)scaled(i, j, there) * take(scale);
        if (e.initial != nullptr) v += take(e.initial + cell);
        if (bias != nullptr) v += take(bias);
        if (e.activation != Activation::kNone) v = activate<float, 16>(v, e.activation);
        if (e.residual != nullptr) v += take(e.residual + cell);
        _mm512_mask_storeu_ps(e.y + cell + j, there, (__m512)v);
      }
    }
  }

  // Slice of eight, sixteen rows of a panel [K][16]: lanes are eight rows x two quads, whose weights are neighbours.
  SP_INLINE void slice_of_pairs(const uint8_t* panel, int64_t s, int32_t* tile) const {
    __m512i sum[8][2] = {};
    // Bytes of rows 8h .. of both quads, of which each operand of the permute holds one, column by column.
    const __m512i low = bytes([](int lane, int j) { return lane % 2 * 64 + j * 16 + lane / 2; });
    const __m512i high = bytes([](int lane, int j) { return lane % 2 * 64 + j * 16 + 8 + lane / 2; });
    for (int64_t t = a_.first[s]; t < a_.first[s + 1]; ++t) {
      fetch_ahead(cold_, a_.weights + t * 64);
      const auto four = [&](int j) SP_ALWAYS_INLINE {
        const auto at = [&](int i) SP_ALWAYS_INLINE {
          return _mm_loadu_si128(reinterpret_cast<const __m128i*>(input<8, 16>(panel, t, j + i)));
        };
        return joined(joined(at(0), at(1)), joined(at(2), at(3)));
      };
      const __m512i a4 = four(0), b4 = four(4);
      const __m512i x[2] = {_mm512_permutex2var_epi8(a4, low, b4), _mm512_permutex2var_epi8(a4, high, b4)};
      SP_UNROLL for (int r = 0; r < 8; ++r) {
        int64_t two;
        memcpy(&two, a_.weights + t * 64 + r * 8, 8);
        const __m512i w = _mm512_set1_epi64(two);
        SP_UNROLL for (int h = 0; h < 2; ++h) sum[r][h] = dot(sum[r][h], x[h], w);
      }
    }
    SP_UNROLL for (int r = 0; r < 8; ++r) {
      const __m512i total = sum_pairs(sum[r][0], sum[r][1]);
      _mm512_store_si512(tile + r * 16, _mm512_add_epi32(total, _mm512_set1_epi32(a_.start[s * 8 + r])));
    }
  }

  // Slice of kS, 16 * kZ rows of a panel [K][16 * kZ]: lanes are rows.
  template <int kS, int kZ>
  SP_INLINE void slice_of_quads(const uint8_t* panel, int64_t s, int32_t* tile) const {
    constexpr int kWidth = 16 * kZ, kQuads = 16 / kS;
    QuadSums<kS, kZ> sums;
    SP_UNROLL for (int r = 0; r < kS; ++r) {
      SP_UNROLL for (int z = 0; z < kZ; ++z) sums.sum[r][z] = _mm512_set1_epi32(a_.start[s * kS + r]);
    }
    for (int64_t t = a_.first[s]; t < a_.first[s + 1]; ++t) {
      fetch_ahead(cold_, a_.weights + t * 64);
      SP_UNROLL for (int q = 0; q < kQuads; ++q) {
        const auto at = [&](int j) SP_ALWAYS_INLINE { return input<kS, kWidth>(panel, t, q * 4 + j); };
        sums.template add<kQuads>(at(0), at(1), at(2), at(3), a_.weights + t * 64 + 4 * q);
      }
    }
    SP_UNROLL for (int r = 0; r < kS; ++r) {
      SP_UNROLL for (int z = 0; z < kZ; ++z) _mm512_store_si512(tile + r * kWidth + 16 * z, sums.sum[r][z]);
    }
  }

  const Arranged a_;
  const ProductArgs& args_;
  const Epilogue<float, float> epilogue_;
  const float* factors_;  // of the rows of x
  const bool cold_;
};

}  // namespace
}  // namespace sp

#endif
