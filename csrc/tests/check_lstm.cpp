// The LSTM of every instruction set and type: whole sequences through both products (a weight in one part or as the sum
// of two, as of two pathways), and what follows from the gates, on buffers of exactly the promised size. Against
// float64.
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
  int64_t steps, rows, hidden, inputs;
  int64_t ih[2], hh[2];  // blocks
  bool layer_norm, in_place, reverse;
};

// Y: of x, h, c and biases. W: of the weights. Acc: of the gates.
template <typename Y, typename W, typename Acc>
class CheckLstm {
 public:
  CheckLstm(const char* what, const char* isa, ProductKernel product, Arrange arrange, LstmGatesKernel gates)
      : what_(what), isa_(isa), arrange_(arrange), kernels_{product, gates, sizeof(Y), sizeof(Acc)} {}

  // A whole sequence.
  bool sequence(const Options& options) {
    o = options;
    const Buffer<Y> x = random_buffer<Y>(o.steps * o.rows * o.inputs), h = random_buffer<Y>(o.rows * o.hidden);
    const Buffer<Y> c = random_buffer<Y>(o.rows * o.hidden);
    const Norm norm(o);
    const Parts ih(o.inputs, o.hidden, o.ih, arrange_), hh(o.hidden, o.hidden, o.hh, arrange_);
    Buffer<Y> y(static_cast<size_t>(o.steps * o.rows * o.hidden)), h_last(h.size), c_last(h.size);
    LstmArgs args = norm.args(o);
    args.ih = ih.weight, args.hh = hh.weight;
    args.x = x.data.get(), args.h = h.data.get(), args.c = c.data.get();
    args.y = y.data.get(), args.h_last = h_last.data.get(), args.c_last = c_last.data.get();
    args.steps = o.steps, args.reverse = o.reverse;
    if (!run_lstm(args, kernels_, Executor{1, nullptr})) return false;
    if (o.rows > 0) plant(x, c_last);
    for (int64_t row = 0; row < o.rows; ++row) {
      const auto at = [&](int64_t i) { return static_cast<size_t>(row * o.hidden + i); };
      Row before, state;
      for (int64_t i = 0; i < o.hidden; ++i) state.push_back({get(c[at(i)]), 0});
      for (int64_t i = 0; i < o.hidden; ++i) before.push_back({get(h[at(i)]), 0});
      for (int64_t step = 0; step < o.steps; ++step) {
        const int64_t t = o.reverse ? o.steps - 1 - step : step;
        Row gates;
        for (int64_t n = 0; n < 4 * o.hidden; ++n) {
          Near sum{0, 0};
          ih.add(sum, n, [&](int64_t k) { return get(x[static_cast<size_t>((t * o.rows + row) * o.inputs + k)]); });
          hh.add(sum, n, [&](int64_t k) { return before[static_cast<size_t>(k)].exact; });
          gates.push_back(sum);
        }
        const Row out = finish(gates, state, norm);
        for (int64_t i = 0; i < o.hidden; ++i) {
          const double got = get(y[static_cast<size_t>((t * o.rows + row) * o.hidden + i)]);
          if (!right("y", row, i, got, out[static_cast<size_t>(i)])) return false;
          before[static_cast<size_t>(i)].exact = got;  // the next step begins from what this one gave
        }
      }
      for (int64_t i = 0; i < o.hidden; ++i) {
        if (!right("c", row, i, get(c_last[at(i)]), state[static_cast<size_t>(i)])) return false;
        if (!right("h", row, i, get(h_last[at(i)]), before[static_cast<size_t>(i)])) return false;
      }
    }
    return ++sequences > 0;
  }

  // The gates kernel alone.
  bool gates(const Options& options) {
    o = options;
    Buffer<Acc> gates(static_cast<size_t>(o.rows * 4 * o.hidden));
    Buffer<Y> c = random_buffer<Y>(o.rows * o.hidden), c_next(c.size), h_next(c.size);
    const Norm norm(o);
    const LstmArgs args = norm.args(o);
    std::vector<Row> sums(static_cast<size_t>(o.rows)), states(sums.size());
    for (int64_t i = 0; i < o.rows * 4 * o.hidden; ++i) {
      put(&gates[static_cast<size_t>(i)], 3 * uniform());
      sums[static_cast<size_t>(i / (4 * o.hidden))].push_back({get(gates[static_cast<size_t>(i)]), 0});
    }
    for (size_t i = 0; i < c.size; ++i) states[i / static_cast<size_t>(o.hidden)].push_back({get(c[i]), 0});
    Y* next = o.in_place ? c.data.get() : c_next.data.get();
    kernels_.gates(LstmStep{&args, gates.data.get(), c.data.get(), next, h_next.data.get()});
    plant(gates, h_next);
    for (int64_t row = 0; row < o.rows; ++row) {
      Row& state = states[static_cast<size_t>(row)];
      const Row out = finish(sums[static_cast<size_t>(row)], state, norm);
      for (int64_t i = 0; i < o.hidden; ++i) {
        const int64_t at = row * o.hidden + i;
        if (!right("c", row, i, get(next[at]), state[static_cast<size_t>(i)])) return false;
        if (!right("h", row, i, get(h_next[static_cast<size_t>(at)]), out[static_cast<size_t>(i)])) return false;
      }
    }
    return ++sequences > 0;
  }

