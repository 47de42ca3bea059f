// int8 products by vpdpbusd: every dword lane adds four products, of four inputs with the weights of one output.
//
// A quad is four columns of one block row: consecutive blocks when C = 1, else neighbours in a block; a missing one has
// weights zero. Rows of x are quantised to -127 .. 127 and held as bytes 1 .. 255, since the instruction multiplies
// unsigned with signed; 128 times the sum of an output's weights is taken off at the end.
// Maths  exact int32 sums: 255 * 128 * kDotColumns < 2^31
// Cost   as dot_bf16-inl.h with four columns where that has two; M = 1 of 8x1: four byte loads of x per quad
#pragma once

#include "core/widen-inl.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

namespace sp {
namespace {

constexpr int64_t kDotColumns = 65536;

// Index vector of a permute of bytes: index(dword, byte of it). Opaque to the compiler, as in dot_bf16-inl.h.
template <typename F>
SP_INLINE __m512i bytes(const F& index) {
  alignas(64) uint8_t lanes[64];
  for (int i = 0; i < 64; ++i) lanes[i] = static_cast<uint8_t>(index(i / 4, i % 4));
  __m512i v = _mm512_load_si512(lanes);
  asm("" : "+v"(v));
  return v;
}

// Index vector that takes four columns of eight outputs (byte 8 * j + i) to the outputs' quads (byte 4 * i + j).
SP_INLINE __m256i quad_index() {
  return _mm512_castsi512_si256(bytes([](int lane, int j) { return 8 * j + lane % 8; }));
}

SP_INLINE __m256i load32(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// What is known of a quad when the kernel is compiled: the 32 bytes of its weights lie together (four columns of
// eight), its inputs are neighbours.
template <bool kTogether, bool kAdjacent>
struct QuadKind {
  static constexpr bool together = kTogether, adjacent = kAdjacent;
};

struct Quad {
  const int8_t* w[4];
  int64_t k[4];
};

// Calls body(quad, set, kind) for the quads of slice r0 of block row b; set varies from quad to quad in 0 .. kSets - 1.
template <int kSets, typename L, typename Body>
SP_INLINE void each_quad(const L& lists, int64_t b, int64_t r0, const Body& body) {
  static const int8_t zeros[8] = {};
  int64_t e = lists.crow[b];
  const int64_t end = lists.crow[b + 1];
  if (lists.c() == 1) {
    const auto blocks = [&](int64_t p, int64_t count, int set, auto kind) SP_ALWAYS_INLINE {
      Quad quad;
      SP_UNROLL for (int j = 0; j < 4; ++j) {
        quad.w[j] = j < count ? lists.block(p + j) + r0 : zeros;
        quad.k[j] = lists.input(j < count ? p + j : p);
      }
      body(quad, set, kind);
    };
    for (; e + 4 * kSets <= end; e += 4 * kSets) {
      SP_UNROLL for (int q = 0; q < kSets; ++q) blocks(e + 4 * q, 4, q, QuadKind<L::kContiguous, false>{});
    }
    for (; e + 4 <= end; e += 4) blocks(e, 4, 0, QuadKind<L::kContiguous, false>{});
    if (e < end) blocks(e, end - e, 0, QuadKind<false, false>{});
    return;
  }
  const int64_t r = lists.r(), c = lists.c();
  const auto columns = [&](int64_t entry, int64_t j0, int64_t count, int set, auto kind) SP_ALWAYS_INLINE {
    const int8_t* block = lists.block(entry) + r0;
    Quad quad;
    SP_UNROLL for (int j = 0; j < 4; ++j) {
      quad.w[j] = j < count ? block + (j0 + j) * r : zeros;
      quad.k[j] = lists.input(entry) + (j < count ? j0 + j : j0);
    }
    body(quad, set, kind);
  };
  if (r == 8 && c == 4) {
    for (; e + kSets <= end; e += kSets) {
      SP_UNROLL for (int q = 0; q < kSets; ++q) columns(e + q, 0, 4, q, QuadKind<true, true>{});
    }
    for (; e < end; ++e) columns(e, 0, 4, 0, QuadKind<true, true>{});
    return;
  }
  for (; e < end; ++e) {
    int64_t j = 0;
    for (; j + 4 * kSets <= c; j += 4 * kSets) {
      SP_UNROLL for (int q = 0; q < kSets; ++q) columns(e, j + 4 * q, 4, q, QuadKind<false, true>{});
    }
    for (; j + 4 <= c; j += 4) columns(e, j, 4, 0, QuadKind<false, true>{});
    if (j < c) columns(e, j, c - j, 0, QuadKind<false, false>{});
  }
}

// The weights of a quad for eight outputs, column by column.
template <typename Kind>
SP_INLINE __m256i columns_of(const Quad& quad, Kind) {
  if constexpr (Kind::together) return load32(quad.w[0]);
  const __m128i low = _mm_unpacklo_epi64(_mm_loadu_si64(quad.w[0]), _mm_loadu_si64(quad.w[1]));
  const __m128i high = _mm_unpacklo_epi64(_mm_loadu_si64(quad.w[2]), _mm_loadu_si64(quad.w[3]));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

// Four bytes of x, each from its place, in every dword.
SP_INLINE __m256i gathered(const uint8_t* x, const Quad& quad) {
  __m256i v = _mm256_set1_epi8(static_cast<char>(x[quad.k[0]]));
  asm("vpbroadcastb %1, %0%{%2%}" : "+v"(v) : "m"(x[quad.k[1]]), "Yk"(__mmask32(0x22222222)));
  asm("vpbroadcastb %1, %0%{%2%}" : "+v"(v) : "m"(x[quad.k[2]]), "Yk"(__mmask32(0x44444444)));
  asm("vpbroadcastb %1, %0%{%2%}" : "+v"(v) : "m"(x[quad.k[3]]), "Yk"(__mmask32(0x88888888)));
  return v;
}

// sum - 128 * weights, as float.
SP_INLINE __m256 without_offset(__m256i sum, __m256i weights) {
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_slli_epi32(weights, 7)));
}

// M = 1, R % 8 == 0.
template <typename L>
void dot_gemv(const L& lists, const Epilogue<float, float>& epilogue, const uint8_t* x, int64_t row, float factor,
              int64_t b0, int64_t b1) {
  constexpr int kSets = 2;
  const __m256i ones = _mm256_set1_epi8(1), index = quad_index();
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t r0 = 0; r0 < lists.r(); r0 += 8) {
      __m256i sum[kSets] = {}, weights[kSets] = {};
      each_quad<kSets>(lists, b, r0, [&](const Quad& quad, int q, auto kind) SP_ALWAYS_INLINE {
        const __m256i w = _mm256_permutexvar_epi8(index, columns_of(quad, kind));
        __m256i xs;
        if constexpr (decltype(kind)::adjacent) {
          int32_t four;
          memcpy(&four, x + quad.k[0], 4);
          xs = _mm256_set1_epi32(four);
        } else {
          xs = gathered(x, quad);
        }
        sum[q] = _mm256_dpbusd_epi32(sum[q], xs, w);
        weights[q] = _mm256_dpbusd_epi32(weights[q], ones, w);
      });
      const __m256 total = without_offset(_mm256_add_epi32(sum[0], sum[1]), _mm256_add_epi32(weights[0], weights[1]));
      put_row<8>(epilogue, row, b * lists.r() + r0, (Vec<float, 8>)total * factor, lists.live(b, r0, 8));
    }
  }
}

