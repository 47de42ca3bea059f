// CPU kernels of the `sparse_pathways` operators, registered on torch's stable ABI.
//
// Schemas, fake kernels and autograd are defined in Python (sparse_pathways/ops). Index lists are trusted here: their
// bounds are checked once, when a layout is made. The checks below only keep a wrong call from reading stray memory.
#include "core/isa.h"
#include "core/product.h"
#include "torch/check.h"

namespace sp {
namespace {

void run_parallel(int64_t tasks, void (*task)(void* context, int64_t index), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(context, i);
  });
}

// Fills in types and block shape, chooses the kernel and runs it.
void run(ProductArgs& args, const Tensor& x, const Tensor& values, ProductKernel f32, ProductKernel f64) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "the CPU kernels take float32 and float64; cast x and values, or use another backend");
  STD_TORCH_CHECK(values.scalar_type() == type, "values and x differ in dtype");
  const bool single = type == ScalarType::Float;
  const Executor executor{static_cast<int>(torch::stable::get_num_threads()), run_parallel};
  const bool done = run_product(single ? f32 : f64, args, single ? sizeof(float) : sizeof(double), executor);
  STD_TORCH_CHECK(done, "out of memory: no scratch space for a panel of ", args.in, " columns");
}

Tensor bcsr_linear_cpu(const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& col,
                       const std::optional<Tensor>& pos, const std::optional<Tensor>& bias, int64_t n) {
  check_dense(x, "x", 2);
  check_dense(values, "values", 3);
  ProductArgs args{};
  args.x = x.const_data_ptr();
  args.values = values.const_data_ptr();
  args.begin = int32_data(crow, "crow");
  args.narrow = is_narrow(col, "col");
  args.other = col.const_data_ptr();
  args.m = x.size(0);
  args.in = x.size(1);
  args.out = n;
  args.c = values.size(1);
  args.r = values.size(2);
  args.lists = crow.numel() - 1;
  STD_TORCH_CHECK(args.lists == (n + args.r - 1) / args.r, "crow has ", args.lists + 1,
                  " entries, which does not fit n = ", n, " outputs in blocks of ", args.r);
  if (pos.has_value()) {
    args.pos = int32_data(*pos, "pos");
    STD_TORCH_CHECK(pos->numel() == col.numel(), "pos and col differ in length");
  } else {
    STD_TORCH_CHECK(values.size(0) >= col.numel(), "values holds fewer blocks than col names");
  }
  if (bias.has_value()) {
    check_dense(*bias, "bias", 1);
    STD_TORCH_CHECK(bias->numel() == n && bias->scalar_type() == x.scalar_type(), "bias must be [n] of x's dtype");
    args.bias = bias->const_data_ptr();
  }
  const int64_t shape[] = {args.m, n};
  Tensor y = empty_cpu(shape, 2, x.scalar_type());
  args.y = y.mutable_data_ptr();
  run(args, x, values, kernels().linear_f32, linear_f64);
  return y;
}

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
  run(args, dy, values, kernels().linear_dx_f32, linear_dx_f64);
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

int64_t set_isa_op(int64_t level) {
  const int before = set_isa(static_cast<int>(level));
  STD_TORCH_CHECK(before >= 0, "set_isa: level = ", level, "; this machine has 0 .. ", max_isa());
  return before;
}

int64_t isa_op() { return isa(); }

int64_t max_isa_op() { return max_isa(); }

}  // namespace
}  // namespace sp

STABLE_TORCH_LIBRARY_IMPL(sparse_pathways, CPU, m) {
  m.impl("bcsr_linear", TORCH_BOX(&sp::bcsr_linear_cpu));
  m.impl("bcsr_linear_dx", TORCH_BOX(&sp::bcsr_linear_dx_cpu));
  m.impl("bcsr_gather", TORCH_BOX(&sp::bcsr_gather_cpu));
}

// No tensor among the arguments, so no CPU key to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(sparse_pathways, CompositeExplicitAutograd, m) {
  m.impl("set_isa", TORCH_BOX(&sp::set_isa_op));
  m.impl("isa", TORCH_BOX(&sp::isa_op));
  m.impl("max_isa", TORCH_BOX(&sp::max_isa_op));
}