  int64_t sequences = 0;

 private:
  static constexpr double kUnit = sizeof(Acc) == 8 ? 2 * kDouble : kSingle;  // the answer rounds, too
  static constexpr double kOwn = sizeof(Acc) == 8 ? 1e-13 : 2e-6;            // of exp, tanh and a layer norm's sums
  static constexpr double kStore = sizeof(Y) == 2 ? 1.0 / 256 : kUnit;       // rounding to Y

  static double stored(const Near& v) { return kStore * (fabs(v.exact) + v.bound); }

  // A weight [4H, in] of one part or two, with scales and a bias where it has them.
  struct Parts {
    Parts(int64_t in, int64_t hidden, const int64_t* block, Arrange arrange)
        : in_(in), has_bias_(rng() % 2), bias_(random_buffer<Y>(4 * hidden)) {
      const Shape shape{0, 4 * hidden, in, block[0], block[1]};
      for (weight.count = 0; weight.count < 1 + static_cast<int>(rng() % 2); ++weight.count) {
        blocks_.emplace_back(shape, 0.7, Form{rng() % 2 == 0, rng() % 2 == 0, false});
        const Weight<W>& blocks = blocks_.back();
        scales_.emplace_back(sizeof(W) == 1 ? static_cast<size_t>(blocks.lists * block[0]) : 0);
        for (size_t i = 0; i < scales_.back().size; ++i) {
          put(&scales_.back()[i], 0.01 + 0.01 * fabs(uniform()));
        }
        ProductArgs& args = weight.parts[weight.count];
        blocks.describe(args);
        args.values = blocks.values.data.get();
        args.in = in, args.out = 4 * hidden, args.r = block[0], args.c = block[1], args.lists = blocks.lists;
        args.scale = sizeof(W) == 1 ? scales_.back().data.get() : nullptr;
        args.quantise_x = sizeof(W) == 1 && rng() % 2;
        arranged_.emplace_back(arrange != nullptr && rng() % 2 ? arrange(args, nullptr) : 0);
        if (arranged_.back().size > 0) {
          arrange(args, arranged_.back().data.get());
          args.arranged = arranged_.back().data.get();
        }
      }
      if (has_bias_) weight.parts[weight.count - 1].bias = bias_.data.get();
    }

    // Adds gate n of what `input` gives to a sum, whose bound grows by the roundings of the products.
    template <typename Input>
    void add(Near& sum, int64_t n, const Input& input) const {
      for (size_t part = 0; part < blocks_.size(); ++part) {
        double exact = 0, magnitude = 0, peak = 0, weights = 0;
        for (int64_t k = 0; k < in_; ++k) {
          const double w = blocks_[part].dense[static_cast<size_t>(n * in_ + k)], x = input(k);
          exact += w * x, magnitude += fabs(w * x), weights += fabs(w), peak = std::max(peak, fabs(x));
        }
        const double factor = sizeof(W) == 1 ? get(scales_[part][static_cast<size_t>(n)]) : 1;
        sum.exact += exact * factor;
        sum.bound += static_cast<double>(in_ + 8) * 2 * kUnit * (magnitude * factor + fabs(sum.exact));
        if (weight.parts[part].quantise_x) sum.bound += peak / 254 * weights * factor;
      }
      if (!has_bias_) return;
      sum.exact += get(bias_[static_cast<size_t>(n)]);
      sum.bound += 4 * kUnit * (fabs(sum.exact) + 1);
    }

    LstmWeight weight{};

   private:
    int64_t in_;
    bool has_bias_;
    Buffer<Y> bias_;
    std::vector<Weight<W>> blocks_;
    std::vector<Buffer<float>> scales_;
    std::vector<Buffer<char>> arranged_;
  };

  struct Norm {
    explicit Norm(const Options& o)
        : g_weight(random_buffer<Y>(4 * o.hidden)),
          g_bias(random_buffer<Y>(4 * o.hidden)),
          c_weight(random_buffer<Y>(o.hidden)),
          c_bias(random_buffer<Y>(o.hidden)) {}

