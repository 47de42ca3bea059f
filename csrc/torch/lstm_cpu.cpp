// CPU kernel of `bcsr_lstm`: one direction of one LSTM layer over a sequence.
#include <tuple>

#include "core/isa.h"
#include "core/lstm.h"
#include "torch/check.h"
#include "torch/run.h"

namespace sp {
namespace {

// Weight [4H, in]; `type` is that of x.
ProductArgs weight(const Tensor& values, const Tensor& crow, const Tensor& col, const std::optional<Tensor>& pos,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& bias, int64_t in, int64_t out,
                   ScalarType type) {
  check_dense(values, "values", 3);
  ProductArgs args{};
  args.values = values.const_data_ptr();
  args.begin = int32_data(crow, "crow");
  args.narrow = is_narrow(col, "col");
  args.other = col.const_data_ptr();
  args.in = in;
  args.out = out;
  args.c = values.size(1);
  args.r = values.size(2);
  args.lists = crow.numel() - 1;
  STD_TORCH_CHECK(args.lists == (out + args.r - 1) / args.r, "crow has ", args.lists + 1,
                  " entries, which does not fit ", out, " gates in blocks of ", args.r);
  if (pos.has_value()) {
    args.pos = int32_data(*pos, "pos");
    STD_TORCH_CHECK(pos->numel() == col.numel(), "pos and col differ in length");
  } else {
    STD_TORCH_CHECK(values.size(0) >= col.numel(), "values holds fewer blocks than col names");
  }
  const bool quantised = values.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(quantised == scale.has_value(), "int8 values, and they alone, need scale");
  if (quantised) {
    check_dense(*scale, "scale", 1);
    STD_TORCH_CHECK(type == ScalarType::Float && scale->scalar_type() == type && scale->numel() == args.lists * args.r,
                    "x and scale must be float32, scale one per output of the padded weight");
    args.scale = static_cast<const float*>(scale->const_data_ptr());
  } else {
    STD_TORCH_CHECK(values.scalar_type() == type, "values and x differ in dtype");
  }
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_contiguous() && bias->numel() == out && bias->scalar_type() == type,
                    "bias must be contiguous, of x's dtype, one per gate");
    args.bias = bias->const_data_ptr();
  }
  return args;
}

const void* parameter(const std::optional<Tensor>& tensor, int64_t numel, ScalarType type) {
  STD_TORCH_CHECK(
      tensor.has_value() && tensor->is_contiguous() && tensor->numel() == numel && tensor->scalar_type() == type,
      "the parameters of the normalisation must be contiguous, of x's dtype, ", numel, " each");
  return tensor->const_data_ptr();
}

LstmKernels choose(ScalarType x, ScalarType values, bool quantise_x) {
  const KernelTable& table = kernels();
  // Integer products and then the gates: the fused step of int8 weights widens them and keeps x as it is.
  if (values == ScalarType::Char && quantise_x) return {table.linear_i8, nullptr, table.lstm_gates_f32, 4, 4};
  if (values == ScalarType::Char) return {table.linear_i8, table.lstm_i8, table.lstm_gates_f32, 4, 4};
  if (x == ScalarType::Float) return {table.linear_f32, table.lstm_f32, table.lstm_gates_f32, 4, 4};
  if (x == ScalarType::BFloat16) return {table.linear_bf16, table.lstm_bf16, table.lstm_gates_bf16, 2, 4};
  STD_TORCH_CHECK(x == ScalarType::Double, "bcsr_lstm takes float32, float64 and bfloat16");
  return {linear_f64, nullptr, lstm_gates_f64, 8, 8};
}

