#include "cuda/strips_linear.cuh"

namespace sp::cuda {
template const char* linear_of<Bf16Type>(const LinearArgs&, int, Stream, Geometry*);
}
