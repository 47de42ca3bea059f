// Steps of an LSTM of every instruction set and type: the fused step with and without its input product, in shares of
// units; gates and layer norms from stored sums. Against float64.
#include "core/lstm.h"
#include "tests/check.h"

namespace sp {
namespace {

// A value and how far off a kernel may be.
struct Near {
  double exact, bound;
};
using Row = std::vector<Near>;

double sigmoid(double v) { return 1 / (1 + exp(-v)); }

// sigmoid is at most a quarter as steep as its argument, tanh at most as steep; `own`: what a function rounds.
Near sigmoid(const Near& v, double own) { return {sigmoid(v.exact), v.bound / 4 + own}; }
Near tanh(const Near& v, double own) { return {::tanh(v.exact), v.bound + own}; }
Near product(const Near& a, const Near& b) {
  return {a.exact * b.exact, a.bound * fabs(b.exact) + fabs(a.exact) * b.bound + a.bound * b.bound};
}

// What a layer norm makes of a row: everything is divided by the deviation, which is as far off as the row.
template <typename Y>
void normalise(Row& row, const Buffer<Y>& weight, const Buffer<Y>& bias, double eps, double own) {
  double mean = 0, square = 0, worst = 0;
  for (const Near& v : row) mean += v.exact / static_cast<double>(row.size()), worst = std::max(worst, v.bound);
  for (const Near& v : row) square += (v.exact - mean) * (v.exact - mean) / static_cast<double>(row.size());
  const double deviation = sqrt(square + eps);
  for (size_t i = 0; i < row.size(); ++i) {
    const double y = (row[i].exact - mean) / deviation, w = get(weight[i]), b = get(bias[i]);
    const double bound = worst / deviation * (2 + fabs(y)) + own * (1 + fabs(y) + fabs(mean) / deviation);
    row[i] = {y * w + b, bound * fabs(w) + own * (fabs(y * w) + fabs(b))};
  }
}

struct Options {
  int64_t rows, hidden, inputs;
  int64_t ih[2], hh[2];  // blocks
  bool fused_input, layer_norm, ih_bias, hh_bias, in_place;
};

// Y: of x, h, c and biases. W: of the weights. Acc: of the sums.
template <typename Y, typename W, typename Acc>
class CheckLstm {
 public:
  CheckLstm(const char* what, const char* isa, LstmStepKernel step, LstmGatesKernel gates)
      : what_(what), isa_(isa), step_(step), gates_(gates) {}

  // The fused step; with a layer norm it leaves the sums to the gates kernel.
  bool step(const Options& o, bool indirect) {
    const int64_t n = 4 * o.hidden;
    const Weight<W> ih({0, n, o.inputs, o.ih[0], o.ih[1]}, 0.7, {true, indirect, false});
    const Weight<W> hh({0, n, o.hidden, o.hh[0], o.hh[1]}, 0.7, {true, indirect, false});
    State s(o);
    const Buffer<Y> x = random_buffer<Y>(o.rows * o.inputs), b_ih = random_buffer<Y>(n), b_hh = random_buffer<Y>(n);
    Buffer<float> ih_scale(sizeof(W) == 1 ? static_cast<size_t>(n) : 0), hh_scale(ih_scale.size);
    for (Buffer<float>* scale : {&ih_scale, &hh_scale}) {
      for (size_t i = 0; i < scale->size; ++i) (*scale)[i] = static_cast<float>(0.01 + 0.01 * fabs(uniform()));
    }
    LstmArgs args = s.args();
    describe(args.ih, ih, o.inputs, o.ih, o.ih_bias ? &b_ih : nullptr, ih_scale);
    describe(args.hh, hh, o.hidden, o.hh, o.hh_bias ? &b_hh : nullptr, hh_scale);
    LstmStep step = s.step(args);
    step.x = o.fused_input ? x.data.get() : nullptr;
    step.input = o.fused_input ? nullptr : s.input.data.get();
    if (!o.layer_norm) step.sums = nullptr;

    std::vector<Row> sums(static_cast<size_t>(o.rows));
    for (int64_t row = 0; row < o.rows; ++row) {
      for (int64_t i = 0; i < n; ++i) {
        Near sum{0, 0};
        if (o.fused_input) {
          add_product(sum, ih, x, row, i, o.inputs, ih_scale);
          if (o.ih_bias) add(sum, get(b_ih[static_cast<size_t>(i)]));
        } else {
          add(sum, get(s.input[static_cast<size_t>(row * n + i)]));
        }
        add_product(sum, hh, s.h, row, i, o.hidden, hh_scale);
        if (o.hh_bias) add(sum, get(b_hh[static_cast<size_t>(i)]));
        sums[static_cast<size_t>(row)].push_back(sum);
      }
    }
    const int64_t units = o.hidden / 8, cut = o.in_place ? 0 : below(units + 1);
    for (const auto& [u0, u1] : {std::pair{int64_t{0}, cut}, std::pair{cut, units}}) {
      if (u0 == u1) continue;
      Buffer<char> scratch(lstm_scratch_bytes(args));
      step_(step, u0, u1, scratch.data.get());
    }
    if (o.layer_norm) gates_(step, 0, o.rows);
    plant(hh.values, s.h_next);
    return s.check(what_, isa_, sums, o.layer_norm ? stored(Near{1, 0}) : 0) && ++steps;
  }

