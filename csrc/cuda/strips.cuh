// What the kernels over strips share: the K-major tile of activations in shared memory, and the product with one list.
//
// Roles are swapped: y[16 rows x 8 outputs] += x[16 x 16 gathered inputs] w[16 x 8], so operand A comes from the
// activations. The tile holds row k = the BM activations of input k; `ldmatrix.trans` with the addresses of 16 rows of
// any k gives the fragment of operand A: gathering costs the same as reading. The 16-byte pieces of a row are swizzled
// by bank_of(k), which makes both the transposing stores and the gathering reads (in the order of kernels.h) free of
// bank conflicts.
//
// 16-bit types multiply on the tensor cores as they are (m16n8k16, and m16n8k8 for the odd last octet). Floats are
// split into two tf32 halves and multiplied three times (high high + high low + low high), which keeps 22 bits of each
// operand; an infinity may become NaN on the way.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace sp::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
constexpr int kBytes = sizeof(typename T::Bits);

// --- the tile -------------------------------------------------------------------------------------------------------
template <typename T, int kBM>
struct Tile {
  static constexpr int kRow = kBM * kBytes<T>;  // bytes of the row of one input
  static constexpr int kPieces = kRow / 16;
  static constexpr int kShift = kPieces >= 8 ? 0 : kPieces == 4 ? 1 : 2;  // rows shorter than 128 bytes share banks

  static __device__ __forceinline__ uint32_t swizzle(int k) { return static_cast<uint32_t>(bank_of(k) >> kShift); }
  // Byte offset of piece `piece` of input k.
  static __device__ __forceinline__ uint32_t offset(int k, uint32_t piece) {
    return static_cast<uint32_t>(k) * kRow + ((piece ^ swizzle(k)) << 4);
  }
};

// Elements k .. k + 15 / size of row m of x; zero where there is none. kVectors: 16-byte loads are aligned.
template <typename T>
__device__ __forceinline__ uint4 load_piece(const void* x, int64_t stride, int64_t m, int64_t rows, int k, int columns,
                                            bool vectors) {
  using Bits = typename T::Bits;
  constexpr int kCount = 16 / kBytes<T>;
  if (m >= rows || k >= columns) return {0, 0, 0, 0};
  const Bits* from = static_cast<const Bits*>(x) + m * stride + k;
  if (vectors && k + kCount <= columns) return load<uint4>(from);
  uint64_t low = 0, high = 0;
  SP_ROLL  // rare: few registers rather than loads in flight
      for (int i = 0; i < kCount && k + i < columns; ++i) {
    const uint64_t shifted = static_cast<uint64_t>(from[i]) << (i * kBytes<T> % 8 * 8);
    low |= i < kCount / 2 ? shifted : 0;
    high |= i < kCount / 2 ? 0 : shifted;
  }
  return {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
          static_cast<uint32_t>(high >> 32)};
}

// Inputs [k0, k0 + count) of rows [m0, m0 + kBM) of x into the tile, all threads of the block. One thread transposes 8
// inputs of two rows (16 bits) or 4 of one row (floats) at a time; two neighbours in k read one sector of 32 bytes.
template <typename T, int kBM>
__device__ __forceinline__ void fill_tile(unsigned char* tile, const void* x, int64_t stride, int64_t m0, int64_t rows,
                                          int k0, int count, int columns, bool vectors) {
  constexpr int kPair = 4 / kBytes<T>;                // rows of x in one word
  constexpr int kDepth = 16 / kBytes<T>;              // inputs per load
  constexpr int kWords = kBM / kPair;                 // words of a tile row
  constexpr int kAcross = kWords < 16 ? kWords : 16;  // lanes along the rows of x
  constexpr int kAlong = 32 / kAcross;                // lanes along k
  constexpr int kUnits = 2;                           // loads in flight per thread and row
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int depths = (count + kDepth - 1) / kDepth;
  const int steps = (depths + kAlong - 1) / kAlong * (kWords / kAcross);
  for (int first = warp; first < steps; first += warps * kUnits) {
    uint4 loaded[kUnits][kPair];
    SP_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      const int step = first + u * warps;
      const int word = step % (kWords / kAcross) * kAcross + lane % kAcross;
      const int depth = step / (kWords / kAcross) * kAlong + lane / kAcross;
      SP_UNROLL
      for (int i = 0; i < kPair; ++i) {
        loaded[u][i] = load_piece<T>(x, stride, m0 + word * kPair + i, depth < depths && step < steps ? rows : 0,
                                     k0 + depth * kDepth, columns, vectors);
      }
    }
    SP_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      const int step = first + u * warps;
      const int word = step % (kWords / kAcross) * kAcross + lane % kAcross;
      const int depth = step / (kWords / kAcross) * kAlong + lane / kAcross;
      if (step >= steps || depth >= depths) continue;
      SP_UNROLL
      for (int j = 0; j < kDepth; ++j) {
        uint32_t bits;
        if constexpr (kPair == 2) {
          const uint32_t low = (&loaded[u][0].x)[j / 2], high = (&loaded[u][1].x)[j / 2];
          bits = j % 2 == 0 ? (low & 0xffffu) | high << 16 : low >> 16 | (high & 0xffff0000u);
        } else {
          bits = (&loaded[u][0].x)[j];
        }
        const int k = depth * kDepth + j;
        *reinterpret_cast<uint32_t*>(tile + Tile<T, kBM>::offset(k, static_cast<uint32_t>(word) / 4) + word % 4 * 4) =
            bits;
      }
    }
  }
}

