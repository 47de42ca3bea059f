// strips_linear: y[M, N] = activation(x[M, K] W[N, K]^T + bias) + residual, W in strips (kernels.h has the layout).
//
// x, y    row-major; x with any row stride (16-byte loads where it and the base allow), y and residual contiguous
// Maths   operands as they are, sums in float; bias, activation and residual in float; rounded once at the store
// Limits  P = 8, 16, 32; float16, bfloat16, float32; M, N, K free; 2^31 octets; an empty list yields its bias
// Cost    a block of 64 or 128 rows stages its x once (K <= 512) and walks over the strips: per 16 rows and 16 gathered
//         inputs one ldmatrix of 4 shared-memory clocks and P / 8 mma.sync. P = 8 is bound by shared memory, from
//         P = 32 on by the tensor cores; weights are read once per row tile, from L2. 16 rows (few rows): each list is
//         split over the warps of a block, bound by latency and by the bytes of the weight.
#pragma once

#include "cuda/strips.cuh"

namespace sp::cuda {
namespace {

// How one block covers kBM rows: `kRowWarps` warps share a strip, each kMT tiles of 16 rows of it; a warp owns kSW
// neighbouring strips; with kSplit > 1 that many warps share a list and add their sums up. 64 sums per thread
// (kMT * kSW * kP / 2), which leaves two blocks of 64 rows, or one of 128, per multiprocessor.
template <typename T, int kP, int kBM>
struct Plan {
  static constexpr bool kFew = kBM == 16;
  static constexpr int kWarps = kFew ? 8 : kBM / 8;
  static constexpr int kTiles = kBM / 16;
  static constexpr int kSums = kBytes<T> == 2 ? 16 : 8;  // in units of 4; floats need registers for both halves
  static constexpr int kFit = kSums / (kP / 8);
  static constexpr int kMT = kFew ? 1 : kFit < kTiles ? kFit : kTiles;
  static constexpr int kSW = kFew ? 1 : kFit / kMT > 1 ? kFit / kMT : 1;
  static constexpr int kSplit = kFew ? (kP >= 32 ? 8 : 4) : 1;
  static constexpr int kRowWarps = kTiles / kMT;
  static constexpr int kStripWarps = kWarps / kRowWarps / kSplit;
  static constexpr int kStrips = kStripWarps * kSW;  // of one pass of the block
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStage = kFew ? 16 / kBytes<T> : 1;  // chunks in shared memory at most: 128 KB for few rows
  static constexpr int kPartialBytes = kSplit > 1 ? kWarps * kP / 8 * 4 * 32 * 4 : 0;
  static_assert(kRowWarps * kMT == kTiles && kStripWarps > 0 && kStripWarps * kRowWarps * kSplit == kWarps);
};

template <typename T>
__device__ __forceinline__ float read(const void* from, int64_t i) {
  return T::widen(static_cast<const typename T::Bits*>(from)[i]);
}

// Elements as one access of 4, 8 or 16 bytes.
template <int kTotal>
struct Vector {
  template <typename Bits>
  static __device__ __forceinline__ void take(Bits* bits, const Bits* from) {
    constexpr int kPerWord = 4 / sizeof(Bits);
    uint32_t words[kTotal / 4];
    if constexpr (kTotal == 16) {
      const uint4 v = load<uint4>(from);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else if constexpr (kTotal == 8) {
      const uint2 v = load<uint2>(from);
      words[0] = v.x, words[1] = v.y;
    } else {
      words[0] = load<uint32_t>(from);
    }
    SP_UNROLL
    for (int i = 0; i < kTotal / static_cast<int>(sizeof(Bits)); ++i) {
      bits[i] = static_cast<Bits>(words[i / kPerWord] >> i % kPerWord * 16);
    }
  }

  template <typename Bits>
  static __device__ __forceinline__ void put(Bits* to, const Bits* bits) {
    uint32_t words[kTotal / 4];
    SP_UNROLL
    for (int i = 0; i < kTotal / 4; ++i) {
      words[i] = bits[i * 4 / sizeof(Bits)];
      if constexpr (sizeof(Bits) == 2) words[i] |= static_cast<uint32_t>(bits[2 * i + 1]) << 16;
    }
    if constexpr (kTotal == 16) {
      store<uint4>(to, {words[0], words[1], words[2], words[3]});
    } else if constexpr (kTotal == 8) {
      store<uint2>(to, {words[0], words[1]});
    } else {
      store<uint32_t>(to, words[0]);
    }
  }
};

// kCount neighbouring outputs of one row: bias, activation, residual, store. `vectors`: groups of kCount are aligned.
template <typename T, int kCount>
__device__ __forceinline__ void finish(const LinearArgs& args, float (&v)[kCount], int64_t m, int n, bool vectors) {
  using Bits = typename T::Bits;
  using Group = Vector<kCount * sizeof(Bits)>;
  if (m >= args.m || n >= args.weight.n) return;
  const int64_t at = m * args.weight.n + n;
  const bool whole = vectors && n + kCount <= args.weight.n;
  if (args.bias != nullptr) {
    SP_UNROLL
    for (int i = 0; i < kCount; ++i) v[i] += n + i < args.weight.n ? read<T>(args.bias, n + i) : 0.0f;
  }
  activate(args.activation, v);
  Bits bits[kCount];
  if (args.residual != nullptr) {
    const Bits* residual = static_cast<const Bits*>(args.residual) + at;
    if (whole) {
      Group::take(bits, residual);
    } else {
      SP_UNROLL
      for (int i = 0; i < kCount; ++i) bits[i] = n + i < args.weight.n ? residual[i] : 0;
    }
    SP_UNROLL
    for (int i = 0; i < kCount; ++i) v[i] += T::widen(bits[i]);
  }
  SP_UNROLL
  for (int i = 0; i < kCount; ++i) bits[i] = T::narrow(v[i]);
  Bits* y = static_cast<Bits*>(args.y) + at;
  if (whole) {
    Group::put(y, bits);
  } else {
    SP_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (n + i < args.weight.n) y[i] = bits[i];
    }
  }
}

template <typename T, int kP, int kBM>
__global__ void __launch_bounds__((Plan<T, kP, kBM>::kThreads), (kBM == 64 ? 2 : 1))
    strips_linear(const __grid_constant__ LinearArgs args) {
  using P = Plan<T, kP, kBM>;
  constexpr int kNT = kP / 8;
  const Strips& w = args.weight;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int part = warp % P::kSplit, strip_warp = warp / P::kSplit % P::kStripWarps;
  const int mt0 = warp / (P::kSplit * P::kStripWarps) * P::kMT;
  const int64_t m0 = static_cast<int64_t>(blockIdx.x) * kBM;
  const int passes = (w.strips + P::kStrips - 1) / P::kStrips;
  const bool vectors_in = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.x_stride * kBytes<T> % 16 == 0;
  unsigned char* tile = shared_memory();
  const int stage = P::kStage < w.chunks ? P::kStage : w.chunks;  // chunks per filling of the tile

  for (int pass = static_cast<int>(blockIdx.y); pass < passes; pass += static_cast<int>(gridDim.y)) {
    const int strip0 = pass * P::kStrips + strip_warp * P::kSW;
    float acc[P::kSW][P::kMT][kNT][4] = {};
    for (int chunk0 = 0; chunk0 < w.chunks; chunk0 += stage) {
      if (stage < w.chunks || pass == static_cast<int>(blockIdx.y)) {
        const int k0 = chunk0 * kChunk, k1 = (chunk0 + stage) * kChunk < w.k ? (chunk0 + stage) * kChunk : w.k;
        __syncthreads();  // everybody is done with what the tile held
        fill_tile<T, kBM>(tile, args.x, args.x_stride, m0, args.m, k0, k1 - k0, w.k, vectors_in);
        __syncthreads();
      }
      SP_UNROLL
      for (int s = 0; s < P::kSW; ++s) {
        if (strip0 + s >= w.strips) continue;
        for (int chunk = chunk0; chunk < chunk0 + stage && chunk < w.chunks; ++chunk) {
          accumulate<T, kP, kBM, P::kMT>(acc[s], w, (strip0 + s) * w.chunks + chunk,
                                         tile + (chunk - chunk0) * kChunk * Tile<T, kBM>::kRow, mt0, part, P::kSplit);
        }
      }
    }

    if constexpr (P::kSplit > 1) {  // the first warp of a list adds up what the others found
      float* partial =
          reinterpret_cast<float*>(tile + tile_rows(w.k < stage * kChunk ? w.k : stage * kChunk) * Tile<T, kBM>::kRow);
      SP_UNROLL
      for (int j = 0; j < kNT; ++j) {
        SP_UNROLL
        for (int i = 0; i < 4; ++i) partial[((warp * kNT + j) * 4 + i) * 32 + lane] = acc[0][0][j][i];
      }
      __syncthreads();
      if (part == 0) {
        SP_UNROLL
        for (int j = 0; j < kNT; ++j) {
          SP_UNROLL
          for (int i = 0; i < 4; ++i) {
            for (int other = 1; other < P::kSplit; ++other) {
              acc[0][0][j][i] += partial[(((warp + other) * kNT + j) * 4 + i) * 32 + lane];
            }
          }
        }
      }
      __syncthreads();  // before the next pass writes there
      if (part != 0) continue;
    }

    // A lane holds 2 neighbouring outputs of rows g and g + 8. Two lanes exchange halves of two neighbouring tiles, so
    // that each stores 4 outputs and 4 lanes a whole sector.
    const int here = unknown(lane);  // or the compiler computes all addresses before the loop, and keeps them in memory
    const int g = here / 4, t = here % 4, odd = t % 2;
    const bool vectors = w.n % 4 == 0 && reinterpret_cast<uintptr_t>(args.residual) % 16 == 0;
    constexpr int kTilesN = P::kSW * kNT;
    SP_UNROLL
    for (int i = 0; i < P::kMT; ++i) {
      SP_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int64_t m = m0 + (mt0 + i) * 16 + h * 8 + g;
        if constexpr (kTilesN == 1) {
          float v[2] = {acc[0][i][0][2 * h], acc[0][i][0][2 * h + 1]};
          finish<T, 2>(args, v, m, strip0 * kP + 2 * t, vectors);
        } else {
          SP_UNROLL
          for (int j = 0; j < kTilesN; j += 2) {
            const float (&left)[4] = acc[j / kNT][i][j % kNT];
            const float (&right)[4] = acc[(j + 1) / kNT][i][(j + 1) % kNT];
            float got[2];
            SP_UNROLL
            for (int e = 0; e < 2; ++e) {
              got[e] = __shfl_xor_sync(kAllLanes, odd != 0 ? left[2 * h + e] : right[2 * h + e], 1);
            }
            float v[4];
            SP_UNROLL
            for (int e = 0; e < 2; ++e) {
              v[e] = odd != 0 ? got[e] : left[2 * h + e];
              v[2 + e] = odd != 0 ? right[2 * h + e] : got[e];
            }
            finish<T, 4>(args, v, m, strip0 * kP + (j + odd) * 8 + t / 2 * 4, vectors);
          }
        }
      }
    }
  }
}

template <typename T, int kP, int kBM>
Geometry geometry(const LinearArgs& args, int multiprocessors) {
  using P = Plan<T, kP, kBM>;
  const Strips& w = args.weight;
  const int64_t tiles = (args.m + kBM - 1) / kBM;
  const int passes = (w.strips + P::kStrips - 1) / P::kStrips;
  // A block per row tile and pass would stage x anew for each pass: only as many as it takes to fill the device twice.
  const int64_t wanted = (2 * static_cast<int64_t>(multiprocessors) + tiles - 1) / tiles;
  const int64_t columns = P::kFew || wanted > passes ? passes : wanted;
  const int held = w.k < P::kStage * kChunk ? w.k : P::kStage * kChunk;
  return {static_cast<unsigned>(tiles),
          static_cast<unsigned>(columns < 1           ? 1
                                : columns > kMaxGridY ? kMaxGridY
                                                      : columns),
          P::kThreads, static_cast<size_t>(tile_rows(held)) * Tile<T, kBM>::kRow + P::kPartialBytes};
}

template <typename T, int kP, int kBM>
const char* run(const LinearArgs& args, int multiprocessors, Stream stream, Geometry* only_geometry) {
  if (args.m == 0 || args.weight.n == 0) return nullptr;
  const Geometry g = geometry<T, kP, kBM>(args, multiprocessors);
  if (only_geometry != nullptr) {
    *only_geometry = g;
    return nullptr;
  }
  return launch<strips_linear<T, kP, kBM>>(dim3(g.blocks_x, g.blocks_y), g.threads, g.shared_bytes, stream, args);
}

template <typename T, int kP>
const char* by_tile(const LinearArgs& args, int multiprocessors, Stream stream, Geometry* only_geometry) {
  if constexpr (kBytes<T> == 2) {
    if (args.tile_m == 128) return run<T, kP, 128>(args, multiprocessors, stream, only_geometry);
  }
  if (args.tile_m == 64) return run<T, kP, 64>(args, multiprocessors, stream, only_geometry);
  if (args.tile_m == 16) return run<T, kP, 16>(args, multiprocessors, stream, only_geometry);
  return "there is no kernel for this tile_m";
}

}  // namespace

template <typename T>
const char* linear_of(const LinearArgs& args, int multiprocessors, Stream stream, Geometry* only_geometry) {
  switch (args.weight.p) {
    case 8:
      return by_tile<T, 8>(args, multiprocessors, stream, only_geometry);
    case 16:
      return by_tile<T, 16>(args, multiprocessors, stream, only_geometry);
    case 32:
      return by_tile<T, 32>(args, multiprocessors, stream, only_geometry);
    default:
      return "strips are 8, 16 or 32 outputs high";
  }
}

}  // namespace sp::cuda
