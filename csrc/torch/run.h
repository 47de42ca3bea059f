// Runs a product on as many threads as torch is told to use (torch.set_num_threads), of our own pool.
#pragma once

#include "core/pool.h"
#include "core/product.h"
#include "torch/check.h"

namespace sp {

// Runs `kernel`; `element_bytes` of its accumulators.
inline void run(const ProductArgs& args, ProductKernel kernel, size_t element_bytes) {
  const Executor executor{static_cast<int>(torch::stable::get_num_threads()), run_parallel};
  const bool done = run_product(kernel, args, element_bytes, executor);
  STD_TORCH_CHECK(done, "out of memory: no scratch space for a panel of ", args.in, " columns");
}

}  // namespace sp