// The four inputs of a quad from a panel [K][kWidth], input by input: 4 * kWidth bytes.
template <int kWidth, typename Kind>
SP_INLINE __m256i inputs_of(const uint8_t* panel, const Quad& quad, Kind) {
  const uint8_t* from[4];
  SP_UNROLL for (int j = 0; j < 4; ++j) from[j] = panel + quad.k[j] * kWidth;
  if constexpr (kWidth == 8) {
    if constexpr (Kind::adjacent) return load32(from[0]);
    __m256i v = _mm256_castsi128_si256(_mm_loadu_si64(from[0]));
    v = _mm256_mask_broadcastq_epi64(v, 2, _mm_loadu_si64(from[1]));
    v = _mm256_mask_broadcastq_epi64(v, 4, _mm_loadu_si64(from[2]));
    return _mm256_mask_broadcastq_epi64(v, 8, _mm_loadu_si64(from[3]));
  } else if constexpr (kWidth == 4) {
    if constexpr (Kind::adjacent) {
      return _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from[0])));
    }
    __m128i v = _mm_loadu_si32(from[0]);
    v = _mm_mask_broadcastd_epi32(v, 2, _mm_loadu_si32(from[1]));
    v = _mm_mask_broadcastd_epi32(v, 4, _mm_loadu_si32(from[2]));
    return _mm256_castsi128_si256(_mm_mask_broadcastd_epi32(v, 8, _mm_loadu_si32(from[3])));
  } else {
    if constexpr (Kind::adjacent) return _mm256_castsi128_si256(_mm_loadu_si64(from[0]));
    uint16_t two[4];
    SP_UNROLL for (int j = 0; j < 4; ++j) memcpy(&two[j], from[j], 2);
    const uint64_t all = two[0] | uint64_t(two[1]) << 16 | uint64_t(two[2]) << 32 | uint64_t(two[3]) << 48;
    return _mm256_castsi128_si256(_mm_cvtsi64_si128(static_cast<int64_t>(all)));
  }
}

