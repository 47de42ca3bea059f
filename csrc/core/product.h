// One block-sparse product over all its rows and lists, on one thread or several.
#pragma once

#include "core/types.h"

namespace sp {

// Runs task(context, s) for every s in [0, shares), in any order and on any thread, and returns when all are done.
struct Executor {
  int threads;  // how many shares may run at once
  void (*run)(int threads, int64_t shares, void (*task)(void* context, int64_t share), void* context);
};

// Multiply-adds (M = 1 counts twice: it waits for loads) from which a second thread is worth calling. One thread takes
// 20 to 30 us for this much on a Zen 4, as long as a helper of the pool needs to wake; to call one that does not come
// costs 2 us.
constexpr double kSerialWork = 1e6;

// Runs `kernel` on the whole product. Returns false if scratch memory could not be had (y is then undefined).
bool run_product(ProductKernel kernel, const ProductArgs& args, size_t element_bytes, const Executor& executor);

// values[e] = block (row of e, col[e]) of the dense `weight` [n, k], zero outside the weight. Copies bits: elements of
// 2, 4 or 8 bytes, and reads kept blocks only. crow [rows + 1]; col: uint16 if `narrow`, else int32.
void gather_blocks(const void* weight, int64_t n, int64_t k, int64_t r, int64_t c, const int32_t* crow, int64_t rows,
                   const void* col, bool narrow, size_t element_bytes, void* values);

}  // namespace sp
