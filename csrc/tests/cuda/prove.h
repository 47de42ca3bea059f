// What the checks of the CUDA kernels share: exactly sized buffers the emulator watches, numbers, masks and lists.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "emulation/engine.h"

namespace sp::prove {

using cuda::Dtype;
using emulation::Access;

inline std::mt19937 rng(20230913);
inline double uniform() { return std::uniform_real_distribution<double>(-1, 1)(rng); }
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline uint32_t to_bits(Dtype dtype, double value) {
  if (dtype == Dtype::kHalf) {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
  }
  const float single = static_cast<float>(value);
  uint32_t bits;
  memcpy(&bits, &single, 4);
  if (dtype == Dtype::kFloat) return bits;
  return isnan(value) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline double from_bits(Dtype dtype, uint32_t bits) {
  if (dtype == Dtype::kHalf) {
    _Float16 half;
    const uint16_t low = static_cast<uint16_t>(bits);
    memcpy(&half, &low, 2);
    return static_cast<double>(half);
  }
  if (dtype == Dtype::kBf16) bits <<= 16;
  float single;
  memcpy(&single, &bits, 4);
  return single;
}

inline double epsilon(Dtype dtype) {
  return dtype == Dtype::kFloat ? 0x1p-24 : dtype == Dtype::kHalf ? 0x1p-11 : 0x1p-8;
}

// Exactly `count` elements, `shift` bytes behind an aligned address: AddressSanitizer sees the byte after the last, the
// emulator who touches it.
template <typename T>
struct Buffer {
  Buffer(size_t count, const char* name, Access access, size_t shift = 0) : size(count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, std::max<size_t>(shift + count * sizeof(T), 1)) != 0) abort();
    memset(memory, 0xff, shift + count * sizeof(T));  // NaN of any type, and an index out of range
    data = std::unique_ptr<T, Free>(reinterpret_cast<T*>(static_cast<char*>(memory) + shift), Free{shift});
    emulation::watch(data.get(), count * sizeof(T), name, access);
  }
  Buffer(const std::vector<T>& from, const char* name, Access access) : Buffer(from.size(), name, access) {
    if (!from.empty()) memcpy(data.get(), from.data(), from.size() * sizeof(T));
  }
  T& operator[](size_t i) { return data.get()[i]; }
  operator T*() { return data.get(); }
  struct Free {
    size_t shift = 0;
    void operator()(T* begin) const {
      emulation::forget(begin);
      free(reinterpret_cast<char*>(begin) - shift);
    }
  };
  std::unique_ptr<T, Free> data;
  size_t size;
};

// A tensor of float, half or bfloat16.
struct Tensor {
  Tensor(Dtype type, size_t count, const char* name, Access access, size_t shift = 0)  // of so many elements
      : dtype(type), bytes(count * cuda::size_of(type), name, access, shift * cuda::size_of(type)), count(count) {}
  void set(size_t i, double value) {
    const uint32_t bits = to_bits(dtype, value);
    memcpy(bytes + i * cuda::size_of(dtype), &bits, cuda::size_of(dtype));
  }
  double get(size_t i) {
    uint32_t bits = 0;
    memcpy(&bits, bytes + i * cuda::size_of(dtype), cuda::size_of(dtype));
    return from_bits(dtype, bits);
  }
  double fill(size_t i) {  // and what was stored
    set(i, uniform());
    return get(i);
  }
  void* data() { return bytes; }
  Dtype dtype;
  Buffer<uint8_t> bytes;
  size_t count;
};

inline double activated(Activation activation, double v) {
  switch (activation) {
    case Activation::kRelu:
      return v < 0 ? 0 : v;
    case Activation::kGelu:
      return 0.5 * v * (1 + erf(v * M_SQRT1_2));
    case Activation::kSilu:
      return v / (1 + exp(-v));
    case Activation::kTanh:
      return tanh(v);
    default:
      return v;
  }
}

// A weight [n, k] of blocks r x c: kept blocks as lists in row order, their values, and as a dense float64 matrix. The
// pool of blocks holds NaN before and after those of the weight (`indirect`), the dense form NaN where pruned. `edges`:
// the first block row and the second block column empty, the last block row full, `density` about what is left.
struct Weight {
  Weight(int n, int k, int r, int c, double density, Dtype dtype, bool narrow, bool indirect, bool dense_source = false,
         bool edges = true);

  int n, k, r, c, rows, columns;
  bool narrow;
  Dtype dtype;
  std::vector<uint8_t> mask;
  std::vector<double> dense;  // 0 where pruned
  std::unique_ptr<Buffer<int32_t>> crow, pos;
  std::unique_ptr<Buffer<uint8_t>> col;
  std::unique_ptr<Tensor> blocks, weight;
  bool keeps(int row, int column) const { return mask[static_cast<size_t>(row / r * columns + column / c)] != 0; }
};

// Strips of `p` made by the pack kernels.
struct Packed {
  Packed(Weight& weight, int p, int capacity = -1);
  int needed = 0;
  std::unique_ptr<Buffer<int32_t>> begin;
  std::unique_ptr<Buffer<uint16_t>> ids;
  std::unique_ptr<Buffer<uint8_t>> values;
  cuda::Strips strips;
};

// Prints whether the case passed: no message of a launch, nothing wrong, and no fault, which the emulator has printed.
bool report(const std::string& name, const char* error, const std::string& wrong);

// A lane of the memory that a kernel was given was wrong: "y[3, 5] = 1 but 2 +- 1e-3", once per case.
std::string compare(Tensor& got, const std::vector<double>& want, const std::vector<double>& bound, int columns,
                    const char* name);

bool prove_pack(bool quick);
bool prove_linear(bool quick);
bool prove_lists(bool quick);
bool prove_lstm(bool quick);
void print_counts();

}  // namespace sp::prove
