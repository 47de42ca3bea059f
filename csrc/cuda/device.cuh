// The few instructions that CUDA C++ has no words for, each once as inline PTX; compiled as host C++, the same names
// come from emulation/cuda.h. Nothing else in csrc/cuda holds PTX or asks which compiler it is.
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#include <atomic>

#include "cuda/kernels.h"

#define SP_UNROLL _Pragma("unroll")
#define SP_ROLL _Pragma("unroll 1")

namespace sp {

// One instruction of 8 or 16 bytes; `from` aligned to that.
template <typename V>
__device__ __forceinline__ V load(const void* from) {
  return *static_cast<const V*>(from);
}

template <typename V>
__device__ __forceinline__ void store(void* to, V v) {
  *static_cast<V*>(to) = v;
}

// A value that the compiler knows nothing of: what is computed from it is computed here, not before a loop.
__device__ __forceinline__ int unknown(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char sp_dynamic_shared_memory[];
  return sp_dynamic_shared_memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// 8x8 matrices of 16-bit elements. Lane 8 j + i supplies the address of row i of matrix j; transposed, lane l gets rows
// 2 (l % 4) and + 1 of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&out)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(address)
               : "memory");
}

// d[16, 8] += a[16, K] b[K, 8]. With g = lane / 4, t = lane % 4 a lane holds d of rows g and g + 8, columns 2t, 2t + 1;
// a of rows g and g + 8, k 2t, 2t + 1 (and + 8); b of column g, k 2t, 2t + 1 (and + 8).
template <typename T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (T::kBf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

template <typename T>
__device__ __forceinline__ void mma_1688(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  if constexpr (T::kBf16) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  }
}

// As above with k = t and t + 4: a[0], a[1] are rows g and g + 8 of k = t, a[2], a[3] of k = t + 4. Of each operand the
// upper 19 bits count.
__device__ __forceinline__ void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Returns once *counter >= value; what its writers wrote before their fence and atomicAdd can then be read.
__device__ __forceinline__ void wait_for(const int* counter, int value) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < value);
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}

__device__ __forceinline__ uint16_t float_to_half(float f) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}

// Through the packed form: sm_80 has no conversion of a single value.
__device__ __forceinline__ uint16_t float_to_bf16(float f) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(0.0f), "f"(f));
  return static_cast<uint16_t>(bits);
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float f) { return __float_as_uint(f); }

// Launches `kKernel`; null, or CUDA's word for what went wrong.
template <auto kKernel, typename Args>
const char* launch(dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream, const Args& args) {
  static std::atomic<uint64_t> allowed{0};  // devices, as bits, on which the kernel may have this much shared memory
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 << 10) {
    int device = 0;
    error = cudaGetDevice(&device);
    const uint64_t bit = uint64_t{1} << (device & 63);
    if (error == cudaSuccess && (allowed.load(std::memory_order_relaxed) & bit) == 0) {
      error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, cuda::kMaxSharedBytes);
      if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
    }
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kKernel<<<grid, threads, shared_bytes, stream>>>(args);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace sp

#else
#include "emulation/cuda.h"
#endif

namespace sp {

// --- element types --------------------------------------------------------------------------------------------------
struct Bf16Type {
  using Bits = uint16_t;
  static constexpr bool kBf16 = true;
  static __device__ __forceinline__ float widen(uint16_t bits) {
    return bits_to_float(static_cast<uint32_t>(bits) << 16);
  }
  static __device__ __forceinline__ uint16_t narrow(float f) { return float_to_bf16(f); }
};

struct HalfType {
  using Bits = uint16_t;
  static constexpr bool kBf16 = false;
  static __device__ __forceinline__ float widen(uint16_t bits) { return half_to_float(bits); }
  static __device__ __forceinline__ uint16_t narrow(float f) { return float_to_half(f); }
};

struct FloatType {
  using Bits = uint32_t;
  static __device__ __forceinline__ float widen(uint32_t bits) { return bits_to_float(bits); }
  static __device__ __forceinline__ uint32_t narrow(float f) { return float_to_bits(f); }
};

}  // namespace sp