  // The gates kernel on sums of its own.
  bool gates(const Options& o) {
    State s(o);
    std::vector<Row> sums(static_cast<size_t>(o.rows));
    for (int64_t i = 0; i < o.rows * 4 * o.hidden; ++i) {
      put(&s.sums[static_cast<size_t>(i)], 3 * uniform());
      sums[static_cast<size_t>(i / (4 * o.hidden))].push_back({get(s.sums[static_cast<size_t>(i)]), 0});
    }
    const LstmArgs args = s.args();
    const LstmStep step = s.step(args);
    const int64_t cut = below(o.rows + 1);
    gates_(step, 0, cut);
    gates_(step, cut, o.rows);
    plant(s.c, s.h_next);
    return s.check(what_, isa_, sums, 0) && ++steps;
  }

  int64_t steps = 0;

 private:
  static constexpr double kUnit = sizeof(Acc) == 8 ? 2 * kDouble : kSingle;  // the answer rounds, too
  static constexpr double kOwn = sizeof(Acc) == 8 ? 1e-13 : 2e-6;            // of exp, tanh and a layer norm's sums
  static constexpr double kStore = sizeof(Y) == 2 ? 1.0 / 256 : kUnit;       // rounding to Y

  static double stored(const Near& v) { return kStore * (fabs(v.exact) + v.bound); }
  static void add(Near& sum, double v) { sum.exact += v, sum.bound += 4 * kUnit * (fabs(v) + fabs(sum.exact)); }

  void describe(ProductArgs& args, const Weight<W>& weight, int64_t in, const int64_t* block, const Buffer<Y>* bias,
                const Buffer<float>& scale) const {
    weight.describe(args);
    args.values = weight.values.data.get();
    args.in = in, args.out = static_cast<int64_t>(weight.dense.size()) / in;
    args.r = block[0], args.c = block[1], args.lists = weight.lists;
    args.bias = bias == nullptr ? nullptr : bias->data.get();
    args.scale = sizeof(W) == 1 ? scale.data.get() : nullptr;
  }

  static void add_product(Near& sum, const Weight<W>& weight, const Buffer<Y>& x, int64_t row, int64_t n, int64_t in,
                          const Buffer<float>& scale) {
    double exact = 0, magnitude = 0;
    for (int64_t k = 0; k < in; ++k) {
      const double term = weight.dense[static_cast<size_t>(n * in + k)] * get(x[static_cast<size_t>(row * in + k)]);
      exact += term, magnitude += fabs(term);
    }
    const double factor = sizeof(W) == 1 ? get(scale[static_cast<size_t>(n)]) : 1;
    sum.exact += exact * factor;
    sum.bound += static_cast<double>(in + 8) * kUnit * (magnitude * factor + fabs(sum.exact));
  }

  // Tensors of a step, and its answer from the exact gates.
  struct State {
    explicit State(const Options& options)
        : o(options),
          h(random_buffer<Y>(o.rows * o.hidden)),
          c(random_buffer<Y>(o.rows * o.hidden)),
          c_before(c.size),
          input(random_buffer<Y>(o.fused_input ? 0 : o.rows * 4 * o.hidden)),
          g_weight(random_buffer<Y>(4 * o.hidden)),
          g_bias(random_buffer<Y>(4 * o.hidden)),
          c_weight(random_buffer<Y>(o.hidden)),
          c_bias(random_buffer<Y>(o.hidden)),
          sums(static_cast<size_t>(o.rows * 4 * o.hidden)),
          c_next(c.size),
          h_next(c.size) {
      memcpy(c_before.data.get(), c.data.get(), c.size * sizeof(Y));
    }

    LstmArgs args() const {
      LstmArgs args{};
      args.rows = o.rows, args.hidden = o.hidden, args.steps = 1;
      args.g_eps = args.c_eps = 1e-3f;
      if (o.layer_norm) {
        args.g_weight = g_weight.data.get(), args.g_bias = g_bias.data.get();
        args.c_weight = c_weight.data.get(), args.c_bias = c_bias.data.get();
      }
      return args;
    }

    LstmStep step(const LstmArgs& args) {
      LstmStep step{};
      step.lstm = &args;
      step.h = h.data.get(), step.c = c.data.get();
      step.c_next = o.in_place ? c.data.get() : c_next.data.get();
      step.h_next = h_next.data.get();
      step.sums = sums.data.get();
      return step;
    }

