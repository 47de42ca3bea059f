// The CUDA kernels, compiled as host C++ under csrc/emulation, against float64.
//
// prove_cuda [pack|linear|lists|lstm]... [--quick]   exit status 1 if a result is wrong or the emulator found a fault
// prove_cuda --counts                                what the emulator counts per block, as JSON, for the roofline
// model
#include "tests/cuda/prove.h"

namespace sp::prove {

Weight::Weight(int n, int k, int r, int c, double density, Dtype dtype, bool narrow, bool indirect, bool dense_source,
               bool edges)
    : n(n), k(k), r(r), c(c), rows((n + r - 1) / r), columns((k + c - 1) / c), narrow(narrow), dtype(dtype) {
  mask.resize(static_cast<size_t>(rows) * columns);
  edges &= density > 0 && density < 1;
  for (int b = 0; b < rows; ++b) {
    for (int j = 0; j < columns; ++j) {
      const bool kept = uniform() < 2 * density - 1;
      mask[static_cast<size_t>(b * columns + j)] = edges ? b == rows - 1 || (b > 0 && j != 1 && kept) : kept;
    }
  }
  dense.assign(static_cast<size_t>(n) * k, 0.0);
  std::vector<int32_t> starts{0}, places;
  std::vector<int32_t> cols;
  for (int b = 0; b < rows; ++b) {
    for (int j = 0; j < columns; ++j) {
      if (mask[static_cast<size_t>(b * columns + j)] == 0) continue;
      cols.push_back(j);
      places.push_back(static_cast<int32_t>(places.size()) + indirect);
    }
    starts.push_back(static_cast<int32_t>(cols.size()));
  }
  crow = std::make_unique<Buffer<int32_t>>(starts, "crow", Access::kRead);
  col = std::make_unique<Buffer<uint8_t>>(cols.size() * (narrow ? 2 : 4), "col", Access::kRead);
  for (size_t i = 0; i < cols.size(); ++i) memcpy(*col + i * (narrow ? 2 : 4), &cols[i], narrow ? 2 : 4);
  if (indirect) pos = std::make_unique<Buffer<int32_t>>(places, "pos", Access::kRead);
  const size_t size = static_cast<size_t>(r) * c;
  if (dense_source) {
    weight = std::make_unique<Tensor>(dtype, static_cast<size_t>(n) * k, "weight", Access::kRead);
    for (size_t i = 0; i < weight->count; ++i) weight->set(i, kNan);
  } else {
    blocks = std::make_unique<Tensor>(dtype, (cols.size() + 2 * indirect) * size, "blocks", Access::kRead);
    for (size_t i = 0; i < blocks->count; ++i) blocks->set(i, indirect ? kNan : 0.0);
  }
  size_t entry = 0;
  for (int b = 0; b < rows; ++b) {
    for (int j = 0; j < columns; ++j) {
      if (mask[static_cast<size_t>(b * columns + j)] == 0) continue;
      const size_t block = (entry++ + indirect) * size;
      for (int q = 0; q < c; ++q) {
        for (int p = 0; p < r; ++p) {
          const int row = b * r + p, column = j * c + q;
          const bool inside = row < n && column < k;
          const size_t at = static_cast<size_t>(row) * k + column;
          if (!dense_source) {
            const size_t i = block + static_cast<size_t>(q) * r + p;
            blocks->set(i, inside ? uniform() : 0.0);
            if (inside) dense[at] = blocks->get(i);
          } else if (inside) {
            dense[at] = weight->fill(at);
          }
        }
      }
    }
  }
}

Packed::Packed(Weight& w, int p, int capacity) {
  cuda::PackArgs args{};
  args.crow = *w.crow;
  args.col = *w.col;
  args.pos = w.pos ? static_cast<int32_t*>(*w.pos) : nullptr;
  args.blocks = w.blocks ? w.blocks->data() : nullptr;
  args.weight = w.weight ? w.weight->data() : nullptr;
  args.stride = w.k;
  args.n = w.n, args.k = w.k, args.r = w.r, args.c = w.c, args.p = p;
  args.narrow = w.narrow;
  args.dtype = w.dtype;
  args.strips = (w.n + p - 1) / p;
  args.chunks = (w.k + cuda::kChunk - 1) / cuda::kChunk;
  const size_t lists = static_cast<size_t>(args.strips) * static_cast<size_t>(args.chunks);
  begin = std::make_unique<Buffer<int32_t>>(lists + 1, "begin", Access::kWrite);
  Buffer<int32_t> state(1, "state", Access::kWrite);
  args.begin = *begin;
  args.state = state;
  args.capacity = capacity >= 0 ? capacity : std::numeric_limits<int>::max();
  const char* error = cuda::pack_count(args, nullptr);
  needed = state[0];
  if (capacity < 0) capacity = needed;
  args.capacity = capacity;
  ids = std::make_unique<Buffer<uint16_t>>(static_cast<size_t>(capacity) * 8, "ids", Access::kWrite);
  values = std::make_unique<Buffer<uint8_t>>(static_cast<size_t>(capacity) * 8 * p * cuda::size_of(w.dtype), "values",
                                             Access::kWrite);
  args.ids = *ids;
  args.values = *values;
  if (error == nullptr) error = cuda::pack_fill(args, nullptr);
  if (error != nullptr) fprintf(stderr, "pack: %s\n", error), exit(1);
  strips = {static_cast<uint8_t*>(*values), *ids, *begin, w.n, w.k, p, args.strips, args.chunks};
}

bool report(const std::string& name, const char* error, const std::string& wrong) {
  const std::vector<std::string> faults = emulation::take_faults();
  const bool passed = error == nullptr && wrong.empty() && faults.empty();
  printf("%s %s\n", passed ? "ok  " : "FAIL", name.c_str());
  if (error != nullptr) printf("     %s\n", error);
  if (!wrong.empty()) printf("     %s\n", wrong.c_str());
  fflush(stdout);
  emulation::watch_nothing();
  return passed;
}

std::string compare(Tensor& got, const std::vector<double>& want, const std::vector<double>& bound, int columns,
                    const char* name) {
  for (size_t i = 0; i < want.size(); ++i) {
    const double value = got.get(i);
    const bool fits = std::isfinite(want[i]) ? fabs(value - want[i]) <= bound[i] : !std::isfinite(value);
    if (fits) continue;
    char text[160];
    snprintf(text, sizeof text, "%s[%zu, %zu] = %.9g; want %.9g +- %.2g", name, i / static_cast<size_t>(columns),
             i % static_cast<size_t>(columns), value, want[i], bound[i]);
    return text;
  }
  return "";
}

}  // namespace sp::prove

int main(int argc, char** argv) {
  using namespace sp::prove;
  std::vector<std::string> what;
  bool quick = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--counts") return print_counts(), 0;
    if (argument == "--quick") {
      quick = true;
    } else {
      what.push_back(argument);
    }
  }
  if (what.empty()) what = {"pack", "linear", "lists", "lstm"};
  bool passed = true;
  for (const std::string& one : what) {
    if (one == "pack") passed &= prove_pack(quick);
    if (one == "linear") passed &= prove_linear(quick);
    if (one == "lists") passed &= prove_lists(quick);
    if (one == "lstm") passed &= prove_lstm(quick);
  }
  puts(passed ? "proved" : "NOT proved");
  return passed ? 0 : 1;
}
