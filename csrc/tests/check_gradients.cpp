// Weight gradients of every instruction set: few rows and many, in chunks of rows, panels of columns and shares of
// block rows as the callers cut them, dense and as blocks, against float64.
#include "tests/check.h"

namespace sp {
namespace {

// dw = dy.T @ x for one shape, and what rounding may cost.
template <typename T>
struct Problem {
  explicit Problem(const Shape& s)
      : dy(random_buffer<T>(s.m * s.n)),
        x(random_buffer<T>(s.m * s.k)),
        exact(static_cast<size_t>(s.n * s.k)),
        magnitude(exact.size()) {
    for (int64_t i = 0; i < s.m; ++i) {
      for (int64_t n = 0; n < s.n; ++n) {
        for (int64_t k = 0; k < s.k; ++k) {
          const double term = get(dy[static_cast<size_t>(i * s.n + n)]) * get(x[static_cast<size_t>(i * s.k + k)]);
          exact[static_cast<size_t>(n * s.k + k)] += term;
          magnitude[static_cast<size_t>(n * s.k + k)] += fabs(term);
        }
      }
    }
  }

  Buffer<T> dy, x;
  std::vector<double> exact, magnitude;
};

template <typename T>
class CheckDw {
 public:
  CheckDw(const char* isa, const WeightGradKernel& kernel, double unit) : isa_(isa), kernel_(kernel), unit_(unit) {}

  bool run(const Problem<T>& problem, const Shape& s, const Form& form, bool dense) {
    const Weight<T> weight(s, rng() % 4 ? 0.3 : 0.9, form);
    Buffer<T> dw(static_cast<size_t>(dense ? s.n * s.k : weight.pool * s.r * s.c));
    WeightGradArgs args{};
    weight.describe(args);
    args.dy = problem.dy.data.get(), args.x = problem.x.data.get(), args.dw = dw.data.get();
    args.m = s.m, args.n = s.n, args.k = s.k, args.r = s.r, args.c = s.c;
    args.dense = dense;
    s.m <= kernel_.few ? few(args, weight.rows) : many(args, weight.rows);
    if (s.m > 0) plant(problem.dy, dw);
    ++products;
    return dense ? check_dense(problem, s, weight, dw) : check_blocks(problem, s, weight, dw, form.indirect);
  }

  int64_t products = 0;

 private:
  void few(const WeightGradArgs& args, int64_t lists) const {
    Buffer<T> columns(static_cast<size_t>(args.k * few_stride(args.m)));
    WeightGradShare share{};
    share.m1 = args.m, share.k1 = args.k, share.columns = columns.data.get();
    in_two(0, args.k, 16, [&](int64_t k0, int64_t k1) { kernel_.turn_x(args, share, k0, k1); });
    in_two(0, lists, 1, [&](int64_t l0, int64_t l1) {
      Buffer<T> scratch(static_cast<size_t>(8 * args.m));
      share.l0 = l0, share.l1 = l1, share.scratch = scratch.data.get();
      kernel_.product(args, share);
    });
  }

  void many(const WeightGradArgs& args, int64_t lists) const {
    const int64_t width = rng() % 2 ? args.k : args.c * (1 + below(args.k / args.c + 1));
    const int64_t cut = rng() % 2 ? below(args.m) : 0;
    for (const auto& [m0, m1] : {std::pair{int64_t{0}, cut}, std::pair{cut, args.m}}) {
      if (m0 == m1) continue;
      Buffer<T> dys(static_cast<size_t>(lists * args.r * turned_length(m1 - m0)));
      Buffer<T> columns(static_cast<size_t>(std::min(width, args.k) * turned_stride(m1 - m0)));
      Buffer<int32_t> cursor(static_cast<size_t>(lists));
      WeightGradShare share{};
      share.m0 = m0, share.m1 = m1;
      share.columns = columns.data.get(), share.dys = dys.data.get(), share.cursor = cursor.data.get();
      in_two(0, args.n, args.r, [&](int64_t n0, int64_t n1) { kernel_.turn_dy(args, share, n0, n1); });
      for (share.k0 = 0; share.k0 < args.k; share.k0 += width) {
        share.k1 = std::min(args.k, share.k0 + width);
        in_two(share.k0, share.k1, 16, [&](int64_t k0, int64_t k1) { kernel_.turn_x(args, share, k0, k1); });
        in_two(0, lists, 1, [&](int64_t l0, int64_t l1) {
          share.l0 = l0, share.l1 = l1;
          kernel_.product(args, share);
        });
      }
    }
  }

