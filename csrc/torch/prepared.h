// A packed weight of which everything but x was looked at once: prepared_cpu.cpp makes it, Python owns its handle.
#pragma once

#include <cstdlib>
#include <memory>

#include "torch/linear.h"

namespace sp {

constexpr uint64_t kAlive = 0x5350'4c49'4e45'4152;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

struct alignas(64) Prepared {
  uint64_t alive;  // kAlive until released: a stale handle is refused instead of followed, as far as that can be seen
  ScalarType type;
  // Read at the first call for all: to ask six tensors for their memory at each call touches two dozen cache lines.
  // Python looks whether the values are where they were (share_memory_ moves all tensors of a weight); bias and scale
  // are asked each time.
  ProductArgs args;
  int64_t bytes;         // that a product reads of the weight
  const Prepared* base;  // a product that is added before bias and activation, or null; kept alive by Python
  LinearOperands operands;
  std::unique_ptr<void, Free> arranged;  // what args.arranged points to
};

// Whether the weights of all handles together are more than the last cache holds: those of a model that is used layer
// after layer come from memory then, each time.
bool beyond_caches();

// The arguments as they are for a call now; but for the bias.
inline ProductArgs args_now(const Prepared& weight) {
  ProductArgs args = weight.args;
  args.scale = static_cast<const float*>(data_or_null(weight.operands.scale));
  args.cold = beyond_caches();
  return args;
}

inline Prepared* find_prepared(int64_t handle) {
  Prepared* prepared = reinterpret_cast<Prepared*>(handle);
  STD_TORCH_CHECK(prepared != nullptr && prepared->alive == kAlive, "handle is not of a prepared weight");
  return prepared;
}

}  // namespace sp
