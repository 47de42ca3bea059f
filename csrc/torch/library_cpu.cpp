// CPU kernels of the `sparse_pathways` operators, registered on torch's stable ABI.
//
// Schemas, fake kernels and autograd are defined in Python (sparse_pathways/ops). Index lists are trusted here: their
// bounds are checked once, when a layout is made. The checks below only keep a wrong call from reading stray memory.
#include "core/isa.h"
#include "torch/linear.h"

namespace sp {
namespace {

Tensor bcsr_linear_cpu(const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& col,
                       const std::optional<Tensor>& pos, const std::optional<Tensor>& bias, int64_t n,
                       const std::optional<Tensor>& scale, const std::optional<Tensor>& residual, int64_t activation,
                       bool quantise_x) {
  check_dense(x, "x", 2);
  const LinearOperands operands{values, crow, col, pos, scale, bias, n, activation, quantise_x};
  check_operands(operands);
  return run_linear(x, weight_args(operands, x.size(1)), values.scalar_type(), bias, residual);
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
