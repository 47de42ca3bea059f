// Kernels compiled for the "avx2" instruction set; its compiler flags are set in CMakeLists.txt.
#define SP_VECTOR_BYTES 32
#define SP_SLICE 4  // outputs per pass of a K-major kernel: accumulators, x and a weight fill the vector registers

#include "core/kernels-inl.h"

namespace sp {

extern const KernelTable kernels_avx2;
const KernelTable kernels_avx2 = kernels_named("avx2");

}  // namespace sp