  // One call for [begin, end), or two, cut at begin + a multiple of `unit`.
  template <typename Call>
  static void in_two(int64_t begin, int64_t end, int64_t unit, const Call& call) {
    const int64_t cut = rng() % 2 ? begin + below((end - begin) / unit + 1) * unit : begin;
    if (begin < cut) call(begin, cut);
    if (cut < end) call(cut, end);
  }

  bool check_dense(const Problem<T>& problem, const Shape& s, const Weight<T>& weight, const Buffer<T>& dw) const {
    for (int64_t n = 0; n < s.n; ++n) {
      for (int64_t k = 0; k < s.k; ++k) {
        if (!near(problem, s, n, k, weight.kept_at(s, n, k), dw[static_cast<size_t>(n * s.k + k)])) return false;
      }
    }
    return true;
  }

  bool check_blocks(const Problem<T>& problem, const Shape& s, const Weight<T>& weight, const Buffer<T>& dw,
                    bool indirect) const {
    size_t at = static_cast<size_t>(indirect * s.r * s.c);
    for (size_t i = 0; i < weight.mask.size(); ++i) {
      if (!weight.mask[i]) continue;
      const int64_t block_row = static_cast<int64_t>(i) / weight.columns,
                    column = static_cast<int64_t>(i) % weight.columns;
      for (int64_t q = 0; q < s.r * s.c; ++q) {
        const int64_t n = block_row * s.r + q % s.r, k = column * s.c + q / s.r;
        if (!near(problem, s, n, k, n < s.n && k < s.k, dw[at++])) return false;
      }
    }
    return true;
  }

  // Zero to the bit outside of kept blocks and outside of the weight.
  bool near(const Problem<T>& problem, const Shape& s, int64_t n, int64_t k, bool kept, T got) const {
    const size_t cell = static_cast<size_t>(n * s.k + k);
    const double want = kept ? problem.exact[cell] : 0;
    const double bound = kept ? static_cast<double>(s.m + 2) * unit_ * problem.magnitude[cell] : 0;
    if (fabs(get(got) - want) <= bound) return true;
    fprintf(stderr, "%s linear_dw M=%ld N=%ld K=%ld block %ldx%ld: dw[%ld, %ld] = %.9g, want %.9g +- %.2g\n", isa_, s.m,
            s.n, s.k, s.r, s.c, n, k, get(got), want, bound);
    return false;
  }

  const char* isa_;
  const WeightGradKernel& kernel_;
  double unit_;
};

// The two sides of where kernels change their ways (24 rows, or 256), and of a whole vector.
constexpr int64_t kRows[] = {0, 1, 2, 7, 8, 9, 16, 24, 25, 31, 33, 48, 256, 257, 300};
constexpr int64_t kShapes[][2] = {{40, 32}, {37, 53}, {8, 7}, {24, 130}};

template <typename T>
bool check(const char* what, const char* isa, const WeightGradKernel& kernel, double unit) {
  CheckDw<T> one(isa, kernel, unit);
  bool good = true;
  for (const auto& [n, k] : kShapes) {
    for (const int64_t m : kRows) {
      const Problem<T> problem({m, n, k, 1, 1});
      for (const auto& [r, c] : kBlocks) {
        for (int form = 0; form < 8 && good; ++form) {
          good = one.run(problem, {m, n, k, r, c}, {bool(form & 1), bool(form & 2), false}, form & 4);
        }
      }
    }
  }
  printf("%-10s %-17s %ld products %s\n", isa, what, one.products, good ? "good" : "WRONG");
  fflush(stdout);
  return good;
}

}  // namespace

bool check_gradients() {
  bool good = true;
  for (int level = 0; level <= max_isa(); ++level) {
    set_isa(level);
    good &= check<float>("linear_dw_f32", kernels().name, kernels().linear_dw_f32, kSingle);
  }
  return check<double>("linear_dw_f64", "any", linear_dw_f64, 2 * kDouble) && good;  // the answer rounds, too
}

}  // namespace sp
