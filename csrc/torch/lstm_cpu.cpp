// CPU kernels of `bcsr_lstm` and `packed_lstm`: one direction of one LSTM layer over a sequence.
#include <tuple>

#include "core/lstm.h"
#include "torch/prepared.h"

namespace sp {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor>;

// LayerNorm of the gates and of the cells; all four tensors or none.
struct Norm {
  const std::optional<Tensor>&g_weight, &g_bias, &c_weight, &c_bias;
  double g_eps, c_eps;
};

const void* parameter(const std::optional<Tensor>& tensor, int64_t numel, ScalarType type) {
  STD_TORCH_CHECK(
      tensor.has_value() && tensor->is_contiguous() && tensor->numel() == numel && tensor->scalar_type() == type,
      "the parameters of the normalisation must be contiguous, of x's dtype, ", numel, " each");
  return tensor->const_data_ptr();
}

LstmKernels choose(ScalarType values) {
  const KernelTable& table = kernels();
  const ProductKernel product = linear_kernel(values);
  STD_TORCH_CHECK(product != nullptr, "the CPU kernels '", table.name, "' have none for this dtype");
  switch (x_type(values)) {
    case ScalarType::BFloat16:
      return {product, table.lstm_gates_bf16, 2, 4};
    case ScalarType::Double:
      return {product, lstm_gates_f64, 8, 8};
    default:
      return {product, table.lstm_gates_f32, 4, 4};
  }
}

Tensor like(const Tensor& tensor, int64_t last) {
  int64_t shape[4];
  const int64_t dim = tensor.dim();
  for (int64_t i = 0; i < dim; ++i) shape[i] = tensor.size(i);
  shape[dim - 1] = last;
  return empty_cpu(shape, dim, tensor.scalar_type());
}

// The layer with weights `ih` and `hh` whose values are of type `values`.
Result run(const Tensor& x, const Tensor& h, const Tensor& c, const LstmWeight& ih, const LstmWeight& hh,
           ScalarType values, const Norm& norm, bool reverse) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() >= 1 && x.dim() <= 4 && h.dim() >= 1 && h.dim() <= 4, "x and h have 1 to 4 dimensions");
  STD_TORCH_CHECK(x.is_contiguous() && h.is_contiguous() && c.is_contiguous(), "x, h and c must be contiguous");
  STD_TORCH_CHECK(x.is_cpu() && h.is_cpu() && c.is_cpu(), "x, h and c must be on the CPU");
  STD_TORCH_CHECK(type == x_type(values) && h.scalar_type() == type && c.scalar_type() == type,
                  "x, h and c must be of the dtype that the weights take");
  LstmArgs args{};
  args.ih = ih;
  args.hh = hh;
  args.hidden = h.size(h.dim() - 1);
  const int64_t in = x.size(x.dim() - 1), gates = 4 * args.hidden;
  STD_TORCH_CHECK(in > 0 && args.hidden > 0, "x and h have no columns");
  STD_TORCH_CHECK(
      ih.parts[0].in == in && hh.parts[0].in == args.hidden && ih.parts[0].out == gates && hh.parts[0].out == gates,
      "the weights must be [4H, E] and [4H, H] for x [..., E] and h [..., H]");
  args.rows = h.numel() / args.hidden;
  args.steps = args.rows == 0 ? 0 : x.numel() / (in * args.rows);
  STD_TORCH_CHECK(x.numel() == args.steps * args.rows * in, "the rows of x are no multiple of those of h");
  const int64_t rows_of_x = x.dim() == 1 ? 1 : x.size(x.dim() - 2);
  STD_TORCH_CHECK(rows_of_x == args.rows || (x.dim() == 2 && args.rows == 1), "x and h differ in rows");
  STD_TORCH_CHECK(c.dim() == h.dim(), "h and c differ in shape");
  for (int64_t i = 0; i < h.dim(); ++i) STD_TORCH_CHECK(c.size(i) == h.size(i), "h and c differ in shape");
  if (norm.g_weight.has_value()) {
    args.g_weight = parameter(norm.g_weight, gates, type);
    args.g_bias = parameter(norm.g_bias, gates, type);
    args.c_weight = parameter(norm.c_weight, args.hidden, type);
    args.c_bias = parameter(norm.c_bias, args.hidden, type);
    args.g_eps = static_cast<float>(norm.g_eps);
    args.c_eps = static_cast<float>(norm.c_eps);
  }
  args.x = x.const_data_ptr();
  args.h = h.const_data_ptr();
  args.c = c.const_data_ptr();
  args.reverse = reverse;
  Tensor y = like(x, args.hidden), h_last = like(h, args.hidden), c_last = like(c, args.hidden);
  args.y = y.mutable_data_ptr();
  args.h_last = h_last.mutable_data_ptr();
  args.c_last = c_last.mutable_data_ptr();
  const Executor executor{static_cast<int>(torch::stable::get_num_threads()), run_parallel};
  STD_TORCH_CHECK(run_lstm(args, choose(values), executor), "out of memory: no scratch space for a step of an LSTM");
  return {y, h_last, c_last};
}