    bool check(const char* what, const char* isa, std::vector<Row>& gates, double store) const {
      const Buffer<Y>& cell = o.in_place ? c : c_next;
      for (int64_t row = 0; row < o.rows; ++row) {
        Row& gate = gates[static_cast<size_t>(row)];
        for (Near& v : gate) v.bound += store * (fabs(v.exact) + v.bound);
        if (o.layer_norm) normalise(gate, g_weight, g_bias, 1e-3f, kOwn + kStore);
        Row next(static_cast<size_t>(o.hidden));
        const auto of = [&](int64_t g, int64_t i) -> const Near& {
          return gate[static_cast<size_t>(g * o.hidden + i)];
        };
        for (int64_t i = 0; i < o.hidden; ++i) {
          const double before = get(c_before[static_cast<size_t>(row * o.hidden + i)]);
          const Near kept = product(sigmoid(of(1, i), kOwn), {before, 0});
          const Near added = product(sigmoid(of(0, i), kOwn), tanh(of(2, i), kOwn));
          Near& v = next[static_cast<size_t>(i)];
          v = {kept.exact + added.exact, kept.bound + added.bound};
          v.bound += stored(v) + 4 * kUnit * (fabs(kept.exact) + fabs(added.exact));
        }
        if (o.layer_norm) normalise(next, c_weight, c_bias, 1e-3f, kOwn + kStore);
        for (int64_t i = 0; i < o.hidden; ++i) {
          const size_t at = static_cast<size_t>(row * o.hidden + i);
          const Near& v = next[static_cast<size_t>(i)];
          Near out = product(sigmoid(of(3, i), kOwn), tanh(v, kOwn));
          out.bound += stored(out) + 4 * kUnit;
          if (!right(what, isa, "c", row, i, get(cell[at]), v) ||
              !right(what, isa, "h", row, i, get(h_next[at]), out)) {
            return false;
          }
        }
      }
      return true;
    }

    bool right(const char* what, const char* isa, const char* which, int64_t row, int64_t i, double got,
               const Near& want) const {
      if (fabs(got - want.exact) <= want.bound) return true;
      fprintf(
          stderr,
          "%s %s rows=%ld H=%ld E=%ld blocks %ldx%ld %ldx%ld layer norm %d: %s[%ld, %ld] = %.9g, want %.9g +- %.2g\n",
          isa, what, o.rows, o.hidden, o.inputs, o.ih[0], o.ih[1], o.hh[0], o.hh[1], o.layer_norm, which, row, i, got,
          want.exact, want.bound);
      return false;
    }

    Options o;
    Buffer<Y> h, c, c_before, input, g_weight, g_bias, c_weight, c_bias, sums, c_next, h_next;
  };

  const char* what_;
  const char* isa_;
  LstmStepKernel step_;
  LstmGatesKernel gates_;
};

Options some(int64_t rows, int64_t hidden, int64_t inputs) {
  Options o{};
  o.rows = rows, o.hidden = hidden, o.inputs = inputs;
  std::copy_n(kBlocks[0], 2, o.ih);
  std::copy_n(kBlocks[0], 2, o.hh);
  o.fused_input = rng() % 2, o.layer_norm = rng() % 2, o.ih_bias = rng() % 2, o.hh_bias = rng() % 2;
  o.in_place = rng() % 2;
  return o;
}

template <typename Y, typename W, typename Acc>
bool check(const char* what, const char* isa, LstmStepKernel step, LstmGatesKernel gates) {
  CheckLstm<Y, W, Acc> one(what, isa, step, gates);
  bool good = true;
  for (const int64_t rows : {1, 2, 3, 4, 5, 7, 8}) {
    for (const int64_t hidden : {8, 16, 24, 40, 72}) {
      for (const int64_t inputs : {1, 8, 37, 64}) {
        for (const auto& [r, c] : kBlocks) {
          if (step == nullptr || r % 8 != 0) continue;
          Options o = some(rows, hidden, inputs);
          // One weight, the other, or both in these blocks; 8x1 has kernels of its own.
          const uint32_t which = 1 + rng() % 3;
          if (which & 1) o.ih[0] = r, o.ih[1] = c;
          if (which & 2) o.hh[0] = r, o.hh[1] = c;
          for (const bool indirect : {false, true}) good = good && one.step(o, indirect);
        }
      }
    }
  }
  for (const int64_t rows : {1, 2, 9}) {
    for (const int64_t hidden : {1, 7, 8, 15, 16, 17, 40, 65}) {
      for (int turn = 0; turn < 4 && gates != nullptr; ++turn) good = good && one.gates(some(rows, hidden, 0));
    }
  }
  printf("%-10s %-17s %ld steps %s\n", isa, what, one.steps, good ? "good" : "WRONG");
  fflush(stdout);
  return good;
}

}  // namespace

bool check_lstm() {
  bool good = true;
  for (int level = 0; level <= max_isa(); ++level) {
    set_isa(level);
    const KernelTable& table = kernels();
    good &= check<float, float, float>("lstm_f32", table.name, table.lstm_f32, table.lstm_gates_f32);
    good &= check<Bf16, Bf16, float>("lstm_bf16", table.name, table.lstm_bf16, table.lstm_gates_bf16);
    good &= check<float, int8_t, float>("lstm_i8", table.name, table.lstm_i8, table.lstm_gates_f32);
  }
  return check<double, double, double>("lstm_gates_f64", "any", nullptr, lstm_gates_f64) && good;
}

}  // namespace sp
