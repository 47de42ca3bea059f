// Kernels compiled for the "avx512" instruction set; its compiler flags are set in CMakeLists.txt.
#define SP_VECTOR_BYTES 64
#define SP_SLICE 8  // outputs per pass of a K-major kernel: accumulators, x and a weight fill the vector registers

#include "core/kernels-inl.h"

namespace sp {

extern const KernelTable kernels_avx512;
const KernelTable kernels_avx512 = kernels_named("avx512");

}  // namespace sp
