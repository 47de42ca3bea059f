// Which of the kernels in strips_linear.cuh runs.
#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace sp::cuda {

template <typename T>
const char* linear_of(const LinearArgs& args, int multiprocessors, Stream stream, Geometry* only_geometry);
extern template const char* linear_of<FloatType>(const LinearArgs&, int, Stream, Geometry*);
extern template const char* linear_of<HalfType>(const LinearArgs&, int, Stream, Geometry*);
extern template const char* linear_of<Bf16Type>(const LinearArgs&, int, Stream, Geometry*);

namespace {

const char* by_type(const LinearArgs& args, Dtype dtype, int multiprocessors, Stream stream, Geometry* only_geometry) {
  switch (dtype) {
    case Dtype::kFloat:
      return linear_of<FloatType>(args, multiprocessors, stream, only_geometry);
    case Dtype::kHalf:
      return linear_of<HalfType>(args, multiprocessors, stream, only_geometry);
    default:
      return linear_of<Bf16Type>(args, multiprocessors, stream, only_geometry);
  }
}

}  // namespace

// 16 rows as long as that fills the device no more than once; then 128 where they do, as each block reads the weight.
int choose_tile(int64_t m, int n, int p, Dtype dtype, int multiprocessors) {
  const int64_t outputs = (n + p - 1) / p;
  if (m <= 16 || (m + 15) / 16 * outputs <= 4 * static_cast<int64_t>(multiprocessors)) return 16;
  const bool fills = (m + 127) / 128 * ((static_cast<int64_t>(n) + 255) / 256) >= multiprocessors;
  return dtype != Dtype::kFloat && fills ? 128 : 64;
}

const char* linear(const LinearArgs& args, Dtype dtype, int multiprocessors, Stream stream) {
  return by_type(args, dtype, multiprocessors, stream, nullptr);
}

Geometry linear_geometry(const LinearArgs& args, Dtype dtype, int multiprocessors) {
  Geometry geometry{};
  by_type(args, dtype, multiprocessors, nullptr, &geometry);
  return geometry;
}

}  // namespace sp::cuda