Tensor like(const Tensor& tensor, int64_t last) {
  int64_t shape[4];
  const int64_t dim = tensor.dim();
  for (int64_t i = 0; i < dim; ++i) shape[i] = tensor.size(i);
  shape[dim - 1] = last;
  return empty_cpu(shape, dim, tensor.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> bcsr_lstm_cpu(
    const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& values_ih, const Tensor& crow_ih,
    const Tensor& col_ih, const std::optional<Tensor>& pos_ih, const std::optional<Tensor>& scale_ih,
    const std::optional<Tensor>& bias_ih, const Tensor& values_hh, const Tensor& crow_hh, const Tensor& col_hh,
    const std::optional<Tensor>& pos_hh, const std::optional<Tensor>& scale_hh, const std::optional<Tensor>& bias_hh,
    const std::optional<Tensor>& g_weight, const std::optional<Tensor>& g_bias, const std::optional<Tensor>& c_weight,
    const std::optional<Tensor>& c_bias, double g_eps, double c_eps, bool reverse, bool quantise_x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() >= 1 && x.dim() <= 4 && h.dim() >= 1 && h.dim() <= 4, "x and h have 1 to 4 dimensions");
  STD_TORCH_CHECK(x.is_contiguous() && h.is_contiguous() && c.is_contiguous(), "x, h and c must be contiguous");
  STD_TORCH_CHECK(h.scalar_type() == type && c.scalar_type() == type, "x, h and c differ in dtype");
  LstmArgs args{};
  args.hidden = h.size(h.dim() - 1);
  const int64_t in = x.size(x.dim() - 1);
  STD_TORCH_CHECK(in > 0 && args.hidden > 0, "x and h have no columns");
  args.rows = h.numel() / args.hidden;
  args.steps = args.rows == 0 ? 0 : x.numel() / (in * args.rows);
  STD_TORCH_CHECK(x.numel() == args.steps * args.rows * in, "the rows of x are no multiple of those of h");
  const int64_t rows_of_x = x.dim() == 1 ? 1 : x.size(x.dim() - 2);
  STD_TORCH_CHECK(rows_of_x == args.rows || (x.dim() == 2 && args.rows == 1), "x and h differ in rows");
  STD_TORCH_CHECK(c.dim() == h.dim(), "h and c differ in shape");
  for (int64_t i = 0; i < h.dim(); ++i) STD_TORCH_CHECK(c.size(i) == h.size(i), "h and c differ in shape");
  const int64_t gates = 4 * args.hidden;
  args.ih = weight(values_ih, crow_ih, col_ih, pos_ih, scale_ih, bias_ih, in, gates, type);
  args.hh = weight(values_hh, crow_hh, col_hh, pos_hh, scale_hh, bias_hh, args.hidden, gates, type);
  STD_TORCH_CHECK(values_ih.scalar_type() == values_hh.scalar_type(), "the two weights differ in dtype");
  if (g_weight.has_value()) {
    args.g_weight = parameter(g_weight, gates, type);
    args.g_bias = parameter(g_bias, gates, type);
    args.c_weight = parameter(c_weight, args.hidden, type);
    args.c_bias = parameter(c_bias, args.hidden, type);
    args.g_eps = static_cast<float>(g_eps);
    args.c_eps = static_cast<float>(c_eps);
  }
  STD_TORCH_CHECK(!quantise_x || values_ih.scalar_type() == ScalarType::Char, "quantise_x is for int8 values");
  args.ih.quantise_x = args.hh.quantise_x = quantise_x;
  args.x = x.const_data_ptr();
  args.h = h.const_data_ptr();
  args.c = c.const_data_ptr();
  args.reverse = reverse;
  Tensor y = like(x, args.hidden), h_last = like(h, args.hidden), c_last = like(c, args.hidden);
  args.y = y.mutable_data_ptr();
  args.h_last = h_last.mutable_data_ptr();
  args.c_last = c_last.mutable_data_ptr();
  const Executor executor{static_cast<int>(torch::stable::get_num_threads()), run_parallel};
  const LstmKernels kernels = choose(type, values_ih.scalar_type(), quantise_x);
  const Outcome outcome = run_lstm(args, kernels, executor);
  STD_TORCH_CHECK(outcome != Outcome::kNoKernel, "these CPU kernels have none for this dtype and shape");
  STD_TORCH_CHECK(outcome == Outcome::kDone, "out of memory: no scratch space for the step of an LSTM");
  return {y, h_last, c_last};
}

}  // namespace
}  // namespace sp

STABLE_TORCH_LIBRARY_IMPL(sparse_pathways, CPU, m) { m.impl("bcsr_lstm", TORCH_BOX(&sp::bcsr_lstm_cpu)); }
