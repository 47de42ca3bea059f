// Every kernel of every instruction set on buffers of exactly the promised size, against a float64 product.
//
// Built by `make sanitize` with AddressSanitizer and UBSan, which then see every byte read or written out of bounds.
// Random masks with empty and full lists, ragged edges, NaN where a kernel must not look, split into shares as the
// callers split them. Prints what ran and what is not there; exit status 1 on a wrong result. Here: the products;
// check_gradients.cpp: weight gradients; check_lstm.cpp: steps of an LSTM.
// check_kernels [--broken=read|write|overflow] [SUITE]: plants such a fault, to prove that it would be seen.
#include "tests/check.h"

namespace sp {
namespace {

double activated(Activation activation, double v) {
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kRelu:
      return std::max(v, 0.0);
    case Activation::kGelu:
      return 0.5 * v * (1 + erf(v * M_SQRT1_2));
    case Activation::kSilu:
      return v / (1 + exp(-v));
    case Activation::kTanh:
      return tanh(v);
  }
  return kNan;
}

enum class Product { kForward, kDx, kDxFew };  // dx by the forward lists, or by the transposed ones

// X: of x, y, bias and residual. W: of the weight.
template <typename X, typename W>
class Check {
 public:
  Check(const char* what, const char* isa, ProductKernel kernel, Product product, double unit, Arrange arrange)
      : what_(what),
        isa_(isa),
        kernel_(kernel),
        arrange_(arrange),
        product_(product),
        dx_(product != Product::kForward),
        unit_(unit) {}

  // False if a result is wrong.
  bool run(const Shape& shape, double density, bool narrow, bool indirect) {
    const Weight<W> weight(shape, density, {narrow, indirect, product_ == Product::kDxFew});
    ProductArgs args{};
    args.m = shape.m, args.r = shape.r, args.c = shape.c;
    args.in = dx_ ? shape.n : shape.k, args.out = dx_ ? shape.k : shape.n;
    args.lists = weight.lists;
    args.values = weight.values.data.get();
    weight.describe(args);
    return product(args, weight, shape);
  }

  int64_t products = 0;

 private:
  bool product(ProductArgs args, const Weight<W>& weight, const Shape& shape) {
    const Buffer<X> x = random_buffer<X>(args.m * args.in), bias = random_buffer<X>(args.out);
    const Buffer<X> residual = random_buffer<X>(args.m * args.out);
    Buffer<X> y(residual.size);
    Buffer<float> scale(static_cast<size_t>(sizeof(W) == 1 ? args.lists * args.r : 0));
    for (size_t i = 0; i < scale.size; ++i) put(&scale[i], 0.01 + 0.01 * fabs(uniform()));
    args.x = x.data.get(), args.y = y.data.get();
    if (!dx_) {
      args.scale = sizeof(W) == 1 ? scale.data.get() : nullptr;
      args.quantise_x = sizeof(W) == 1 && rng() % 2;
      args.bias = rng() % 2 ? bias.data.get() : nullptr;
      args.residual = rng() % 2 ? residual.data.get() : nullptr;
      args.activation = static_cast<Activation>(rng() % 5);
    }
    Buffer<char> arranged(arrange_ != nullptr && rng() % 2 ? arrange_(args, nullptr) : 0);
    if (arranged.size > 0) {
      arrange_(args, arranged.data.get());
      args.arranged = arranged.data.get();
    }
    wide_datapath = rng() % 2;  // some kernels are for one kind of processor
    in_shares(args);
    if (args.m > 0) plant(weight.values, y);
    ++products;
    for (int64_t i = 0; i < args.m; ++i) {
      for (int64_t o = 0; o < args.out; ++o) {
        const size_t cell = static_cast<size_t>(i * args.out + o);
        double sum = 0, magnitude = 0, peak = 0, weights = 0;
        for (int64_t q = 0; q < args.in; ++q) {
          const double w = weight.dense[static_cast<size_t>(dx_ ? q * shape.k + o : o * shape.k + q)];
          const double input = get(x[static_cast<size_t>(i * args.in + q)]);
          sum += w * input, magnitude += fabs(w * input), weights += fabs(w);
          peak = std::max(peak, fabs(input));
        }
        // A sum of `in` rounded terms in any order; x rounded to 255 steps, if the weight is int8; then the epilogue:
        // no activation is steeper than 1.2 or less exact than 1e-6, and the result is rounded to X.
        double error = static_cast<double>(args.in + 4) * unit_ * magnitude;
        if (sizeof(W) == 1) error += peak / 254 * weights;
        const double factor = args.scale != nullptr ? get(scale[static_cast<size_t>(o)]) : 1;
        const double offset = args.bias != nullptr ? get(bias[static_cast<size_t>(o)]) : 0;
        double exact = activated(args.activation, sum * factor + offset);
        if (args.residual != nullptr) exact += get(residual[cell]);
        const double single = sizeof(X) == 8 ? 0 : 1e-6;
        const double last = sizeof(X) == 2 ? 1.0 / 256 : sizeof(X) == 4 ? 1e-6 : 1e-14;
        const double bound = 1.2 * error * factor + single + last * (fabs(exact) + fabs(offset) + 1);
        if (!(fabs(get(y[cell]) - exact) <= bound)) return wrong(args, shape, i, o, get(y[cell]), exact, bound);
      }
    }
    return true;
  }

