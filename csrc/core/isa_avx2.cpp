// Kernels compiled for the "avx2" instruction set; its compiler flags are set in CMakeLists.txt.
#define SP_VECTOR_BYTES 32
#define SP_SLICE 4  // outputs per pass of a K-major kernel: accumulators, x and a weight fill the vector registers

#include "core/linear-inl.h"
#include "core/linear_bf16-inl.h"
#include "core/linear_dw-inl.h"
#include "core/linear_dx-inl.h"
#include "core/linear_i8-inl.h"
#include "core/lstm-inl.h"

namespace sp {

extern const KernelTable kernels_avx2;
const KernelTable kernels_avx2 = {
    .name = "avx2",
    .linear_f32 = &linear<float>,
    .linear_bf16 = &linear_bf16,
    .linear_i8 = &linear_i8,
    .linear_dx_f32 = &linear_dx<float>,
    .linear_dx_few_f32 = &linear_dx_few,
    .linear_dw_f32 = kWeightGrad<float>,
    .lstm_f32 = &lstm_step<float, float>,
    .lstm_bf16 = &lstm_step<Bf16, Bf16>,
    .lstm_i8 = &lstm_step<float, int8_t>,
    .lstm_gates_f32 = &lstm_gates<float, float>,
    .lstm_gates_bf16 = &lstm_gates<Bf16, float>,
};

}  // namespace sp
