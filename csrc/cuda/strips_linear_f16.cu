#include "cuda/strips_linear.cuh"

namespace sp::cuda {
template const char* linear_of<HalfType>(const LinearArgs&, int, Stream, Geometry*);
}
