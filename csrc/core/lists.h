// Index lists of a block mask, and the choice of its blocks by score. Plain C++: bound by memory, not by arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/types.h"

namespace sp {

// The lists of one mask [rows, cols]; Id is uint16_t where rows and cols fit, each for itself, else int32_t.
//
// bits    the mask in row order, lowest bit first, [ceil(rows * cols / 8)]
// crow    [rows + 1], col [blocks]: block columns in row order
// crow_t  [cols + 1], row_t, pos_t [blocks]: block rows in column order, and the place of each block in row order
struct BlockLists {
  uint8_t* bits;
  int32_t* crow;
  void* col;
  int32_t* crow_t;
  void* row_t;
  int32_t* pos_t;
  bool narrow_col;
  bool narrow_row;
};

// Packs mask (bytes 0 or 1) into bits and fills crow. Returns the number of blocks.
int64_t count_blocks(const uint8_t* mask, int64_t rows, int64_t cols, uint8_t* bits, int32_t* crow);

// Fills col, crow_t, row_t and pos_t; crow is done.
void build_lists(const uint8_t* mask, int64_t rows, int64_t cols, const BlockLists& lists);

// Number of blocks that differ between two masks as bits, counted no further than `limit`.
int64_t count_changes(const uint8_t* before, const uint8_t* after, int64_t rows, int64_t cols, int64_t limit);

// Fills col, crow_t, row_t and pos_t of `after` (bits and crow are done) from the lists before: unchanged block rows
// and columns are copied, the places behind them shifted.
void update_lists(int64_t rows, int64_t cols, const BlockLists& before, const BlockLists& after);

// to = the weight [n, k] where the mask (as bits) keeps its block [r, c], else 0. Copies bits: elements of 2, 4 or 8
// bytes; a NaN in a pruned block leaves no trace.
void mask_weight(const void* weight, int64_t n, int64_t k, int64_t r, int64_t c, const uint8_t* bits,
                 size_t element_bytes, void* to);

// sums[b * ceil(k / c) + j] = sum of a * e over block (b, j) of [r, c], of matrices [n, k]; products and sums are
// float. Block rows [b0, b1).
void block_dots(const float* a, const float* e, int64_t n, int64_t k, int64_t r, int64_t c, int64_t b0, int64_t b1,
                float* sums);
void block_dots(const Bf16* a, const Bf16* e, int64_t n, int64_t k, int64_t r, int64_t c, int64_t b0, int64_t b1,
                float* sums);

// kept[i] = 1 for the `keep` highest of `count` scores without NaN, else 0; among equals the lower i is kept.
// 0 < keep < count.
void select_highest(const float* scores, int64_t count, int64_t keep, uint8_t* kept);
void select_highest(const double* scores, int64_t count, int64_t keep, uint8_t* kept);

}  // namespace sp
