// A packed weight with all that its product needs but x, and the product itself.
#pragma once

#include "core/isa.h"
#include "torch/check.h"
#include "torch/run.h"

namespace sp {

struct LinearOperands {
  Tensor values, crow, col;
  std::optional<Tensor> pos, scale, bias;
  int64_t n;
  int64_t activation;
  bool quantise_x;  // int8 values only
};

// dtype of x for values of `type`.
inline ScalarType x_type(ScalarType type) { return type == ScalarType::Char ? ScalarType::Float : type; }

inline ProductKernel linear_kernel(ScalarType values) {
  const KernelTable& table = kernels();
  switch (values) {
    case ScalarType::Float:
      return table.linear_f32;
    case ScalarType::BFloat16:
      return table.linear_bf16;
    case ScalarType::Char:
      return table.linear_i8;
    case ScalarType::Double:
      return linear_f64;
    default:
      return nullptr;
  }
}

inline Arrange arrange_for(ScalarType values) {
  const KernelTable& table = kernels();
  switch (values) {
    case ScalarType::BFloat16:
      return table.arrange_bf16;
    case ScalarType::Char:
      return table.arrange_i8;
    default:
      return nullptr;
  }
}

// Refuses operands that do not fit one another and a weight of n x k.
inline void check_operands(const LinearOperands& w) {
  check_dense(w.values, "values", 3);
  int32_data(w.crow, "crow");
  is_narrow(w.col, "col");
  const int64_t lists = w.crow.numel() - 1, height = w.values.size(2);
  STD_TORCH_CHECK(height > 0 && w.values.size(1) > 0 && lists == (w.n + height - 1) / height, "crow has ", lists + 1,
                  " entries, which does not fit n = ", w.n, " outputs in blocks of ", height);
  if (w.pos.has_value()) {
    int32_data(*w.pos, "pos");
    STD_TORCH_CHECK(w.pos->numel() == w.col.numel(), "pos and col differ in length");
  } else {
    STD_TORCH_CHECK(w.values.size(0) >= w.col.numel(), "values holds fewer blocks than col names");
  }
  const ScalarType type = w.values.scalar_type();
  if (w.bias.has_value()) {
    check_dense(*w.bias, "bias", 1);
    STD_TORCH_CHECK(w.bias->numel() == w.n && w.bias->scalar_type() == x_type(type), "bias must be [n] of x's dtype");
  }
  STD_TORCH_CHECK((type == ScalarType::Char) == w.scale.has_value(), "int8 values, and they alone, need scale");
  if (w.scale.has_value()) {
    check_dense(*w.scale, "scale", 1);
    STD_TORCH_CHECK(w.scale->scalar_type() == ScalarType::Float && w.scale->numel() == lists * height,
                    "scale must be float32, one per output of the padded weight");
  }
  STD_TORCH_CHECK(!w.quantise_x || w.scale.has_value(), "quantise_x is for int8 values");
  STD_TORCH_CHECK(w.activation >= 0 && w.activation <= static_cast<int64_t>(Activation::kTanh), "unknown activation");
}

// Memory of a bias whose owner may have given it other memory since it was checked.
inline const void* bias_data(const std::optional<Tensor>& bias, int64_t n, ScalarType values) {
  if (!bias.has_value()) return nullptr;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == n && bias->is_contiguous() && bias->is_cpu() &&
                      bias->scalar_type() == x_type(values),
                  "bias must be [", n, "], contiguous, of x's dtype, on the CPU");
  return bias->const_data_ptr();
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// What of the arguments the operands alone decide, for a weight of w.n x k.
inline ProductArgs weight_args(const LinearOperands& w, int64_t k) {
  ProductArgs args{};
  args.values = w.values.const_data_ptr();
  args.begin = static_cast<const int32_t*>(w.crow.const_data_ptr());
  args.narrow = w.col.scalar_type() == ScalarType::UInt16;
  args.other = w.col.const_data_ptr();
  args.pos = static_cast<const int32_t*>(data_or_null(w.pos));
  args.scale = static_cast<const float*>(data_or_null(w.scale));
  args.activation = static_cast<Activation>(w.activation);
  args.quantise_x = w.quantise_x;
  args.in = k;
  args.out = w.n;
  args.c = w.values.size(1);
  args.r = w.values.size(2);
  args.lists = w.crow.numel() - 1;
  return args;
}

// y [m, N] = activation(x @ W.T * scale + initial + bias) + residual for x [m, K] of the dtype that goes with values of
// `type`; `args` from weight_args. `initial` may be y.
struct Rows {
  const void *x, *bias, *residual, *initial;
  int64_t m;
  void* y;
};
inline void multiply(ProductArgs args, ScalarType type, const Rows& rows) {
  const ProductKernel kernel = linear_kernel(type);
  STD_TORCH_CHECK(kernel != nullptr, "the CPU kernels '", kernels().name, "' have none for this dtype");
  args.x = rows.x;
  args.m = rows.m;
  args.bias = rows.bias;
  args.residual = rows.residual;
  args.initial = rows.initial;
  args.y = rows.y;
  run(args, kernel, type == ScalarType::Double ? sizeof(double) : sizeof(float));
}

// The same for x [..., K], contiguous. The result takes the place of `initial` if that is given.
inline Tensor run_linear(const Tensor& x, const ProductArgs& args, ScalarType type, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& residual, const std::optional<Tensor>& initial = std::nullopt) {
  STD_TORCH_CHECK(x.scalar_type() == x_type(type), "values and x differ in dtype");
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim > 0 && dim <= kMaxDim && x.size(dim - 1) == args.in, "x must be [..., ", args.in, "], at most ",
                  kMaxDim, " dimensions");
  STD_TORCH_CHECK(x.is_contiguous() && x.is_cpu(), "x must be contiguous and on the CPU");
  int64_t shape[kMaxDim];
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < dim; ++i) m *= shape[i] = x.size(i);
  shape[dim - 1] = args.out;
  if (residual.has_value()) {
    bool fits = residual->dim() == dim && residual->is_contiguous() && residual->is_cpu() &&
                residual->scalar_type() == x.scalar_type();
    for (int64_t i = 0; fits && i < dim; ++i) fits = residual->size(i) == shape[i];
    STD_TORCH_CHECK(fits, "residual must be contiguous, of x's dtype and y's shape");
  }
  Tensor y = initial.has_value() ? *initial : empty_cpu(shape, dim, x.scalar_type());
  multiply(args, type,
           {x.const_data_ptr(), bias_data(bias, args.out, type), data_or_null(residual), data_or_null(initial), m,
            y.mutable_data_ptr()});
  return y;
}

}  // namespace sp
