// One direction of one LSTM layer over a sequence, its two weights block-sparse.
//
// A step is two products into one buffer of gates, by the kernels of linear layers, and what follows from the gates.
// (A kernel that ran both products and the gates of eight units in one pass was slower from two rows on, where x and h
// are packed for the product anyway, and no faster for one: the gates of a row stay in the first cache.)
#pragma once

#include "core/product.h"

namespace sp {

// A weight [4H, in] as a sum of products: weights, lists, scale and bias; the rest is filled in by run_lstm.
struct LstmWeight {
  ProductArgs parts[2];
  int count;
};

// gates = W_ih x + b_ih + W_hh h + b_hh, in the order input, forget, cell, output, H each; with `g_weight` they are
// normalised over all 4H. c' = sigmoid(f) c + sigmoid(i) tanh(g), with `g_weight` normalised over H;
// h' = sigmoid(o) tanh(c'). Tensors are row-major and contiguous, of one type, except for int8 values.
struct LstmArgs {
  LstmWeight ih, hh;
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

// One time step from its gates on.
struct LstmStep {
  const LstmArgs* lstm;
  void* gates;  // [rows, 4H], float (double for double); overwritten
  const void* c;
  void* c_next;  // may be c
  void* h_next;
};

// The kernels for one dtype.
struct LstmKernels {
  ProductKernel product;
  LstmGatesKernel gates;
  size_t element_bytes;  // of x, h, c and y
  size_t gate_bytes;     // of a gate
};

// Runs all steps. False if memory could not be had.
bool run_lstm(const LstmArgs& args, const LstmKernels& kernels, const Executor& executor);

}  // namespace sp