// 2 <= M <= 8, R % 8 == 0; vectors of sums as in dot_bf16-inl.h: four rows of four outputs, or two rows of eight.
template <int kWidth, typename L>
void dot_few_rows(const L& lists, const Epilogue<float, float>& epilogue, const uint8_t* panel, int64_t row,
                  int64_t rows, const float* factors, int64_t b0, int64_t b1) {
  constexpr int kRowParts = kWidth == 8 ? 2 : 1, kOutParts = kWidth == 2 ? 1 : 2, kSets = 2;
  __m512i expand_w[kOutParts], expand_x[kRowParts];
  for (int p = 0; p < kOutParts; ++p) {
    expand_w[p] = bytes([&](int lane, int j) { return 8 * j + (kWidth == 2 ? lane % 8 : 4 * p + lane % 4); });
  }
  for (int p = 0; p < kRowParts; ++p) {
    expand_x[p] = bytes([&](int lane, int j) { return kWidth * j + (kWidth == 2 ? lane / 8 : 4 * p + lane / 4); });
  }
  const __m256i ones = _mm256_set1_epi8(1);
  alignas(64) int32_t tile[kRowParts * 4][8];
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t r0 = 0; r0 < lists.r(); r0 += 8) {
      __m512i sum[kSets][kRowParts][kOutParts] = {};
      __m256i weights[kOutParts] = {};  // sums of the first lanes' weights: 8 outputs, or 4 and 4
      each_quad<kSets>(lists, b, r0, [&](const Quad& quad, int q, auto kind) SP_ALWAYS_INLINE {
        const __m512i columns = _mm512_castsi256_si512(columns_of(quad, kind));
        const __m512i inputs = _mm512_castsi256_si512(inputs_of<kWidth>(panel, quad, kind));
        __m512i w[kOutParts];
        SP_UNROLL for (int p = 0; p < kOutParts; ++p) {
          w[p] = _mm512_permutexvar_epi8(expand_w[p], columns);
          weights[p] = _mm256_dpbusd_epi32(weights[p], ones, _mm512_castsi512_si256(w[p]));
        }
        SP_UNROLL for (int p = 0; p < kRowParts; ++p) {
          const __m512i x = _mm512_permutexvar_epi8(expand_x[p], inputs);
          SP_UNROLL for (int o = 0; o < kOutParts; ++o) sum[q][p][o] = _mm512_dpbusd_epi32(sum[q][p][o], x, w[o]);
        }
      });
      SP_UNROLL for (int p = 0; p < kRowParts; ++p) {
        SP_UNROLL for (int o = 0; o < kOutParts; ++o) {
          const __m512i total = _mm512_add_epi32(sum[0][p][o], sum[1][p][o]);
          if (kWidth == 2) {
            _mm512_store_si512(tile[0], total);
          } else {
            const auto to = [&](int i) { return reinterpret_cast<__m128i*>(tile[4 * p + i] + 4 * o); };
            _mm_store_si128(to(0), _mm512_castsi512_si128(total));
            _mm_store_si128(to(1), _mm512_extracti32x4_epi32(total, 1));
            _mm_store_si128(to(2), _mm512_extracti32x4_epi32(total, 2));
            _mm_store_si128(to(3), _mm512_extracti32x4_epi32(total, 3));
          }
        }
      }
      const __m256i offset =
          kOutParts == 1 ? weights[0] : _mm256_permute2x128_si256(weights[0], weights[kOutParts - 1], 0x20);
      const int64_t n = b * lists.r() + r0, live = lists.live(b, r0, 8);
      for (int64_t i = 0; i < rows; ++i) {
        const __m256 total = without_offset(load32(tile[i]), offset);
        put_row<8>(epilogue, row + i, n, (Vec<float, 8>)total * factors[i], live);
      }
    }
  }
}

