// strips_lstm_step: one step, plain and normalised, with x or with its product given.
#include "tests/cuda/prove.h"

namespace sp::prove {
namespace {

struct Case {
  int rows, width, hidden;
  Dtype dtype;
  bool norm, input, bias;
  double density;
  int r;          // block height of both weights
  int shift = 0;  // elements by which what it reads begins behind an aligned address
};

double sigmoid(double v) { return 1 / (1 + exp(-v)); }

// (v - mean) / deviation * weight + bias, in place; returns 1 / deviation.
double normalise(std::vector<double>& v, Tensor& weight, Tensor& bias, double eps) {
  double mean = 0, square = 0;
  for (double one : v) mean += one / static_cast<double>(v.size());
  for (double one : v) square += (one - mean) * (one - mean) / static_cast<double>(v.size());
  const double scale = 1 / sqrt(square + eps);
  for (size_t i = 0; i < v.size(); ++i) v[i] = (v[i] - mean) * scale * weight.get(i) + bias.get(i);
  return scale;
}

bool check(const Case& one) {
  const int gates = 4 * one.hidden;
  Weight ih(gates, one.width, one.r, 1, one.density, one.dtype, true, false);
  Weight hh(gates, one.hidden, one.r, 1, one.density, one.dtype, true, true);
  Packed packed_ih(ih, 8), packed_hh(hh, 8);
  const auto random = [&](int count, const char* name) {
    auto tensor = std::make_unique<Tensor>(one.dtype, static_cast<size_t>(count), name, Access::kRead,
                                           static_cast<size_t>(one.shift));
    for (size_t i = 0; i < tensor->count; ++i) tensor->fill(i);
    return tensor;
  };
  const auto x = random(one.rows * one.width, "x"), input = random(one.rows * gates, "input");
  const auto h = random(one.rows * one.hidden, "h"), c = random(one.rows * one.hidden, "c");
  const auto bias_ih = random(gates, "bias_ih"), bias_hh = random(gates, "bias_hh");
  const auto g_weight = random(gates, "g_weight"), g_bias = random(gates, "g_bias");
  const auto c_weight = random(one.hidden, "c_weight"), c_bias = random(one.hidden, "c_bias");
  const size_t states = static_cast<size_t>(one.rows) * one.hidden;
  Tensor h_next(one.dtype, states, "h_next", Access::kWrite), c_next(one.dtype, states, "c_next", Access::kWrite);
  Buffer<float> scratch(one.norm ? static_cast<size_t>(one.rows) * gates : 0, "gates", Access::kWrite);
  Buffer<int32_t> tickets(static_cast<size_t>(one.rows + 15) / 16, "tickets", Access::kWrite);
  std::fill_n(static_cast<int32_t*>(tickets), tickets.size, 0);
  cuda::LstmStepArgs args{};
  args.ih = packed_ih.strips;
  args.hh = packed_hh.strips;
  args.x = one.input ? nullptr : x->data();
  args.input = one.input ? input->data() : nullptr;
  args.h = h->data();
  args.c = c->data();
  args.bias_ih = one.bias && !one.input ? bias_ih->data() : nullptr;
  args.bias_hh = one.bias ? bias_hh->data() : nullptr;
  args.h_next = h_next.data();
  args.c_next = c_next.data();
  args.g_weight = one.norm ? g_weight->data() : nullptr;
  args.g_bias = g_bias->data();
  args.c_weight = c_weight->data();
  args.c_bias = c_bias->data();
  args.g_eps = args.c_eps = 1e-3f;
  args.rows = one.rows;
  args.hidden = one.hidden;
  args.gates = scratch;
  args.tickets = tickets;
  const char* error = cuda::lstm_step(args, one.dtype, nullptr);

  std::vector<double> want_h(states), want_c(states), bound_h(states), bound_c(states);
  for (int m = 0; m < one.rows; ++m) {
    std::vector<double> v(static_cast<size_t>(gates));
    double largest = 1;
    for (int n = 0; n < gates; ++n) {
      double sum = (args.bias_ih != nullptr ? bias_ih->get(static_cast<size_t>(n)) : 0) +
                   (args.bias_hh != nullptr ? bias_hh->get(static_cast<size_t>(n)) : 0);
      double magnitude = fabs(sum);
      const auto product = [&](const Weight& w, Tensor& from) {
        for (int k = 0; k < w.k; ++k) {
          const double term = w.dense[static_cast<size_t>(n) * w.k + k] *
                              from.get(static_cast<size_t>(m) * w.k + static_cast<size_t>(k));
          sum += term;
          magnitude += fabs(term);
        }
      };
      if (one.input) {
        sum += input->get(static_cast<size_t>(m) * gates + static_cast<size_t>(n));
      } else {
        product(ih, *x);
      }
      product(hh, *h);
      v[static_cast<size_t>(n)] = sum;
      largest = std::max(largest, magnitude);
    }
    // Error of a gate before its activation, whose slope is at most 1; the old cell is at most 1.
    double error_gate = largest * ((one.width + one.hidden) * 0x1p-24 + (one.dtype == Dtype::kFloat ? 0x1p-20 : 0));
    if (one.norm) error_gate = 4 * error_gate * normalise(v, *g_weight, *g_bias, args.g_eps) + 2e-6;
    std::vector<double> cells(static_cast<size_t>(one.hidden));
    for (int u = 0; u < one.hidden; ++u) {
      const auto gate = [&](int g) { return v[static_cast<size_t>(g * one.hidden + u)]; };
      cells[static_cast<size_t>(u)] =
          sigmoid(gate(1)) * c->get(static_cast<size_t>(m * one.hidden + u)) + sigmoid(gate(0)) * tanh(gate(2));
    }
    double error_cell = 3 * error_gate + 2e-6;
    if (one.norm) error_cell = 4 * error_cell * normalise(cells, *c_weight, *c_bias, args.c_eps) + 2e-6;
    for (int u = 0; u < one.hidden; ++u) {
      const size_t i = static_cast<size_t>(m * one.hidden + u);
      want_c[i] = cells[static_cast<size_t>(u)];
      want_h[i] = sigmoid(v[static_cast<size_t>(3 * one.hidden + u)]) * tanh(want_c[i]);
      bound_c[i] = error_cell + fabs(want_c[i]) * epsilon(one.dtype);
      bound_h[i] = error_cell + error_gate + 2e-6 + fabs(want_h[i]) * epsilon(one.dtype);
    }
  }
  std::string wrong = compare(c_next, want_c, bound_c, one.hidden, "c");
  if (wrong.empty()) wrong = compare(h_next, want_h, bound_h, one.hidden, "h");
  for (size_t i = 0; i < tickets.size; ++i) wrong = tickets[i] == 0 ? wrong : "tickets are not back at zero";
  char name[160];
  snprintf(name, sizeof name, "lstm %s rows %d E%d H%d %dx1 density %.2f%s%s%s%s",
           one.dtype == Dtype::kFloat  ? "f32"
           : one.dtype == Dtype::kHalf ? "f16"
                                       : "bf16",
           one.rows, one.width, one.hidden, one.r, one.density, one.norm ? " norm" : "", one.input ? " input" : "",
           one.bias ? " bias" : "", one.shift > 0 ? " misaligned" : "");
  return report(name, error, wrong);
}

}  // namespace

bool prove_lstm(bool quick) {
  constexpr Dtype kBf16 = Dtype::kBf16, kHalf = Dtype::kHalf, kFloat = Dtype::kFloat;
  std::vector<Case> cases = {
      {1, 24, 16, kBf16, false, false, true, .75, 8},    {3, 17, 40, kHalf, true, false, true, .75, 8},
      {18, 40, 24, kFloat, true, true, true, .75, 8},    {17, 9, 16, kBf16, false, true, false, .75, 8},
      {16, 30, 32, kHalf, false, false, true, 1.0, 8},   {2, 30, 16, kBf16, true, false, false, 0.0, 8},
      {3, 24, 16, kBf16, false, false, true, .75, 8, 1},
  };
  if (!quick) {
    for (Dtype dtype : {kBf16, kHalf, kFloat}) {
      for (bool norm : {false, true}) {
        cases.push_back({4, 520, 64, dtype, norm, false, true, .7, 16});
        cases.push_back({33, 64, 72, dtype, norm, false, false, .8, 8});
        cases.push_back({5, 16, 528, dtype, norm, true, true, .6, 8});
      }
    }
  }
  bool passed = true;
  for (const Case& one : cases) passed &= check(one);
  return passed;
}

}  // namespace sp::prove
