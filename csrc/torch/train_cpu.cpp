// CPU kernels of training: the transposed product and the gathering of kept blocks.
#include "core/isa.h"
#include "core/product.h"
#include "torch/check.h"
#include "torch/run.h"

namespace sp {
namespace {

Tensor bcsr_linear_dx_cpu(const Tensor& dy, const Tensor& values, const Tensor& crow_t, const Tensor& row_t,
                          const Tensor& pos_t, int64_t k) {
  check_dense(dy, "dy", 2);
  check_dense(values, "values", 3);
  ProductArgs args{};
  args.x = dy.const_data_ptr();
  args.values = values.const_data_ptr();
  args.begin = int32_data(crow_t, "crow_t");
  args.narrow = is_narrow(row_t, "row_t");
  args.other = row_t.const_data_ptr();
  args.pos = int32_data(pos_t, "pos_t");
  args.m = dy.size(0);
  args.in = dy.size(1);
  args.out = k;
  args.c = values.size(1);
  args.r = values.size(2);
  args.lists = crow_t.numel() - 1;
  STD_TORCH_CHECK(args.lists == (k + args.c - 1) / args.c, "crow_t has ", args.lists + 1,
                  " entries, which does not fit k = ", k, " inputs in blocks of ", args.c);
  STD_TORCH_CHECK(pos_t.numel() == row_t.numel(), "pos_t and row_t differ in length");
  const int64_t shape[] = {args.m, k};
  Tensor dx = empty_cpu(shape, 2, dy.scalar_type());
  args.y = dx.mutable_data_ptr();
  const ScalarType type = dy.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "the CPU kernel of dx takes float32 and float64; cast dy and values, or use another backend");
  STD_TORCH_CHECK(values.scalar_type() == type, "values and dy differ in dtype");
  const bool single = type == ScalarType::Float;
  run(args, single ? kernels().linear_dx_f32 : linear_dx_f64, single ? sizeof(float) : sizeof(double));
  return dx;
}

Tensor bcsr_gather_cpu(const Tensor& weight, const Tensor& crow, const Tensor& col, int64_t r, int64_t c) {
  check_dense(weight, "weight", 2);
  const int32_t* begin = int32_data(crow, "crow");
  const bool narrow = is_narrow(col, "col");
  const int64_t rows = crow.numel() - 1;
  STD_TORCH_CHECK(r > 0 && c > 0 && rows == (weight.size(0) + r - 1) / r, "crow has ", rows + 1,
                  " entries, which does not fit ", weight.size(0), " outputs in blocks of ", r);
  const size_t bytes = weight.element_size();
  STD_TORCH_CHECK(bytes == 2 || bytes == 4 || bytes == 8, "weight must have elements of 2, 4 or 8 bytes");
  const int64_t shape[] = {col.numel(), c, r};
  Tensor values = empty_cpu(shape, 3, weight.scalar_type());
  gather_blocks(weight.const_data_ptr(), weight.size(0), weight.size(1), r, c, begin, rows, col.const_data_ptr(),
                narrow, bytes, values.mutable_data_ptr());
  return values;
}

}  // namespace
}  // namespace sp

STABLE_TORCH_LIBRARY_IMPL(sparse_pathways, CPU, m) {
  m.impl("bcsr_linear_dx", TORCH_BOX(&sp::bcsr_linear_dx_cpu));
  m.impl("bcsr_gather", TORCH_BOX(&sp::bcsr_gather_cpu));
}