// The quads of one block row as the panel kernel reads them: weights[t][8] dwords, one per output, and where the four
// columns of x start in the panel.
struct QuadBuffer {
  uint32_t* weights;
  int32_t* starts;  // four per quad

  QuadBuffer(float* buffer, int64_t padded)
      : weights(reinterpret_cast<uint32_t*>(buffer)),
        starts(reinterpret_cast<int32_t*>(weights + (padded / 2 + 1) * 8)) {
  }  // a quad has two columns or more, or is alone
};

// Sums of kS outputs and 16 * kZ rows of a K-major panel.
template <int kS, int kZ>
struct QuadSums {
  static constexpr int kWidth = 16 * kZ;
  __m512i sum[kS][kZ] = {};
  // Bytes 16 * kZ * j + lane of the four columns, of which each operand of the permute holds two, in 32 or 64 bytes.
  const __m512i low = bytes([](int lane, int j) { return j / 2 * 64 + j % 2 * kWidth + lane; });
  const __m512i high = bytes([](int lane, int j) { return j / 2 * 64 + j % 2 * kWidth + 16 + lane; });

  // weights[r * kStep]: the quad of output r.
  template <int kStep = 1>
  SP_INLINE void add(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, const void* weights) {
    __m512i x[kZ];
    if constexpr (kZ == 2) {
      const __m512i ab = _mm512_inserti64x4(_mm512_castsi256_si512(load32(a)), load32(b), 1);
      const __m512i cd = _mm512_inserti64x4(_mm512_castsi256_si512(load32(c)), load32(d), 1);
      x[0] = _mm512_permutex2var_epi8(ab, low, cd);
      x[1] = _mm512_permutex2var_epi8(ab, high, cd);
    } else {
      const auto two = [](const uint8_t* low, const uint8_t* high) SP_ALWAYS_INLINE {
        const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
        return _mm512_castsi256_si512(
            _mm256_inserti128_si256(first, _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1));
      };
      x[0] = _mm512_permutex2var_epi8(two(a, b), low, two(c, d));
    }
    SP_UNROLL for (int r = 0; r < kS; ++r) {
      int32_t four;
      memcpy(&four, static_cast<const char*>(weights) + 4 * kStep * r, 4);
      const __m512i w = _mm512_set1_epi32(four);
      SP_UNROLL for (int z = 0; z < kZ; ++z) sum[r][z] = _mm512_dpbusd_epi32(sum[r][z], x[z], w);
    }
  }

  // tile[r][i] = (sum - 128 * offset[r]) * factors[i]
  SP_INLINE void put(float* tile, const int32_t* offset, const float* factors) const {
    SP_UNROLL for (int r = 0; r < kS; ++r) {
      const __m512i off = _mm512_set1_epi32(128 * offset[r]);
      SP_UNROLL for (int z = 0; z < kZ; ++z) {
        const __m512 total = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[r][z], off));
        _mm512_store_ps(tile + r * kWidth + z * 16, _mm512_mul_ps(total, _mm512_loadu_ps(factors + z * 16)));
      }
    }
  }
};

// kS outputs r0 .. of block row b (weights of outputs from `height` on: zero).
template <int kS, int kZ, typename L>
SP_INLINE void dot_slice(const L& lists, const uint8_t* panel, int64_t b, int64_t r0, int64_t height,
                         const float* factors, const QuadBuffer& buffer, float* tile) {
  int64_t count = 0;
  __m256i offset = _mm256_setzero_si256();
  const __m256i index = quad_index();
  each_quad<1>(lists, b, r0, [&](const Quad& quad, int, auto kind) SP_ALWAYS_INLINE {
    __m256i w;
    if (height == 8) {
      w = _mm256_permutexvar_epi8(index, columns_of(quad, kind));
    } else {
      int8_t lanes[32] = {};
      for (int64_t i = 0; i < height; ++i) {
        for (int j = 0; j < 4; ++j) lanes[4 * i + j] = quad.w[j][i];
      }
      w = load32(lanes);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer.weights + count * 8), w);
    offset = _mm256_dpbusd_epi32(offset, _mm256_set1_epi8(1), w);
    for (int j = 0; j < 4; ++j) buffer.starts[4 * count + j] = static_cast<int32_t>(quad.k[j] * (16 * kZ));
    ++count;
  });
  QuadSums<kS, kZ> sums;
  for (int64_t t = 0; t < count; ++t) {
    const int32_t* start = buffer.starts + 4 * t;
    sums.add(panel + start[0], panel + start[1], panel + start[2], panel + start[3], buffer.weights + 8 * t);
  }
  alignas(32) int32_t offsets[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(offsets), offset);
  sums.put(tile, offsets, factors);
}

