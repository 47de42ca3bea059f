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
  const void* arranged;  // the lists and values once more, as `Arrange` left them for this kernel, or null
  const void* bias;      // [out] or null; forward only, like scale, residual and activation
  const float* scale;    // [out] or null: what an int8 weight is multiplied by
  const void* residual;  // [M, out] or null, added last
  const void* initial;   // [M, out] or null, added before the bias; may be y itself
  void* y;               // [M, out], row-major, contiguous, every cell written
  bool wide_y;           // bf16 only: y and initial are float, rounded nowhere
  int64_t m;             // rows of x and y
  int64_t in;            // length of a row of x
  int64_t out;           // length of a row of y
  int64_t r;             // block height R (outputs of the weight)
  int64_t c;             // block width C (inputs of the weight)
  int64_t lists;         // number of lists: block rows (forward) or block columns (dx)
  bool narrow;           // `other` is uint16
  bool cold;             // the weight comes from memory: kernels ask for what they will need well before
  bool quantise_x;       // int8 weights only: quantise the rows of x, too (linear_i8-inl.h has the rule)
  Activation activation;
};

// Computes rows [m0, m1) of y for lists [l0, l1). `scratch` is 64-byte aligned and holds at least
// `scratch_bytes(args)` bytes, private to the call.
using ProductKernel = void (*)(const ProductArgs& args, int64_t m0, int64_t m1, int64_t l0, int64_t l1, void* scratch);

// Writes lists and values to `to` (64-byte aligned) in the order in which a product kernel of the same table reads
// them, and returns how many bytes that takes; only counts them if `to` is null. 0: the kernel has no other order for
// such blocks. What a product does with the weight alone is so done once, for products that come again and again.
using Arrange = size_t (*)(const ProductArgs& args, void* to);

// Arguments of the gradient with respect to the weight, dw = dy.T @ x on kept blocks; lists of the forward product.
struct WeightGradArgs {
  const void* dy;  // [M, N], row-major, contiguous
  const void* x;   // [M, K], row-major, contiguous
  const int32_t* begin;
  const void* other;   // block columns: uint16 if narrow, else int32
  const int32_t* pos;  // per entry the index of its block in dw, if not dense; null: entry e owns block e
  void* dw;            // dense: [N, K], every cell written; else [blocks, C, R], the blocks of the lists written
  int64_t m, n, k, r, c;
  bool narrow;
  bool dense;
};

// Rows of the batch in one chunk of a weight gradient: the dy of a block row then fits the first cache.
constexpr int64_t kGradRows = 512;

// Length of a turned column, and how far apart columns of x are: `few` rows in whole vectors of eight (one as it is),
// more in whole pieces of 16, and never a power of two apart, where columns would share cache sets.
constexpr int64_t few_stride(int64_t rows) { return rows == 1 ? 1 : (rows + 7) / 8 * 8; }
constexpr int64_t turned_length(int64_t rows) { return (rows + 15) / 16 * 16; }
constexpr int64_t turned_stride(int64_t rows) { return turned_length(rows) + 16; }

// Part of a weight gradient: rows [m0, m1) and columns [k0, k1) for block rows [l0, l1). Few rows: all of them and all
// columns at once. Else chunk by chunk (where m0 > 0 the gradient is added to what is there), and within a chunk panel
// by panel of whole blocks, ascending.
struct WeightGradShare {
  int64_t m0, m1, k0, k1, l0, l1;
  void* columns;    // of x: column k at (k - k0) * turned_stride(m1 - m0), or k * few_stride(m)
  void* dys;        // unless few: [block row][turned_length(m1 - m0) / 16][R][16 rows]
  int32_t* cursor;  // unless few: one number per block row, which the kernel keeps from panel to panel
  void* scratch;    // if few: 8 elements per row, private to the call
};

struct WeightGradKernel {
  int64_t few;  // up to this many rows are few
  // Make columns [k0, k1) of share.columns, outputs [n0, n1) of share.dys. The last outputs bring the padding of their
  // block row, so whoever makes them makes their whole block row.
  void (*turn_x)(const WeightGradArgs& args, const WeightGradShare& share, int64_t k0, int64_t k1);
  void (*turn_dy)(const WeightGradArgs& args, const WeightGradShare& share, int64_t n0, int64_t n1);
  void (*product)(const WeightGradArgs& args, const WeightGradShare& share);
};

// A step of an LSTM from its gates on: see core/lstm.h.
struct LstmStep;
using LstmGatesKernel = void (*)(const LstmStep& step);

// The kernels of one instruction set, by dtype of the weight; null: there is none, the caller takes another backend.
struct KernelTable {
  const char* name;
  ProductKernel linear_f32;
  ProductKernel linear_bf16;
  ProductKernel linear_i8;  // x and y float: rows of x are quantised on the way
  Arrange arrange_bf16;     // for linear_bf16, as arrange_i8 for linear_i8; null: there is no other order
  Arrange arrange_i8;
  ProductKernel linear_dx_f32;
  ProductKernel linear_dx_few_f32;
  WeightGradKernel linear_dw_f32;
  LstmGatesKernel lstm_gates_f32;
  LstmGatesKernel lstm_gates_bf16;
};

// Whether the processor works on 512 bits at once: most with AVX-512 split such an operation in two halves, or have
// permutes of that width on one port only. Set with the instruction set (core/isa.cpp); tests may change it.
extern bool wide_datapath;

// Rows of x packed together at most; the scratch of a kernel holds one such panel, K-major.
constexpr int64_t kMaxPanel = 32;

// One panel, the blocks of one full list (rearranged or widened, with room for where their inputs start), and kMaxPanel
// rows of slack.
inline size_t scratch_bytes(const ProductArgs& args, size_t element_bytes) {
  const int64_t largest = args.r > args.c ? args.r : args.c;  // the panel is zero padded to whole blocks
  const int64_t padded = args.in + largest;
  return static_cast<size_t>(padded * kMaxPanel + padded * (args.r + 8) + kMaxPanel * 64) * element_bytes;
}

// Rows of dy up to which linear_dx_few is the faster one (Zen 5: 36 us for 58 at one row of 1024x1024, 70 % pruned; at
// three rows 70).
constexpr int64_t kDxFewRows = 2;

// Elements of the scratch of linear_dx: dx and dy for kMaxPanel rows, whole blocks. Of linear_dx_few: dy.
inline int64_t dx_scratch_elements(const ProductArgs& args) {
  return (args.out + args.c + args.lists * args.r) * kMaxPanel;
}
inline int64_t dx_few_scratch_elements(const ProductArgs& args) { return kDxFewRows * (args.in + args.r); }

}  // namespace sp
