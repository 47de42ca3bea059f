// Plain data passed between the operator layer and the kernels. No torch, no std: this header is compiled into ISA
// sources.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace sp {

struct Bf16 {
  uint16_t bits;  // the upper half of a float
};

enum class Activation : int { kNone = 0, kRelu, kGelu, kSilu, kTanh };

// Arguments of one block-sparse product, forward or with respect to x.
//
// A weight [N, K] is cut into blocks of R outputs x C inputs; `values` holds the kept blocks as [block][C][R], R
// contiguous, zero padded where a block sticks out of the weight. Lists of the forward product run over block rows and
// name block columns; lists of the dx product run over block columns and name block rows ("transposed order").
struct ProductArgs {
  const void* x;         // forward: x [M, in]; dx: dy [M, in]. Row-major, contiguous
  const void* values;    // [blocks, C, R], dtype of x; int8 if scale is given
  const int32_t* begin;  // list l holds the entries begin[l] .. begin[l + 1] - 1
  const void* other;     // per entry the block column (forward) or block row (dx): uint16 or int32
  const int32_t* pos;    // per entry the index of its block in `values`; null: entry e owns block e
  const void* bias;      // [out] or null; forward only, like scale, residual and activation
  const float* scale;    // [out] or null: what an int8 weight is multiplied by
  const void* residual;  // [M, out] or null, added last
  void* y;               // [M, out], row-major, contiguous, every cell written
  int64_t m;             // rows of x and y
  int64_t in;            // length of a row of x
  int64_t out;           // length of a row of y
  int64_t r;             // block height R (outputs of the weight)
  int64_t c;             // block width C (inputs of the weight)
  int64_t lists;         // number of lists: block rows (forward) or block columns (dx)
  bool narrow;           // `other` is uint16
  Activation activation;
};

// Computes rows [m0, m1) of y for lists [l0, l1). `scratch` is 64-byte aligned and holds at least
// `scratch_bytes(args)` bytes, private to the call.
using ProductKernel = void (*)(const ProductArgs& args, int64_t m0, int64_t m1, int64_t l0, int64_t l1, void* scratch);

// Units [8 * u0, 8 * u1) of an LSTM step, and the rest of a step from its gates on, rows [m0, m1): see core/lstm.h.
struct LstmStep;
using LstmStepKernel = void (*)(const LstmStep& step, int64_t u0, int64_t u1, void* scratch);
using LstmGatesKernel = void (*)(const LstmStep& step, int64_t m0, int64_t m1);

// The kernels of one instruction set, by dtype of the weight; null: there is none, the caller takes another backend.
struct KernelTable {
  const char* name;
  ProductKernel linear_f32;
  ProductKernel linear_bf16;
  ProductKernel linear_i8;  // x and y float: rows of x are quantised on the way
  ProductKernel linear_dx_f32;
  LstmStepKernel lstm_f32;
  LstmStepKernel lstm_bf16;
  LstmStepKernel lstm_i8;  // x and y float
  LstmGatesKernel lstm_gates_f32;
  LstmGatesKernel lstm_gates_bf16;
};

// Rows of x packed together at most; the scratch of a kernel holds one such panel, K-major.
constexpr int64_t kMaxPanel = 32;

// One panel, the blocks of one full list (rearranged for the dot product instructions), and kMaxPanel rows of slack.
inline size_t scratch_bytes(const ProductArgs& args, size_t element_bytes) {
  const int64_t largest = args.r > args.c ? args.r : args.c;  // the panel is zero padded to whole blocks
  const int64_t padded = args.in + largest;
  return static_cast<size_t>(padded * kMaxPanel + padded * args.r + kMaxPanel * 64) * element_bytes;
}

}  // namespace sp
