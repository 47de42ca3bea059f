// The CUDA kernels as plain functions: device pointers in, launched on a stream, nothing waited for.
//
// Every function returns null, or what CUDA said. Shapes and index ranges are the caller's promise: csrc/torch checks
// them. No torch, and no CUDA header: the proof on the host includes this file, too.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "core/types.h"

struct CUstream_st;

namespace sp::cuda {

using Stream = CUstream_st*;

enum class Dtype : int { kFloat, kHalf, kBf16 };

constexpr int kMaxSharedBytes = 160 << 10;  // of one block: what sm_80 and sm_90 have to give
constexpr int kMaxGridY = 65535;            // blocks along y of one launch

inline size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

// --- strips: the packed order of these kernels ----------------------------------------------------------------------
// A weight [N, K] is cut into strips of P
// outputs and its inputs into chunks of 512. The list of a strip and a chunk names the inputs that any block of the
// strip keeps, in octets of 8:
//
//   begin [strips * chunks + 1]    first octet of each list; all lists of one strip, then the next strip
//   ids   [octets, 8] uint16       inputs within the chunk, in an order that gathers without bank conflicts (below)
//   values                         per octet 8 x P values in the order in which the lanes of a warp hold operand B of
//                                  mma.sync: for 16 bits [32 lanes][P / 8][2], lane l = outputs l / 4 + 8 i, slots
//                                  2 (l % 4) and + 1; for floats the same with slots l % 4 and + 4
//
// Lists are filled up to whole octets with an input that is in the octet already, and zeros: nothing that a strip does
// not keep is multiplied, so a NaN in a pruned weight or in an input that no block uses stays where it is. (An infinite
// input may meet such a zero and come out as NaN; and in a strip over several block rows, as P = 16 makes of 8x1, the
// inputs of one block row meet zeros in the other.)
//
// Order: rows of the activation tile in shared memory lie 16 bytes x 8 to the 32 banks, and an octet is gathered
// without conflict if its inputs differ in bank_of(). The inputs of a list sorted by it are dealt to the octets like
// cards, which spreads each residue evenly; sums do not care about the order.
constexpr int kChunk = 512;

constexpr int bank_of(int k) { return (k & 7) ^ ((k >> 3 & 1) << 2); }

struct Strips {
  const void* values;
  const uint16_t* ids;
  const int32_t* begin;
  int n, k;
  int p;               // outputs per strip: 8, 16 or 32
  int strips, chunks;  // ceil(n / p), ceil(k / 512)
};

// Octets that a list of `count` inputs takes.
constexpr int octets_of(int count) { return (count + 7) / 8; }

// Makes strips of a block-sparse weight (any R x C) on the device. Source: lists of its blocks in row order, columns
// ascending, and the blocks [C, R] or the dense weight they are part of.
struct PackArgs {
  const int32_t* crow;
  const void* col;     // uint16 if `narrow`, else int32
  const int32_t* pos;  // entry e is block pos[e]; null: block e
  const void* blocks;  // [.., C, R]; null: `weight` is given
  const void* weight;  // [n, k], rows `stride` apart
  int64_t stride;
  int n, k, r, c;
  bool narrow;
  Dtype dtype;
  int p, strips, chunks;
  int capacity;    // octets that ids and values have room for
  int32_t* begin;  // out
  uint16_t* ids;
  void* values;
  int32_t* state;  // [0]: octets needed, also beyond `capacity`: then lists that do not fit are empty
};

// Counts (begin and state); then fills what fits. Two calls, so that memory can be sized in between; a fixed capacity
// needs no look at the count, and both calls can be captured in a graph.
const char* pack_count(const PackArgs& args, Stream stream);
const char* pack_fill(const PackArgs& args, Stream stream);

// --- y = activation(x W^T + bias) + residual ------------------------------------------------------------------------
struct LinearArgs {
  Strips weight;
  const void* x;  // [m, k], rows x_stride elements apart
  int64_t x_stride;
  const void* bias;      // [n] or null
  const void* residual;  // [m, n], contiguous, or null
  void* y;               // [m, n], contiguous
  int64_t m;
  Activation activation;
  int tile_m;  // rows per block: 16, 64 or 128 (floats: 16 or 64); see choose_tile
};

int choose_tile(int64_t m, int n, int p, Dtype dtype, int multiprocessors);
const char* linear(const LinearArgs& args, Dtype dtype, int multiprocessors, Stream stream);
// Grid and shared memory that `linear` takes, for the model of its time.
struct Geometry {
  unsigned blocks_x, blocks_y;
  int threads;
  size_t shared_bytes;
};
Geometry linear_geometry(const LinearArgs& args, Dtype dtype, int multiprocessors);

// --- one step of an LSTM --------------------------------------------------------------------------------------------
// gates = W_ih x +
// W_hh h + bias (or input + W_hh h + bias), in the order input, forget, cell, output; with g_weight normalised over all
// 4H. c' = sigmoid(f) c + sigmoid(i) tanh(g), with g_weight normalised over H; h' = sigmoid(o) tanh(c'). Both weights
// in strips of 8.
struct LstmStepArgs {
  Strips ih, hh;
  const void* x;        // [rows, E], or null: `input` is given
  const void* input;    // [rows, 4H]: W_ih x
  const void* h;        // [rows, H]
  const void* c;        // [rows, H]
  const void* bias_ih;  // [4H] or null
  const void* bias_hh;
  void* h_next;
  void* c_next;          // not c itself
  const void* g_weight;  // [4H]; null: no normalisation
  const void* g_bias;
  const void* c_weight;  // [H]
  const void* c_bias;
  float g_eps, c_eps;
  int rows, hidden;
  float* gates;      // normalisation only: scratch [rows, 4H]
  int32_t* tickets;  // normalisation only: zero before the first launch, and zero again after each; ceil(rows / 16)
};

// Whether lstm_step takes x [rows, width] (0: input is given) and h [rows, hidden].
bool lstm_fits(int width, int hidden, Dtype dtype);
const char* lstm_step(const LstmStepArgs& args, Dtype dtype, Stream stream);

// --- index lists of block masks -------------------------------------------------------------------------------------
// The lists of one layer,
// in memory of fixed capacity, so that a graph can be captured over changing masks.
struct ListsLayer {
  const uint8_t* mask;  // [rows, cols], bytes 0 or 1
  int64_t rows, cols;   // like all fields 8 bytes, so that a table of layers is a matrix of int64
  int64_t capacity;     // entries that col, row, row_t and pos_t have room for
  uint8_t* bits;        // [ceil(rows * cols / 8)], lowest bit first
  int32_t* crow;        // [rows + 1]
  void* col;            // [capacity]: block columns in row order, uint16 where cols <= 65536, else int32
  void* row;            // [capacity]: block row of each, uint16 where rows <= 65536, else int32
  int32_t* crow_t;      // [cols + 1]
  void* row_t;          // [capacity]: block rows in column order
  int32_t* pos_t;       // [capacity]: place in row order of each entry in column order
  int32_t* state;       // [kListsState], see below; zero before the first build
  int32_t* work;        // [lists_work(rows, cols)], zero before the first build
};

// state[kNnz] kept blocks, also where they exceed the capacity; state[kOverflow] 1 if they do: the lists are then those
// of an empty mask, so that no kernel reads past their end; state[kEpoch] builds so far: whoever keeps something made
// from the lists compares it with the epoch at which it was made.
enum { kNnz, kOverflow, kEpoch, kListsState };

// Words of `work`: two tickets, counts per row and column, and the row prefixes at every 32nd column.
constexpr int lists_stripes(int cols) { return cols > 32 ? (cols + 31) / 32 : 1; }
constexpr int64_t lists_work(int rows, int cols) {
  return 2 + int64_t{rows} + cols + int64_t{rows} * lists_stripes(cols);
}

// Builds the lists of all layers in one launch. `layers` [count] and `first` [count + 1] (the running sum of
// lists_jobs) lie in device memory.
struct ListsArgs {
  const ListsLayer* layers;
  const int32_t* first;
  int32_t* ticket;  // [2], zero before the first launch, and zero again after each
  int count;
};

int lists_jobs(int rows, int cols);
const char* build_lists(const ListsArgs& args, int jobs, Stream stream);

}  // namespace sp::cuda
