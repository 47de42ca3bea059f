#include "core/lstm.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace sp {
namespace {

// Rows of x that go through the input product at once: whole panels of the product, and its result stays in L2.
constexpr int64_t kInputRows = 64;

// Cost of eight units besides their blocks (loop starts, activations, stores), in blocks.
constexpr int64_t kUnitsCost = 64;

struct alignas(64) Line {
  unsigned char bytes[64];
};

void* reserve(std::vector<Line>& room, size_t bytes) {
  if (room.size() * sizeof(Line) < bytes) room.resize((bytes + sizeof(Line) - 1) / sizeof(Line));
  return room.data();
}

thread_local std::vector<Line> kernel_scratch, input_scratch, sums_scratch;

// The step kernel serves this: eight units lie within one block row of each gate.
bool fused(const LstmArgs& args, const LstmKernels& kernels) {
  return kernels.step != nullptr && args.rows <= kFusedRows && args.hidden % 8 == 0 && args.ih.r % 8 == 0 &&
         args.hh.r % 8 == 0 && args.ih.narrow && args.hh.narrow;
}

// Blocks of the first `units` groups of eight units.
int64_t blocks_before(const LstmArgs& args, const ProductArgs& weight, int64_t units) {
  int64_t sum = 0;
  for (int64_t gate = 0; gate < 4; ++gate) {
    const int64_t first = gate * args.hidden;
    sum += weight.begin[(first + 8 * units) / weight.r] - weight.begin[first / weight.r];
  }
  return sum;
}

struct Share {
  const LstmArgs* args;
  LstmStepKernel kernel;
  LstmStep step;
  int64_t shares;

  int64_t cost(int64_t units) const {
    const int64_t input = step.x == nullptr ? 0 : blocks_before(*args, args->ih, units);
    return input + blocks_before(*args, args->hh, units) + kUnitsCost * units;
  }

  int64_t begin(int64_t index) const {
    const int64_t groups = args->hidden / 8;
    if (index == 0) return 0;
    if (index == shares) return groups;
    const int64_t target = cost(groups) / shares * index;
    int64_t low = 0, high = groups;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cost(middle) < target) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  static void run(void* context, int64_t index) {
    const Share& share = *static_cast<Share*>(context);
    const int64_t u0 = share.begin(index), u1 = share.begin(index + 1);
    if (u0 < u1) share.kernel(share.step, u0, u1, reserve(kernel_scratch, lstm_scratch_bytes(*share.args)));
  }
};

double work(const ProductArgs& args, int64_t rows) {
  return static_cast<double>(args.begin[args.lists]) * static_cast<double>(args.r * args.c) *
         static_cast<double>(std::max<int64_t>(rows, 2));
}

class Sequence {
 public:
  Sequence(const LstmArgs& args, const LstmKernels& kernels, const Executor& executor)
      : args_(args), kernels_(kernels), executor_(executor), fused_(fused(args, kernels)) {
    row_bytes_ = static_cast<size_t>(args.hidden) * kernels.element_bytes;
    x_bytes_ = static_cast<size_t>(args.ih.in) * kernels.element_bytes;
    whole_input_ = kernels.product != nullptr && (args.steps > 1 || !fused_);
    chunk_ = whole_input_ ? std::max<int64_t>(1, kInputRows / args.rows) : 1;
    if (!fused_ || args.g_weight != nullptr) sums_ = reserve(sums_scratch, sums_bytes());
    input_ = whole_input_ ? reserve(input_scratch, sums_bytes() * std::min(chunk_, args.steps)) : nullptr;
  }

  bool run() {
    const void* h = args_.h;
    const void* c = args_.c;
    for (int64_t done = 0; done < args_.steps; done += chunk_) {
      const int64_t count = std::min(chunk_, args_.steps - done);
      const int64_t first = args_.reverse ? args_.steps - done - count : done;
      if (whole_input_ && !input_product(first, count)) return false;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = args_.reverse ? first + count - 1 - i : first + i;
        char* y = static_cast<char*>(args_.y) + t * args_.rows * row_bytes_;
        if (!one(t, t - first, h, c, y)) return false;
        h = y;
        c = args_.c_last;
      }
    }
    std::memcpy(args_.h_last, h, args_.rows * row_bytes_);
    if (args_.steps == 0) std::memcpy(args_.c_last, c, args_.rows * row_bytes_);
    return true;
  }

 private:
  size_t sums_bytes() const { return 4 * row_bytes_ * static_cast<size_t>(args_.rows); }

  bool input_product(int64_t first, int64_t count) const {
    ProductArgs product = args_.ih;
    product.x = static_cast<const char*>(args_.x) + first * args_.rows * x_bytes_;
    product.y = input_;
    product.m = count * args_.rows;
    return run_product(kernels_.product, product, kernels_.accumulator_bytes, executor_);
  }

  // Time step t, number `place` of the input products at hand.
  bool one(int64_t t, int64_t place, const void* h, const void* c, void* y) const {
    LstmStep step{};
    step.lstm = &args_;
    step.h = h;
    step.c = c;
    step.h_next = y;
    step.c_next = args_.c_last;
    step.sums = sums_;
    if (whole_input_) {
      step.input = static_cast<const char*>(input_) + place * sums_bytes();
    } else {
      step.x = static_cast<const char*>(args_.x) + t * args_.rows * x_bytes_;
    }
    if (fused_) {
      const double all = work(args_.hh, args_.rows) + (whole_input_ ? 0.0 : work(args_.ih, args_.rows));
      Share share{&args_, kernels_.step, step, std::min<int64_t>(executor_.threads, 1 + int64_t(all / kSerialWork))};
      if (share.shares == 1) {
        Share::run(&share, 0);
      } else {
        executor_.run(static_cast<int>(share.shares), share.shares, Share::run, &share);
      }
    } else {
      ProductArgs product = args_.hh;
      product.x = h;
      product.y = sums_;
      product.residual = step.input;
      product.m = args_.rows;
      if (!run_product(kernels_.product, product, kernels_.accumulator_bytes, executor_)) return false;
    }
    if (sums_ != nullptr) kernels_.gates(step, 0, args_.rows);
    return true;
  }

  const LstmArgs& args_;
  const LstmKernels& kernels_;
  const Executor& executor_;
  bool fused_, whole_input_;
  int64_t chunk_;
  size_t row_bytes_, x_bytes_;
  void* sums_ = nullptr;
  void* input_;
};

}  // namespace

Outcome run_lstm(const LstmArgs& args, const LstmKernels& kernels, const Executor& executor) {
  if (args.rows == 0) return Outcome::kDone;
  if (kernels.product == nullptr && !fused(args, kernels)) return Outcome::kNoKernel;
  return Sequence(args, kernels, executor).run() ? Outcome::kDone : Outcome::kNoMemory;
}

}  // namespace sp
