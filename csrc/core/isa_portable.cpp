// Kernels compiled for the "portable" instruction set; the baseline of the compiler's target.
#define SP_VECTOR_BYTES 16
#define SP_SLICE 4  // outputs per pass of a K-major kernel: accumulators, x and a weight fill the vector registers

#include "core/kernels-inl.h"

namespace sp {

extern const KernelTable kernels_portable;
extern const ProductKernel linear_f64;
extern const ProductKernel linear_dx_f64;
extern const WeightGradKernel linear_dw_f64;
extern const LstmGatesKernel lstm_gates_f64;
const KernelTable kernels_portable = kernels_named("portable");

// float64 serves gradient checks, not speed: one version for all machines.
const ProductKernel linear_f64 = &linear<double>;
const ProductKernel linear_dx_f64 = &linear_dx<double>;
const WeightGradKernel linear_dw_f64 = kWeightGrad<double>;
const LstmGatesKernel lstm_gates_f64 = &lstm_gates<double, double>;

}  // namespace sp
