// Kernels compiled for "avx512_dot", AVX-512 with VNNI, BF16 and VBMI (Zen 4, Sapphire Rapids and later); its compiler
// flags are set in CMakeLists.txt.
#define SP_VECTOR_BYTES 64
#define SP_SLICE 8  // outputs per pass of a K-major kernel: accumulators, x and a weight fill the vector registers

#include "core/kernels-inl.h"

namespace sp {

extern const KernelTable kernels_avx512_dot;
const KernelTable kernels_avx512_dot = kernels_named("avx512_dot");

}  // namespace sp
