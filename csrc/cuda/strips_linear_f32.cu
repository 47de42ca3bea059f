#include "cuda/strips_linear.cuh"

namespace sp::cuda {
template const char* linear_of<FloatType>(const LinearArgs&, int, Stream, Geometry*);
}