  // What the callers give, in elements.
  size_t scratch_size(const ProductArgs& args) const {
    if (product_ == Product::kForward) return scratch_bytes(args, 1);
    return static_cast<size_t>(dx_by_rows() ? dx_scratch_elements(args) : dx_few_scratch_elements(args));
  }
  bool dx_by_rows() const { return product_ == Product::kDx; }

  // The whole product at once, or cut into rows of whole panels and lists at random places.
  void in_shares(const ProductArgs& args) const {
    constexpr size_t accumulator = sizeof(X) == 8 ? 8 : 4;
    const auto share = [&](int64_t m0, int64_t m1, int64_t l0, int64_t l1) {
      Buffer<char> scratch(scratch_size(args) * accumulator);  // fresh: nothing may be left over from another share
      if (m0 < m1 && l0 < l1) kernel_(args, m0, m1, l0, l1, scratch.data.get());
    };
    const int64_t cut = !dx_by_rows() && rng() % 2 ? below(args.lists + 1) : 0;
    for (int64_t m = 0; m < args.m; m += kMaxPanel) {
      const int64_t end = args.m - m < 2 * kMaxPanel && rng() % 2 ? args.m : std::min(args.m, m + kMaxPanel);
      share(m, end, 0, cut);
      share(m, end, cut, args.lists);
      if (end == args.m) break;
    }
  }

  bool wrong(const ProductArgs& args, const Shape& s, int64_t row, int64_t o, double got, double want, double bound) {
    fprintf(stderr, "%s %s M=%ld N=%ld K=%ld block %ldx%ld activation %d: y[%ld, %ld] = %.9g, want %.9g +- %.2g\n",
            isa_, what_, s.m, s.n, s.k, s.r, s.c, static_cast<int>(args.activation), row, o, got, want, bound);
    return false;
  }

  const char* what_;
  const char* isa_;
  ProductKernel kernel_;
  Arrange arrange_;
  Product product_;
  bool dx_;
  double unit_;
};

constexpr int64_t kRows[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 25, 31, 32, 33, 40, 65};
constexpr int64_t kShapes[][2] = {{40, 32}, {37, 53}, {8, 7}, {65, 130}};

template <typename X, typename W>
bool check(const char* what, const char* isa, ProductKernel kernel, Product product, double unit,
           Arrange arrange = nullptr) {
  if (kernel == nullptr) {
    printf("%-10s %-17s none\n", isa, what);
    return true;
  }
  Check<X, W> one(what, isa, kernel, product, unit, arrange);
  bool good = true;
  for (const auto& [n, k] : kShapes) {
    for (const auto& [r, c] : kBlocks) {
      for (const int64_t m : kRows) {
        if (product == Product::kDxFew && (m > kDxFewRows || r % 8 != 0)) continue;
        const double density = rng() % 4 ? 0.3 : 0.9;
        for (int form = 0; form < 4 && good; ++form) good = one.run({m, n, k, r, c}, density, form & 1, form & 2);
      }
    }
  }
  printf("%-10s %-17s %ld products %s\n", isa, what, one.products, good ? "good" : "WRONG");
  fflush(stdout);
  return good;
}

}  // namespace

bool check_products() {
  constexpr double kDot = 1.2e-7;  // unit roundoff of the sums of the dot product instructions
  bool good = true;
  for (int level = 0; level <= max_isa(); ++level) {
    set_isa(level);
    const KernelTable& table = kernels();
    good &= check<float, float>("linear_f32", table.name, table.linear_f32, Product::kForward, kSingle);
    good &=
        check<Bf16, Bf16>("linear_bf16", table.name, table.linear_bf16, Product::kForward, kDot, table.arrange_bf16);
    good &= check<float, int8_t>("linear_i8", table.name, table.linear_i8, Product::kForward, kDot, table.arrange_i8);
    good &= check<float, float>("linear_dx_f32", table.name, table.linear_dx_f32, Product::kDx, kSingle);
    good &= check<float, float>("linear_dx_few_f32", table.name, table.linear_dx_few_f32, Product::kDxFew, kSingle);
  }
  good &= check<double, double>("linear_f64", "any", linear_f64, Product::kForward, kDouble);
  good &= check<double, double>("linear_dx_f64", "any", linear_dx_f64, Product::kDx, kDouble);
  return good;
}

}  // namespace sp

int main(int argc, char** argv) {
  struct Suite {
    std::string name;
    bool (*check)();
  };
  const Suite suites[] = {
      {"products", sp::check_products}, {"gradients", sp::check_gradients}, {"lstm", sp::check_lstm}};
  std::string only;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--broken=read") {
      sp::fault = sp::Fault::kRead;
    } else if (option == "--broken=write") {
      sp::fault = sp::Fault::kWrite;
    } else if (option == "--broken=overflow") {
      sp::fault = sp::Fault::kOverflow;
    } else if (std::any_of(std::begin(suites), std::end(suites), [&](const Suite& s) { return s.name == option; })) {
      only = option;
    } else {
      fprintf(stderr, "usage: check_kernels [--broken=read|write|overflow] [products|gradients|lstm]\n");
      return 2;
    }
  }
  bool good = true;
  for (const Suite& suite : suites) {
    if (only.empty() || only == suite.name) good &= suite.check();
  }
  printf("check_kernels: %s\n", good ? "good" : "FAILED");
  return good ? 0 : 1;
}
