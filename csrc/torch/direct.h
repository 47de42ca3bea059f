// What direct.cpp, which is another library, calls in this one: plain types only, since the two are built against
// different ABIs of torch.
#pragma once

#include <cstdint>

namespace sp {

constexpr uint64_t kDirectVersion = 2;  // of this header

struct DirectWeight {
  int64_t in, out;
  int x_type;     // a ScalarType
  bool has_bias;  // [out] of x_type
  int64_t bytes;  // that a product reads
};

// Both throw std::runtime_error for a handle that is none, or where memory runs out.
struct DirectCalls {
  uint64_t version;
  DirectWeight (*weight)(int64_t handle);
  // y [m, out] from x [m, in], bias null or [out], residual null or [m, out]; all contiguous, of x_type, on the CPU.
  void (*linear)(int64_t handle, const void* x, int64_t m, const void* bias, const void* residual, void* y);
};

}  // namespace sp