// Inputs that a tile of `count` has rows for: whole loads.
constexpr int tile_rows(int count) { return (count + 7) / 8 * 8; }

// --- operand B: values of an octet, as the lanes hold them ----------------------------------------------------------
template <typename T, int kP>
struct Octet {
  static constexpr int kWords = kP / 8 * kBytes<T> / 2;  // per lane
  uint32_t words[kWords];

  __device__ __forceinline__ void load_from(const void* values, int octet, int lane) {
    const char* from = static_cast<const char*>(values) + (static_cast<int64_t>(octet) * 32 + lane) * (4 * kWords);
    if constexpr (kWords == 1) {
      words[0] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (kWords == 2) {
      const uint2 two = load<uint2>(from);
      words[0] = two.x, words[1] = two.y;
    } else {
      SP_UNROLL
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 four = load<uint4>(from + 16 * i);
        words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
      }
    }
  }
};

// A float as a sum of two tf32: the upper half exactly, of the rest what the tensor core reads.
__device__ __forceinline__ uint32_t tf32_high(uint32_t bits) { return bits & 0xffffe000u; }
__device__ __forceinline__ uint32_t tf32_low(uint32_t bits) {
  return float_to_bits(bits_to_float(bits) - bits_to_float(tf32_high(bits)));
}