LstmWeight whole(const LinearOperands& operands, int64_t in) {
  check_operands(operands);
  LstmWeight weight{{weight_args(operands, in), {}}, 1};
  weight.parts[0].bias = data_or_null(operands.bias);
  return weight;
}

Result bcsr_lstm_cpu(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& values_ih, const Tensor& crow_ih,
                     const Tensor& col_ih, const std::optional<Tensor>& pos_ih, const std::optional<Tensor>& scale_ih,
                     const std::optional<Tensor>& bias_ih, const Tensor& values_hh, const Tensor& crow_hh,
                     const Tensor& col_hh, const std::optional<Tensor>& pos_hh, const std::optional<Tensor>& scale_hh,
                     const std::optional<Tensor>& bias_hh, const std::optional<Tensor>& g_weight,
                     const std::optional<Tensor>& g_bias, const std::optional<Tensor>& c_weight,
                     const std::optional<Tensor>& c_bias, double g_eps, double c_eps, bool reverse, bool quantise_x) {
  STD_TORCH_CHECK(x.dim() >= 1 && h.dim() >= 1, "x and h have no dimensions");
  STD_TORCH_CHECK(values_ih.scalar_type() == values_hh.scalar_type(), "the two weights differ in dtype");
  const int64_t hidden = h.size(h.dim() - 1);
  const LinearOperands ih{values_ih, crow_ih, col_ih, pos_ih, scale_ih, bias_ih, 4 * hidden, 0, quantise_x};
  const LinearOperands hh{values_hh, crow_hh, col_hh, pos_hh, scale_hh, bias_hh, 4 * hidden, 0, quantise_x};
  return run(x, h, c, whole(ih, x.size(x.dim() - 1)), whole(hh, hidden), values_ih.scalar_type(),
             Norm{g_weight, g_bias, c_weight, c_bias, g_eps, c_eps}, reverse);
}

LstmWeight prepared_weight(const Prepared& last) {
  LstmWeight weight{};
  if (last.base != nullptr) weight.parts[weight.count++] = args_now(*last.base);
  weight.parts[weight.count++] = args_now(last);
  weight.parts[weight.count - 1].bias = bias_data(last.operands.bias, last.args.out, last.type);
  return weight;
}

Result packed_lstm_cpu(const Tensor& x, const Tensor& h, const Tensor& c, int64_t ih, int64_t hh,
                       const std::optional<Tensor>& g_weight, const std::optional<Tensor>& g_bias,
                       const std::optional<Tensor>& c_weight, const std::optional<Tensor>& c_bias, double g_eps,
                       double c_eps, bool reverse) {
  const Prepared &of_x = *find_prepared(ih), &of_h = *find_prepared(hh);
  STD_TORCH_CHECK(of_x.type == of_h.type, "the two weights differ in dtype");
  return run(x, h, c, prepared_weight(of_x), prepared_weight(of_h), of_x.type,
             Norm{g_weight, g_bias, c_weight, c_bias, g_eps, c_eps}, reverse);
}

}  // namespace
}  // namespace sp

STABLE_TORCH_LIBRARY_IMPL(sparse_pathways, CPU, m) {
  m.impl("bcsr_lstm", TORCH_BOX(&sp::bcsr_lstm_cpu));
  m.impl("packed_lstm", TORCH_BOX(&sp::packed_lstm_cpu));
}
