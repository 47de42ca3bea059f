// Runs a product on torch's threads.
#pragma once

#include "core/product.h"
#include "torch/check.h"

namespace sp {

inline void run_parallel(int64_t tasks, void (*task)(void* context, int64_t index), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(context, i);
  });
}

// Runs `kernel`; `element_bytes` of its accumulators.
inline void run(const ProductArgs& args, ProductKernel kernel, size_t element_bytes) {
  const Executor executor{static_cast<int>(torch::stable::get_num_threads()), run_parallel};
  const bool done = run_product(kernel, args, element_bytes, executor);
  STD_TORCH_CHECK(done, "out of memory: no scratch space for a panel of ", args.in, " columns");
}

}  // namespace sp