// The same for 8x1 blocks, whose quads are made kAhead quads before their use, in the shadow of the dot products.
template <int kZ, typename L>
SP_INLINE void dot_slice_8x1(const L& lists, const uint8_t* panel, int64_t b, const float* factors,
                             const QuadBuffer& buffer, float* tile) {
  constexpr int64_t kAhead = 8, kWidth = 16 * kZ;
  static const int8_t zeros[8] = {};
  const int64_t begin = lists.crow[b], length = lists.crow[b + 1] - begin, count = length / 4;
  __m256i offset = _mm256_setzero_si256();
  const __m256i index = quad_index();
  const auto make = [&](int64_t t, int64_t live, auto kind) SP_ALWAYS_INLINE {
    Quad quad;
    SP_UNROLL for (int j = 0; j < 4; ++j) quad.w[j] = j < live ? lists.block(begin + 4 * t + j) : zeros;
    const __m256i w = _mm256_permutexvar_epi8(index, columns_of(quad, kind));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer.weights + t * 8), w);
    offset = _mm256_dpbusd_epi32(offset, _mm256_set1_epi8(1), w);
  };
  const auto* col = lists.col + begin;
  QuadSums<8, kZ> sums;
  const auto add = [&](int64_t t) SP_ALWAYS_INLINE {
    const auto* four = col + 4 * t;
    sums.add(panel + int64_t(four[0]) * kWidth, panel + int64_t(four[1]) * kWidth, panel + int64_t(four[2]) * kWidth,
             panel + int64_t(four[3]) * kWidth, buffer.weights + 8 * t);
  };
  using Whole = QuadKind<L::kContiguous, false>;
  for (int64_t t = 0; t < kAhead && t < count; ++t) make(t, 4, Whole{});
  int64_t t = 0;
  for (; t + kAhead < count; ++t) {
    make(t + kAhead, 4, Whole{});
    add(t);
  }
  for (; t < count; ++t) add(t);
  if (const int64_t left = length - 4 * count; left != 0) {
    make(count, left, QuadKind<false, false>{});
    const auto at = [&](int64_t j) { return panel + int64_t(col[4 * count + (j < left ? j : 0)]) * kWidth; };
    sums.add(at(0), at(1), at(2), at(3), buffer.weights + 8 * count);
  }
  alignas(32) int32_t offsets[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(offsets), offset);
  sums.put(tile, offsets, factors);
}

// `buffer` has room for the quads of one block row.
template <int kZ, typename L>
void dot_panel(const L& lists, const Epilogue<float, float>& epilogue, const uint8_t* panel, float* buffer,
               int64_t padded, int64_t row, int64_t rows, const float* factors, int64_t b0, int64_t b1) {
  constexpr int kWidth = 16 * kZ;
  alignas(64) float tile[8 * kWidth];
  const QuadBuffer quads(buffer, padded);
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t r0 = 0; r0 < lists.r(); r0 += 8) {
      const int64_t height = lists.r() - r0 < 8 ? lists.r() - r0 : 8;
      if constexpr (L::kEightByOne) {
        dot_slice_8x1<kZ>(lists, panel, b, factors, quads, tile);
      } else if (height > 4) {
        dot_slice<8, kZ>(lists, panel, b, r0, height, factors, quads, tile);
      } else {
        dot_slice<4, kZ>(lists, panel, b, r0, height, factors, quads, tile);
      }
      put_panel<kWidth>(epilogue, tile, row, rows, b * lists.r() + r0, lists.live(b, r0, height));
    }
  }
}

}  // namespace
}  // namespace sp

#define SP_DOT_I8 1
#endif