// --- the product with one list --------------------------------------------------------------------------------------
// acc[i][j] += rows 16
// (mt0 + i) .. of the tile, times outputs 8 j .. of the strip, over octets begin + 2 part, + 1, then 2 parts further.
// `ids` count from the first input of the tile.
template <typename T, int kP, int kBM, int kMT>
__device__ __forceinline__ void accumulate(float (&acc)[kMT][kP / 8][4], const Strips& w, int list,
                                           const unsigned char* tile, int mt0, int part, int parts) {
  using Layout = Tile<T, kBM>;
  constexpr int kNT = kP / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int begin = w.begin[list], end = w.begin[list + 1];

  if constexpr (kBytes<T> == 2) {
    const int slot = (lane & 7) + (lane >> 4 << 3);              // matrices 0, 1: octet 0; 2, 3: octet 1
    const uint32_t half = static_cast<uint32_t>(lane) >> 3 & 1;  // matrices 0, 2: rows 0-7; 1, 3: rows 8-15
    const uint32_t base = shared_address(tile);
    const auto address = [&](int k) {
      return (base + Layout::offset(k, half)) ^ static_cast<uint32_t>(mt0) * 32;  // 32 bytes: 16 rows
    };
    Octet<T, kP> low, high;
    int k = 0, o = begin + 2 * part;
    if (o + 1 < end) {
      k = w.ids[int64_t{o} * 8 + slot];
      low.load_from(w.values, o, lane);
      high.load_from(w.values, o + 1, lane);
    }
    while (o + 1 < end) {
      const Octet<T, kP> b0 = low, b1 = high;
      const uint32_t at = address(k);
      o += 2 * parts;
      if (o + 1 < end) {  // the next pair is under way while this one is multiplied
        k = w.ids[int64_t{o} * 8 + slot];
        low.load_from(w.values, o, lane);
        high.load_from(w.values, o + 1, lane);
      }
      SP_UNROLL
      for (int i = 0; i < kMT; ++i) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, at ^ static_cast<uint32_t>(i) * 32);
        SP_UNROLL
        for (int j = 0; j < kNT; ++j) mma_16816<T>(acc[i][j], a, {b0.words[j], b1.words[j]});
      }
    }
    if (o < end) {  // the odd last octet
      low.load_from(w.values, o, lane);
      const uint32_t at = address(w.ids[int64_t{o} * 8 + (lane & 7)]);
      SP_UNROLL
      for (int i = 0; i < kMT; ++i) {
        uint32_t a[2];
        ldmatrix_x2_trans(a, at ^ static_cast<uint32_t>(i) * 32);
        SP_UNROLL
        for (int j = 0; j < kNT; ++j) mma_1688<T>(acc[i][j], a, low.words[j]);
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
    for (int o = begin + part; o < end; o += parts) {
      Octet<T, kP> b;
      b.load_from(w.values, o, lane);
      uint32_t at[2];
      SP_UNROLL
      for (int h = 0; h < 2; ++h) {
        at[h] = Layout::offset(w.ids[int64_t{o} * 8 + t + 4 * h], static_cast<uint32_t>(g) / 4) ^
                static_cast<uint32_t>(mt0) * 64;
      }
      SP_UNROLL
      for (int i = 0; i < kMT; ++i) {
        uint32_t a[4], high[4], low[4];
        SP_UNROLL
        for (int q = 0; q < 4; ++q) {  // rows g and g + 8 of the first input, then of the second
          const uint32_t from = at[q / 2] ^ static_cast<uint32_t>(i) * 64 ^ static_cast<uint32_t>(q % 2) * 32;
          a[q] = *reinterpret_cast<const uint32_t*>(tile + from + g % 4 * 4);
          high[q] = tf32_high(a[q]);
          low[q] = tf32_low(a[q]);
        }
        SP_UNROLL
        for (int j = 0; j < kNT; ++j) {
          const uint32_t b0 = b.words[2 * j], b1 = b.words[2 * j + 1];
          mma_1688_tf32(acc[i][j], low, {tf32_high(b0), tf32_high(b1)});
          mma_1688_tf32(acc[i][j], high, {tf32_low(b0), tf32_low(b1)});
          mma_1688_tf32(acc[i][j], high, {tf32_high(b0), tf32_high(b1)});
        }
      }
    }
  }
}

// --- activations ----------------------------------------------------------------------------------------------------
// Few
// instructions each, since they are unrolled over all sums of a thread; within 3e-7 of the functions they stand for, as
// a share of 1 or of the result. NaN stays NaN.
__device__ __forceinline__ float sigmoid(float v) { return __fdividef(1.0f, 1.0f + expf(-v)); }

__device__ __forceinline__ float hyperbolic_tangent(float v) {
  const float square = v * v;  // near 0 the difference below would cancel
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float far = 1.0f - 2.0f * sigmoid(-2.0f * v);
  return square < 0.390625f ? p * square * v + v : far;
}

// v * Phi(v); erf by Abramowitz and Stegun, 7.1.26.
__device__ __forceinline__ float gelu(float v) {
  const float size = fabsf(v) * 0.70710678f;
  const float t = __fdividef(1.0f, 1.0f + 0.3275911f * size);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = 0.5f * p * t * expf(-size * size);  // of the normal distribution, beyond |v|
  return v * (v < 0.0f ? tail : 1.0f - tail);
}

template <int kCount>
__device__ __forceinline__ void activate(Activation activation, float (&v)[kCount]) {
  if (activation == Activation::kNone) return;
  SP_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (activation == Activation::kRelu) v[i] = v[i] < 0.0f ? 0.0f : v[i];  // NaN stays
    if (activation == Activation::kGelu) v[i] = gelu(v[i]);
    if (activation == Activation::kSilu) v[i] = v[i] * sigmoid(v[i]);
    if (activation == Activation::kTanh) v[i] = hyperbolic_tangent(v[i]);
  }
}

}  // namespace sp::cuda
