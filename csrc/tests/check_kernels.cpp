// Every kernel of every instruction set on buffers of exactly the promised size, against a float64 product.
//
// Built by `make sanitize` with AddressSanitizer and UBSan, which then see every byte read or written out of bounds.
// Random masks with empty and full lists, ragged edges, NaN where a kernel must not look, split into shares as the
// product splits them. Prints what ran and what is not there; exit status 1 on a wrong result.
// check_kernels [--broken=read|write|overflow]: plants such a fault in a kernel, to prove that it would be seen.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/isa.h"
#include "core/product.h"

namespace sp {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
std::mt19937 rng(20230913);

double uniform() { return std::uniform_real_distribution<double>(-1, 1)(rng); }

// Exactly `count` elements, 64-byte aligned like a tensor's: the byte after the last one is poisoned.
template <typename T>
struct Buffer {
  explicit Buffer(size_t count) : size(count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, std::max<size_t>(count * sizeof(T), 1)) != 0) abort();
    data.reset(static_cast<T*>(memory));
  }
  T& operator[](size_t i) { return data.get()[i]; }
  struct Free {
    void operator()(T* memory) const { free(memory); }
  };
  std::unique_ptr<T, Free> data;
  size_t size;
};

void put(float* to, double value) { *to = static_cast<float>(value); }
void put(double* to, double value) { *to = value; }
void put(int8_t* to, double value) { *to = static_cast<int8_t>(lrint(value * 127)); }
void put(Bf16* to, double value) {
  const float single = static_cast<float>(value);
  uint32_t bits;
  memcpy(&bits, &single, 4);
  to->bits = isnan(value) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
double get(float value) { return value; }
double get(double value) { return value; }
double get(int8_t value) { return value; }
double get(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float single;
  memcpy(&single, &bits, 4);
  return single;
}

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

struct Shape {
  int64_t m, n, k, r, c;
};

// Kept blocks as lists: of block columns by block row (forward), or of block rows by block column (dx).
struct Lists {
  std::vector<int32_t> begin, other, block;
};

Lists make_lists(const std::vector<bool>& mask, int64_t rows, int64_t columns, bool transposed) {
  Lists lists{{0}, {}, {}};
  std::vector<int32_t> place(mask.size());
  for (size_t i = 0, kept = 0; i < mask.size(); ++i) place[i] = mask[i] ? static_cast<int32_t>(kept++) : -1;
  for (int64_t l = 0; l < (transposed ? columns : rows); ++l) {
    for (int64_t o = 0; o < (transposed ? rows : columns); ++o) {
      const size_t i = static_cast<size_t>(transposed ? o * columns + l : l * columns + o);
      if (!mask[i]) continue;
      lists.other.push_back(static_cast<int32_t>(o));
      lists.block.push_back(place[i]);
    }
    lists.begin.push_back(static_cast<int32_t>(lists.other.size()));
  }
  return lists;
}

enum class Fault { kNone, kRead, kWrite, kOverflow };
Fault fault = Fault::kNone;

void plant(const ProductArgs& args, size_t blocks, size_t weight_bytes) {
  const size_t end = blocks * static_cast<size_t>(args.r * args.c) * weight_bytes;
  if (fault == Fault::kRead) static_cast<volatile char*>(args.y)[0] = static_cast<const char*>(args.values)[end];
  if (fault == Fault::kWrite) static_cast<volatile char*>(args.y)[args.m * args.out * 8] = 0;
  volatile int large = std::numeric_limits<int>::max();
  if (fault == Fault::kOverflow) large = large + 1;
}

enum class Product { kForward, kDx, kDxFew };  // dx by the forward lists, or by the transposed ones

constexpr int64_t kFewRows = 4;  // of dy, in csrc/torch/train_cpu.cpp

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
    const int64_t rows = (shape.n + shape.r - 1) / shape.r, columns = (shape.k + shape.c - 1) / shape.c;
    std::vector<bool> mask(static_cast<size_t>(rows * columns));
    for (int64_t b = 0; b < rows; ++b) {  // the first block row empty, the last one full, block column 1 empty
      for (int64_t j = 0; j < columns; ++j) {
        mask[static_cast<size_t>(b * columns + j)] = b == rows - 1 || (b > 0 && j != 1 && uniform() < 2 * density - 1);
      }
    }
    const bool by_column = product_ == Product::kDxFew;
    const Lists lists = make_lists(mask, rows, columns, by_column);
    const size_t kept = lists.other.size(), size = static_cast<size_t>(shape.r * shape.c);
    const size_t pool = indirect ? kept + 2 : kept;  // strangers first and last
    Buffer<W> values(pool * size);
    if constexpr (sizeof(W) > 1) {
      for (size_t i = 0; i < values.size; ++i) put(&values[i], kNan);
    }
    const int64_t in = dx_ ? shape.n : shape.k, out = dx_ ? shape.k : shape.n;
    std::vector<double> dense(static_cast<size_t>(shape.n * shape.k));
    for (size_t i = 0, at = 0; i < mask.size(); ++i) {
      if (!mask[i]) continue;
      const int64_t n0 = static_cast<int64_t>(i) / columns * shape.r, k0 = static_cast<int64_t>(i) % columns * shape.c;
      W* block = &values[(at++ + indirect) * size];
      for (int64_t q = 0; q < shape.r * shape.c; ++q) {
        const int64_t n = n0 + q % shape.r, k = k0 + q / shape.r;
        const bool inside = n < shape.n && k < shape.k;
        put(block + q, inside ? uniform() : 0);
        if (inside) dense[static_cast<size_t>(n * shape.k + k)] = get(block[q]);
      }
    }
    ProductArgs args{};
    args.m = shape.m, args.in = in, args.out = out, args.r = shape.r, args.c = shape.c;
    args.lists = by_column ? columns : rows;
    args.narrow = narrow;
    Buffer<int32_t> begin(lists.begin.size()), wide(narrow ? 0 : kept), pos(kept);
    Buffer<uint16_t> ids(narrow ? kept : 0);
    std::copy(lists.begin.begin(), lists.begin.end(), begin.data.get());
    for (size_t e = 0; e < kept; ++e) {
      if (narrow) ids[e] = static_cast<uint16_t>(lists.other[e]);
      if (!narrow) wide[e] = lists.other[e];
      pos[e] = lists.block[e] + indirect;
    }
    args.begin = begin.data.get();
    args.other = narrow ? static_cast<void*>(ids.data.get()) : wide.data.get();
    args.pos = indirect || by_column ? pos.data.get() : nullptr;
    args.values = values.data.get();
    return product(args, dense, shape, pool);
  }

  int64_t products = 0;

 private:
  bool product(ProductArgs args, const std::vector<double>& dense, const Shape& shape, size_t pool) {
    Buffer<X> x(static_cast<size_t>(args.m * args.in)), y(static_cast<size_t>(args.m * args.out));
    Buffer<X> bias(static_cast<size_t>(args.out)), residual(y.size);
    Buffer<float> scale(static_cast<size_t>(sizeof(W) == 1 ? args.lists * args.r : 0));
    for (Buffer<X>* one : {&x, &bias, &residual}) {
      for (size_t i = 0; i < one->size; ++i) put(&(*one)[i], uniform());
    }
    for (size_t i = 0; i < y.size; ++i) put(&y[i], kNan);
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
    in_shares(args);
    if (fault != Fault::kNone && args.m > 0) plant(args, pool, sizeof(W));
    ++products;
    for (int64_t i = 0; i < args.m; ++i) {
      for (int64_t o = 0; o < args.out; ++o) {
        const size_t cell = static_cast<size_t>(i * args.out + o);
        double sum = 0, magnitude = 0, peak = 0, weights = 0;
        for (int64_t q = 0; q < args.in; ++q) {
          const double w = dense[static_cast<size_t>(dx_ ? q * shape.k + o : o * shape.k + q)];
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
    return static_cast<size_t>(dx_by_rows() ? (args.out + args.c) * kMaxPanel : kFewRows * (args.in + args.r));
  }
  bool dx_by_rows() const { return product_ == Product::kDx; }

  // The whole product at once, or cut into rows of whole panels and lists at random places.
  void in_shares(const ProductArgs& args) const {
    constexpr size_t accumulator = sizeof(X) == 8 ? 8 : 4;
    const auto share = [&](int64_t m0, int64_t m1, int64_t l0, int64_t l1) {
      Buffer<char> scratch(scratch_size(args) * accumulator);  // fresh: nothing may be left over from another share
      memset(scratch.data.get(), 0xff, scratch.size);
      if (m0 < m1 && l0 < l1) kernel_(args, m0, m1, l0, l1, scratch.data.get());
    };
    const int64_t cut =
        !dx_by_rows() && rng() % 2 ? static_cast<int64_t>(rng() % static_cast<size_t>(args.lists + 1)) : 0;
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
constexpr int64_t kBlocks[][2] = {{8, 1}, {16, 1}, {8, 4}, {4, 4}, {1, 1}, {3, 5}, {16, 16}, {8, 2}, {1, 8}, {24, 3}};
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
        if (product == Product::kDxFew && (m > kFewRows || r % 8 != 0)) continue;
        const double density = rng() % 4 ? 0.3 : 0.9;
        for (int form = 0; form < 4 && good; ++form) good = one.run({m, n, k, r, c}, density, form & 1, form & 2);
      }
    }
  }
  printf("%-10s %-17s %ld products %s\n", isa, what, one.products, good ? "good" : "WRONG");
  fflush(stdout);
  return good;
}

bool check_all() {
  constexpr double kSingle = 6e-8, kDouble = 1.2e-16, kDot = 1.2e-7;  // unit roundoff of the sums
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

}  // namespace
}  // namespace sp

int main(int argc, char** argv) {
  const std::string option = argc > 1 ? argv[1] : "";
  if (option == "--broken=read") {
    sp::fault = sp::Fault::kRead;
  } else if (option == "--broken=write") {
    sp::fault = sp::Fault::kWrite;
  } else if (option == "--broken=overflow") {
    sp::fault = sp::Fault::kOverflow;
  } else if (argc > 1) {
    fprintf(stderr, "usage: check_kernels [--broken=read|write|overflow]\n");
    return 2;
  }
  const bool good = sp::check_all();
  printf("check_kernels: %s\n", good ? "good" : "FAILED");
  return good ? 0 : 1;
}