    LstmArgs args(const Options& o) const {
      LstmArgs args{};
      args.rows = o.rows, args.hidden = o.hidden;
      args.g_eps = args.c_eps = kEps;
      if (o.layer_norm) {
        args.g_weight = g_weight.data.get(), args.g_bias = g_bias.data.get();
        args.c_weight = c_weight.data.get(), args.c_bias = c_bias.data.get();
      }
      return args;
    }

    Buffer<Y> g_weight, g_bias, c_weight, c_bias;
  };
  static constexpr float kEps = 1e-3f;

  // From the sums of one row on: the output; `state` becomes the next one.
  Row finish(Row& gate, Row& state, const Norm& norm) const {
    if (o.layer_norm) normalise(gate, norm.g_weight, norm.g_bias, kEps, kOwn);
    const auto of = [&](int64_t g, int64_t i) -> const Near& { return gate[static_cast<size_t>(g * o.hidden + i)]; };
    for (int64_t i = 0; i < o.hidden; ++i) {
      Near& v = state[static_cast<size_t>(i)];
      const Near kept = product(sigmoid(of(1, i), kOwn), v);
      const Near added = product(sigmoid(of(0, i), kOwn), tanh(of(2, i), kOwn));
      v = {kept.exact + added.exact, kept.bound + added.bound};
      v.bound += stored(v) + 4 * kUnit * (fabs(kept.exact) + fabs(added.exact));
    }
    if (o.layer_norm) normalise(state, norm.c_weight, norm.c_bias, kEps, kOwn + kStore);
    Row out;
    for (int64_t i = 0; i < o.hidden; ++i) {
      Near v = product(sigmoid(of(3, i), kOwn), tanh(state[static_cast<size_t>(i)], kOwn));
      v.bound += stored(v) + 4 * kUnit;
      out.push_back(v);
    }
    return out;
  }

  bool right(const char* which, int64_t row, int64_t i, double got, const Near& want) const {
    if (fabs(got - want.exact) <= want.bound) return true;
    fprintf(stderr, "%s %s steps=%ld rows=%ld H=%ld E=%ld blocks %ldx%ld %ldx%ld layer norm %d: ", isa_, what_, o.steps,
            o.rows, o.hidden, o.inputs, o.ih[0], o.ih[1], o.hh[0], o.hh[1], o.layer_norm);
    fprintf(stderr, "%s[%ld, %ld] = %.9g, want %.9g +- %.2g\n", which, row, i, got, want.exact, want.bound);
    return false;
  }

  const char* what_;
  const char* isa_;
  Arrange arrange_;
  LstmKernels kernels_;
  Options o{};
};

template <typename Y, typename W, typename Acc>
bool check(const char* what, const char* isa, ProductKernel product, Arrange arrange, LstmGatesKernel gates) {
  if (product == nullptr || gates == nullptr) {
    printf("%-10s %-17s none\n", isa, what);
    return true;
  }
  CheckLstm<Y, W, Acc> one(what, isa, product, arrange, gates);
  const auto some = [&](int64_t rows, int64_t hidden, int64_t inputs) {
    Options o{below(4), rows, hidden, inputs, {}, {}, rng() % 2 == 0, rng() % 2 == 0, rng() % 2 == 0};
    std::copy_n(kBlocks[below(std::size(kBlocks))], 2, o.ih);
    std::copy_n(kBlocks[below(std::size(kBlocks))], 2, o.hh);
    return o;
  };
  bool good = true;
  for (const int64_t rows : {0, 1, 2, 3, 4, 5, 7, 8, 9, 17}) {
    for (const int64_t hidden : {1, 7, 8, 15, 16, 17, 40}) {
      for (const int64_t inputs : {1, 8, 37}) {
        for (int turn = 0; turn < 4; ++turn) good = good && one.sequence(some(rows, hidden, inputs));
      }
      for (int turn = 0; turn < 4 && rows > 0; ++turn) good = good && one.gates(some(rows, hidden, 0));
    }
  }
  printf("%-10s %-17s %ld sequences %s\n", isa, what, one.sequences, good ? "good" : "WRONG");
  fflush(stdout);
  return good;
}

}  // namespace

bool check_lstm() {
  bool good = true;
  for (int level = 0; level <= max_isa(); ++level) {
    set_isa(level);
    const KernelTable& t = kernels();
    good &= check<float, float, float>("lstm_f32", t.name, t.linear_f32, nullptr, t.lstm_gates_f32);
    good &= check<Bf16, Bf16, float>("lstm_bf16", t.name, t.linear_bf16, t.arrange_bf16, t.lstm_gates_bf16);
    good &= check<float, int8_t, float>("lstm_i8", t.name, t.linear_i8, t.arrange_i8, t.lstm_gates_f32);
  }
  return check<double, double, double>("lstm_f64", "any", linear_f64, nullptr, lstm_gates_f64) && good;
}

}  // namespace sp
