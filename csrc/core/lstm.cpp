#include "core/lstm.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace sp {
namespace {

// Rows of x that go through the input product at once: whole panels of the product, and its result stays in L2.
constexpr int64_t kInputRows = 64;

struct alignas(64) Line {
  unsigned char bytes[64];
};

thread_local std::vector<Line> gates_room;

class Sequence {
 public:
  Sequence(const LstmArgs& args, const LstmKernels& kernels, const Executor& executor)
      : args_(args), kernels_(kernels), executor_(executor) {
    row_bytes_ = static_cast<size_t>(args.hidden) * kernels.element_bytes;
    step_bytes_ = static_cast<size_t>(args.rows * args.hidden) * 4 * kernels.gate_bytes;
    chunk_ = std::min(args.steps, std::max<int64_t>(1, kInputRows / args.rows));
    const size_t lines = (step_bytes_ * static_cast<size_t>(chunk_) + sizeof(Line) - 1) / sizeof(Line);
    if (gates_room.size() < lines) gates_room.resize(lines);
    gates_ = reinterpret_cast<char*>(gates_room.data());
  }

  bool run() const {
    const void* h = args_.h;
    const void* c = args_.c;
    const size_t x_bytes = static_cast<size_t>(args_.rows * args_.ih.parts[0].in) * kernels_.element_bytes;
    for (int64_t done = 0; done < args_.steps; done += chunk_) {
      const int64_t count = std::min(chunk_, args_.steps - done);
      const int64_t first = args_.reverse ? args_.steps - done - count : done;
      const char* x = static_cast<const char*>(args_.x) + static_cast<size_t>(first) * x_bytes;
      if (!add_product(args_.ih, x, count * args_.rows, gates_, nullptr)) return false;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = args_.reverse ? count - 1 - i : i;
        char* gates = gates_ + static_cast<size_t>(t) * step_bytes_;
        if (!add_product(args_.hh, h, args_.rows, gates, gates)) return false;
        char* y = static_cast<char*>(args_.y) + static_cast<size_t>((first + t) * args_.rows) * row_bytes_;
        kernels_.gates(LstmStep{&args_, gates, c, args_.c_last, y});
        h = y;
        c = args_.c_last;
      }
    }
    std::memcpy(args_.h_last, h, static_cast<size_t>(args_.rows) * row_bytes_);
    if (args_.steps == 0) std::memcpy(args_.c_last, c, static_cast<size_t>(args_.rows) * row_bytes_);
    return true;
  }

 private:
  // y = weight * x + initial, which may be y or null.
  bool add_product(const LstmWeight& weight, const void* x, int64_t rows, void* y, const void* initial) const {
    for (int i = 0; i < weight.count; ++i) {
      ProductArgs product = weight.parts[i];
      product.x = x;
      product.y = y;
      product.wide_y = true;
      product.initial = initial;
      product.m = rows;
      if (!run_product(kernels_.product, product, kernels_.gate_bytes, executor_)) return false;
      initial = y;
    }
    return true;
  }

  const LstmArgs& args_;
  const LstmKernels& kernels_;
  const Executor& executor_;
  int64_t chunk_;
  size_t row_bytes_, step_bytes_;
  char* gates_;
};

}  // namespace

bool run_lstm(const LstmArgs& args, const LstmKernels& kernels, const Executor& executor) {
  return args.rows == 0 || Sequence(args, kernels, executor).run();
}

}  // namespace sp
