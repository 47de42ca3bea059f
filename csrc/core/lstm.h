// One direction of one LSTM layer over a sequence, its two weights block-sparse.
#pragma once

#include "core/product.h"

namespace sp {

// gates = W_ih x + b_ih + W_hh h + b_hh, in the order input, forget, cell, output, H each; with `g_weight` they are
// normalised over all 4H. c' = sigmoid(f) c + sigmoid(i) tanh(g), with `g_weight` normalised over H;
// h' = sigmoid(o) tanh(c'). Tensors are row-major and contiguous, of one type, except for int8 values.
struct LstmArgs {
  ProductArgs ih;  // weights, lists, scales and biases; x, y, m and residual are filled in by run_lstm
  ProductArgs hh;
  const void* x;  // [steps, rows, E]
  const void* h;  // [rows, H], before the first step; not written to, like c
  const void* c;
  void* y;  // [steps, rows, H]
  void* h_last;
  void* c_last;
  const void* g_weight;  // [4H]; null: no normalisation
  const void* g_bias;
  const void* c_weight;  // [H]
  const void* c_bias;
  float g_eps, c_eps;
  int64_t steps, rows, hidden;
  bool reverse;  // from the last step to the first
};

// One time step. Either x or input is null.
struct LstmStep {
  const LstmArgs* lstm;
  const void* x;      // [rows, E]: the input product is part of the step
  const void* input;  // [rows, 4H]: W_ih x + b_ih
  const void* h;
  const void* c;
  void* h_next;
  void* c_next;  // may be c
  void* sums;    // [rows, 4H]: where a step kernel leaves the gates for the gates kernel; null: it finishes the step
};

// The kernels for one dtype. `step` may be null; it takes what `fused` in lstm.cpp lets through, and a 64-byte aligned
// scratch of at least `lstm_scratch_bytes`, private to the call. `gates` overwrites the sums.
struct LstmKernels {
  ProductKernel product;
  LstmStepKernel step;
  LstmGatesKernel gates;
  size_t element_bytes;      // of x, h, c and y
  size_t accumulator_bytes;  // of sums within a kernel
};

constexpr int64_t kFusedRows = 8;

// The gates of a share, and its x and h packed and as floats.
inline size_t lstm_scratch_bytes(const LstmArgs& args) {
  const int64_t padded = args.ih.in + args.ih.c + args.hh.in + args.hh.c;
  return static_cast<size_t>(4 * args.hidden + 2 * padded) * kFusedRows * sizeof(float);
}

enum class Outcome { kDone, kNoKernel, kNoMemory };

// Runs all steps; kNoKernel: only the product could serve this, and there is none.
Outcome run_lstm(const LstmArgs& args, const LstmKernels& kernels, const Executor& executor);

}  // namespace sp
