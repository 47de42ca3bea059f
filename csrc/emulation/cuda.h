// Enough of CUDA C++ to compile csrc/cuda/*.cu as host C++ and run it: the twin of the inline PTX in cuda/device.cuh.
//
// Kernels call barriers, shuffles and atomics by their CUDA names, and matrix instructions by the names of device.cuh,
// which includes this file when the compiler is not nvcc. Register layouts of ldmatrix and mma.sync are those of the
// PTX ISA, sections "Warp level matrix instructions"; sums are accumulated in double and rounded once, since the order
// in which a tensor core adds is not documented.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/kernels.h"
#include "emulation/engine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define SP_UNROLL _Pragma("GCC unroll 64")
#define SP_ROLL
#define SP_SITE __builtin_return_address(0)
// Reports its accesses itself, with the place it is called from.
#define SP_OUTLINE __attribute__((noinline, no_sanitize("thread"))) inline

struct dim3 : sp::emulation::Index {
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : Index{x_, y_, z_} {}
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
using cudaStream_t = struct CUstream_st*;

#define threadIdx (::sp::emulation::place().thread)
#define blockIdx (::sp::emulation::place().block)
#define blockDim (::sp::emulation::place().block_dim)
#define gridDim (::sp::emulation::place().grid_dim)

SP_OUTLINE void __syncthreads() { sp::emulation::block_barrier(SP_SITE); }
SP_OUTLINE void __syncwarp() { sp::emulation::warp_barrier(SP_SITE); }
SP_OUTLINE void __threadfence() { sp::emulation::fence(); }

template <typename T>
SP_OUTLINE T __shfl_xor_sync(unsigned, T value, int mask) {
  struct Operand {
    T in, out;
    int mask;
  } mine{value, {}, mask};
  sp::emulation::warp_meets(SP_SITE, &mine, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      Operand& to = *static_cast<Operand*>(lanes[i]);
      to.out = static_cast<Operand*>(lanes[i ^ to.mask])->in;
    }
  });
  return mine.out;
}

template <typename T>
SP_OUTLINE T __shfl_sync(unsigned, T value, int lane) {
  struct Operand {
    T in, out;
    int lane;
  } mine{value, {}, lane};
  sp::emulation::warp_meets(SP_SITE, &mine, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      Operand& to = *static_cast<Operand*>(lanes[i]);
      to.out = static_cast<Operand*>(lanes[to.lane & 31])->in;
    }
  });
  return mine.out;
}

template <typename T>
SP_OUTLINE T __shfl_up_sync(unsigned, T value, unsigned delta) {
  struct Operand {
    T in, out;
    unsigned delta;
  } mine{value, {}, delta};
  sp::emulation::warp_meets(SP_SITE, &mine, [](void* const* lanes) {
    for (unsigned i = 0; i < 32; ++i) {
      Operand& to = *static_cast<Operand*>(lanes[i]);
      to.out = static_cast<Operand*>(lanes[i >= to.delta ? i - to.delta : i])->in;
    }
  });
  return mine.out;
}

SP_OUTLINE unsigned __ballot_sync(unsigned, int flag) {
  struct Operand {
    int in;
    unsigned out;
  } mine{flag, 0};
  sp::emulation::warp_meets(SP_SITE, &mine, [](void* const* lanes) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(static_cast<Operand*>(lanes[i])->in != 0) << i;
    for (int i = 0; i < 32; ++i) static_cast<Operand*>(lanes[i])->out = bits;
  });
  return mine.out;
}

inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }

SP_OUTLINE int atomicAdd(int* to, int value) {
  sp::emulation::atomic(SP_SITE, to, sizeof *to);
  const int before = *to;
  *to = before + value;
  return before;
}

SP_OUTLINE int atomicOr(int* to, int value) {
  sp::emulation::atomic(SP_SITE, to, sizeof *to);
  const int before = *to;
  *to = before | value;
  return before;
}

namespace sp {

// --- vector accesses: one instruction each --------------------------------------------------------------------------
template <typename V>
SP_OUTLINE V load(const void* from) {
  emulation::access(SP_SITE, from, sizeof(V), false);
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <typename V>
SP_OUTLINE void store(void* to, V v) {
  emulation::access(SP_SITE, to, sizeof(V), true);
  __builtin_memcpy(to, &v, sizeof v);
}

// --- numbers --------------------------------------------------------------------------------------------------------
inline float bits_to_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}

inline float half_to_float(uint16_t bits) {
  _Float16 h;
  __builtin_memcpy(&h, &bits, 2);
  return static_cast<float>(h);
}

inline uint16_t float_to_half(float f) {
  const _Float16 h = static_cast<_Float16>(f);
  uint16_t bits;
  __builtin_memcpy(&bits, &h, 2);
  return bits;
}

inline uint16_t float_to_bf16(float f) {
  const uint32_t bits = float_to_bits(f);
  if (f != f) return 0x7fff;  // the NaN that the conversion instruction makes
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// --- matrix instructions --------------------------------------------------------------------------------------------
SP_OUTLINE void ldmatrix_x4_trans(uint32_t (&out)[4], uint32_t address) {
  emulation::ldmatrix_trans(SP_SITE, address, out, 4);
}

SP_OUTLINE void ldmatrix_x2_trans(uint32_t (&out)[2], uint32_t address) {
  emulation::ldmatrix_trans(SP_SITE, address, out, 2);
}

template <typename T>
SP_OUTLINE void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma(SP_SITE, emulation::Matrix::k16816, T::widen, d, a, b);
}

template <typename T>
SP_OUTLINE void mma_1688(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  emulation::mma(SP_SITE, emulation::Matrix::k1688, T::widen, d, a, &b);
}

SP_OUTLINE void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma(SP_SITE, emulation::Matrix::kTf32, nullptr, d, a, b);
}

// --- addresses, launch ----------------------------------------------------------------------------------------------
inline int unknown(int v) { return v; }
inline unsigned char* shared_memory() { return emulation::shared_base(); }

inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(at) - emulation::shared_base());
}

// A read that another block's write before its fence and atomic is visible to.
SP_OUTLINE int load_acquire(const int* from) {
  emulation::atomic(SP_SITE, const_cast<int*>(from), sizeof *from);
  emulation::fence();
  return *from;
}

// Blocks run one after the other: a condition that does not hold now never will.
SP_OUTLINE void wait_for(const int* counter, int value) {
  const int arrived = load_acquire(counter);
  if (arrived < value) emulation::fault(SP_SITE, "this block waits for one that starts after it");
  if (arrived > value) emulation::fault(SP_SITE, "this block does not wait for all that arrive here");
}

template <auto kKernel, typename Args>
const char* launch(dim3 grid, int threads, size_t shared_bytes, cudaStream_t, const Args& args) {
  if (shared_bytes > cuda::kMaxSharedBytes || grid.y > cuda::kMaxGridY || grid.z > cuda::kMaxGridY) {
    return "invalid argument";
  }
  emulation::run(grid, threads, shared_bytes, [&] { kKernel(args); });
  return nullptr;
}

}  // namespace sp
