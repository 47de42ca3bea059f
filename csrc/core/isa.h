// Choice of the instruction set at run time.
#pragma once

#include "core/types.h"

namespace sp {

enum Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Dot = 3 };

// Best level that this processor and operating system run, of those compiled in.
int max_isa();

// Level in use: max_isa() until set_isa was called.
int isa();

// Uses `level` for all later calls of the process and returns the level before, or -1 (and changes nothing) if `level`
// is outside 0..max_isa().
int set_isa(int level);

// Kernels of the level in use; float64 has one version for all.
const KernelTable& kernels();
extern const ProductKernel linear_f64;
extern const ProductKernel linear_dx_f64;
extern const WeightGradKernel linear_dw_f64;
extern const LstmGatesKernel lstm_gates_f64;

}  // namespace sp
