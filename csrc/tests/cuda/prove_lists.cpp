// mask_lists: the lists of several layers of one launch against their definition, over masks that change.
#include "tests/cuda/prove.h"

namespace sp::prove {
namespace {

struct Layer {
  Layer(int rows, int cols, int capacity)
      : rows(rows),
        cols(cols),
        capacity(capacity),
        mask(size(rows, cols), "mask", Access::kRead),
        bits((size(rows, cols) + 7) / 8, "bits", Access::kWrite),
        crow(static_cast<size_t>(rows) + 1, "crow", Access::kWrite),
        crow_t(static_cast<size_t>(cols) + 1, "crow_t", Access::kWrite),
        pos_t(static_cast<size_t>(capacity), "pos_t", Access::kWrite),
        state(cuda::kListsState, "state", Access::kWrite),
        work(static_cast<size_t>(cuda::lists_work(rows, cols)), "work", Access::kWrite),
        col(ids(cols), "col", Access::kWrite),
        row(ids(rows), "row", Access::kWrite),
        row_t(ids(rows), "row_t", Access::kWrite) {
    std::fill_n(static_cast<int32_t*>(state), state.size, 0);
    std::fill_n(static_cast<int32_t*>(work), work.size, 0);
  }
  static size_t size(int rows, int cols) { return static_cast<size_t>(rows) * static_cast<size_t>(cols); }
  size_t ids(int count) const { return static_cast<size_t>(capacity) * (count <= 1 << 16 ? 2 : 4); }
  static int id(const uint8_t* from, int i, int count) {
    if (count <= 1 << 16) return reinterpret_cast<const uint16_t*>(from)[i];
    return reinterpret_cast<const int32_t*>(from)[i];
  }

  cuda::ListsLayer view() {
    return {mask,
            rows,
            cols,
            capacity,
            bits,
            crow,
            static_cast<uint8_t*>(col),
            static_cast<uint8_t*>(row),
            crow_t,
            static_cast<uint8_t*>(row_t),
            pos_t,
            state,
            work};
  }

  std::string check(int epoch) {
    int blocks = 0;
    for (size_t i = 0; i < mask.size; ++i) {
      blocks += mask[i];
      if ((bits[i / 8] >> i % 8 & 1) != mask[i]) return "bits are wrong";
    }
    const bool fits = blocks <= capacity;
    if (state[cuda::kNnz] != blocks || state[cuda::kOverflow] != !fits) return "state is wrong";
    if (state[cuda::kEpoch] != epoch) return "epoch is wrong";
    if (work[0] != 0 || work[1] != 0) return "tickets are not back at zero";
    int entry = 0;
    std::vector<int> place(mask.size, -1);
    for (int r = 0; r < rows; ++r) {
      if (crow[static_cast<size_t>(r)] != (fits ? entry : 0)) return "crow is wrong";
      for (int c = 0; c < cols; ++c) {
        const size_t i = static_cast<size_t>(r) * static_cast<size_t>(cols) + static_cast<size_t>(c);
        if (mask[i] == 0) continue;
        if (fits && (id(col, entry, cols) != c || id(row, entry, rows) != r)) return "col or row is wrong";
        place[i] = entry++;
      }
    }
    if (crow[static_cast<size_t>(rows)] != (fits ? entry : 0)) return "the end of crow is wrong";
    entry = 0;
    for (int c = 0; c < cols; ++c) {
      if (crow_t[static_cast<size_t>(c)] != (fits ? entry : 0)) return "crow_t is wrong";
      for (int r = 0; r < rows; ++r) {
        const size_t i = static_cast<size_t>(r) * static_cast<size_t>(cols) + static_cast<size_t>(c);
        if (mask[i] == 0) continue;
        if (fits && id(row_t, entry, rows) != r) return "row_t is wrong";
        if (fits && pos_t[static_cast<size_t>(entry)] != place[i]) return "pos_t is wrong";
        ++entry;
      }
    }
    return crow_t[static_cast<size_t>(cols)] == (fits ? entry : 0) ? "" : "the end of crow_t is wrong";
  }

  int rows, cols, capacity;
  Buffer<uint8_t> mask, bits;
  Buffer<int32_t> crow, crow_t, pos_t, state, work;
  Buffer<uint8_t> col, row, row_t;
};

struct Size {
  int rows, cols, capacity;
};

bool check(const std::string& name, const std::vector<Size>& sizes, const std::vector<double>& densities) {
  std::vector<std::unique_ptr<Layer>> layers;
  std::vector<cuda::ListsLayer> views;
  std::vector<int32_t> first{0};
  for (const Size& size : sizes) {
    layers.push_back(std::make_unique<Layer>(size.rows, size.cols, size.capacity));
    views.push_back(layers.back()->view());
    first.push_back(first.back() + cuda::lists_jobs(size.rows, size.cols));
  }
  Buffer<cuda::ListsLayer> table(views, "layers", Access::kRead);
  Buffer<int32_t> starts(first, "first", Access::kRead), ticket(2, "ticket", Access::kWrite);
  ticket[0] = ticket[1] = 0;
  std::string wrong;
  const char* error = nullptr;
  int epoch = 0;
  for (const double density : densities) {
    for (const auto& layer : layers) {
      for (size_t i = 0; i < layer->mask.size; ++i) layer->mask[i] = uniform() < 2 * density - 1;
    }
    error = cuda::build_lists({table, starts, ticket, static_cast<int>(layers.size())}, first.back(), nullptr);
    ++epoch;
    for (const auto& layer : layers) {
      const std::string found = layer->check(epoch);
      if (found.empty() || !wrong.empty()) continue;
      wrong = found + ": " + std::to_string(layer->rows) + " x " + std::to_string(layer->cols) + ", build " +
              std::to_string(epoch);
    }
  }
  return report("lists " + name, error, wrong);
}

}  // namespace

bool prove_lists(bool quick) {
  // 9 x 33 has room for 150 blocks: it overflows while the mask is dense, and recovers.
  const std::vector<Size> small = {{32, 64, 32 * 64}, {13, 70, 13 * 70}, {1, 1, 1}, {9, 33, 150}, {3, 0, 0}, {0, 5, 0}};
  bool passed = check("of six layers, built four times", small, {0.3, 0.0, 1.0, 0.6});
  if (quick) return passed;
  passed &= check("of a layer with many stripes", {{300, 129, 300 * 129}}, {0.7, 0.4});
  return check("of a layer with ids of 32 bits", {{1, 65570, 65570}}, {0.6}) && passed;
}

}  // namespace sp::prove
