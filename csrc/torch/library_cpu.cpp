// CPU kernels of the `sparse_pathways` operators, registered on torch's stable ABI.
//
// Schemas, fake kernels and autograd are defined in Python (sparse_pathways/ops). Index lists are trusted here: their
// bounds are checked once, when a layout is made. The checks below only keep a wrong call from reading stray memory.
#include "core/isa.h"
#include "torch/check.h"
#include "torch/run.h"

namespace sp {
namespace {

// The bias or the residual: of x's dtype, in the given shape.
const void* same_type(const std::optional<Tensor>& tensor, const char* name, const Tensor& x, int64_t numel) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->is_contiguous() && tensor->numel() == numel && tensor->scalar_type() == x.scalar_type(), name,
                  " must be contiguous, of x's dtype, with ", numel, " elements");
  return tensor->const_data_ptr();
}

ProductKernel linear_kernel(ScalarType x, ScalarType values) {
  const KernelTable& table = kernels();
  if (x == ScalarType::Float && values == ScalarType::Char) return table.linear_i8;
  STD_TORCH_CHECK(x == values, "values and x differ in dtype");
  if (x == ScalarType::Float) return table.linear_f32;
  if (x == ScalarType::BFloat16) return table.linear_bf16;
  return x == ScalarType::Double ? linear_f64 : nullptr;
}

Tensor bcsr_linear_cpu(const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& col,
                       const std::optional<Tensor>& pos, const std::optional<Tensor>& bias, int64_t n,
                       const std::optional<Tensor>& scale, const std::optional<Tensor>& residual, int64_t activation) {
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
  args.bias = same_type(bias, "bias", x, n);
  args.residual = same_type(residual, "residual", x, args.m * n);
  STD_TORCH_CHECK((values.scalar_type() == ScalarType::Char) == scale.has_value(),
                  "int8 values, and they alone, need scale");
  if (scale.has_value()) {
    check_dense(*scale, "scale", 1);
    STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Float && scale->numel() == args.lists * args.r,
                    "scale must be float32, one per output of the padded weight");
    args.scale = static_cast<const float*>(scale->const_data_ptr());
  }
  STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::kTanh), "unknown activation");
  args.activation = static_cast<Activation>(activation);
  const ProductKernel kernel = linear_kernel(x.scalar_type(), values.scalar_type());
  STD_TORCH_CHECK(kernel != nullptr, "the CPU kernels '", kernels().name, "' have none for this dtype");
  const int64_t shape[] = {args.m, n};
  Tensor y = empty_cpu(shape, 2, x.scalar_type());
  args.y = y.mutable_data_ptr();
  run(args, kernel, x.scalar_type() == ScalarType::Double ? sizeof(double) : sizeof(float));
  return y;
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

STABLE_TORCH_LIBRARY_IMPL(sparse_pathways, CPU, m) { m.impl("bcsr_linear", TORCH_BOX(&sp::bcsr_linear_cpu)); }

// No tensor among the arguments, so no CPU key to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(sparse_pathways, CompositeExplicitAutograd, m) {
  m.impl("set_isa", TORCH_BOX(&sp::set_isa_op));
  m.impl("isa", TORCH_BOX(&sp::isa_op));
  m.impl("max_isa", TORCH_BOX(&sp::max_isa_op));
}
