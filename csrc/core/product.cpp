#include "core/product.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "core/elements.h"

namespace sp {

namespace {

// Shares per thread at most: a thread that comes late or is held up leaves the rest to the others.
constexpr int64_t kFineShares = 4;

// Kept weights per input that make a share's packing of x 5 % of its product. (Zen 4: an element of x costs 7
// multiply-adds to pack.)
constexpr double kKeptPerPack = 140;

// Cost of one list besides its blocks (loop start, store, transposition), in blocks.
constexpr int64_t kListCost = 4;

// Grows, never shrinks: panels recur with the same few sizes, and an allocation per call would cost more than a GEMV.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  void* reserve(size_t bytes) {
    if (bytes > bytes_) {
      std::free(data_);
      bytes_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, bytes_);
      if (data_ == nullptr) bytes_ = 0;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

thread_local Scratch thread_scratch;

// First list of share `index` of `shares`, lists weighted by their number of blocks.
int64_t split_lists(const ProductArgs& args, int64_t index, int64_t shares) {
  if (index == 0) return 0;
  if (index == shares) return args.lists;
  const int64_t origin = args.begin[0];
  const int64_t total = args.begin[args.lists] - origin + kListCost * args.lists;
  const int64_t target = total / shares * index;
  int64_t low = 0, high = args.lists;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (args.begin[middle] - origin + kListCost * middle < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

struct Split {
  ProductKernel kernel;
  const ProductArgs* args;
  size_t scratch;
  int64_t row_shares = 1;
  int64_t list_shares = 1;
  std::atomic<bool> failed{false};
};

void run_share(void* context, int64_t index) {
  Split& split = *static_cast<Split*>(context);
  const ProductArgs& args = *split.args;
  void* scratch = thread_scratch.reserve(split.scratch);
  if (scratch == nullptr) {
    split.failed = true;
    return;
  }
  const int64_t panels = (args.m + kMaxPanel - 1) / kMaxPanel;
  const int64_t row = index % split.row_shares, list = index / split.row_shares;
  const int64_t m0 = panels * row / split.row_shares * kMaxPanel;
  const int64_t m1 = std::min(args.m, panels * (row + 1) / split.row_shares * kMaxPanel);
  const int64_t l0 = split_lists(args, list, split.list_shares);
  const int64_t l1 = split_lists(args, list + 1, split.list_shares);
  if (m0 < m1 && l0 < l1) split.kernel(args, m0, m1, l0, l1, scratch);
}

// R and C are 8 and 1 if kEightByOne: then a block is eight loads and two vector stores to the compiler.
template <bool kEightByOne, typename T, typename Col>
void gather(const T* weight, int64_t n, int64_t k, int64_t height, int64_t width, const int32_t* crow, int64_t rows,
            const Col* col, T* values) {
  const int64_t r = kEightByOne ? 8 : height, c = kEightByOne ? 1 : width;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t live = std::min(r, n - row * r);
    const T* band = weight + row * r * k;
    for (int64_t e = crow[row]; e < crow[row + 1]; ++e) {
      const int64_t first = static_cast<int64_t>(col[e]) * c;
      T* block = values + e * c * r;
      if (kEightByOne && live == 8) {
        T column[8];
        for (int i = 0; i < 8; ++i) column[i] = band[i * k + first];
        std::memcpy(block, column, sizeof column);
        continue;
      }
      const int64_t across = std::min(c, k - first);
      if (live < r || across < c) std::memset(static_cast<void*>(block), 0, sizeof(T) * c * r);
      for (int64_t j = 0; j < across; ++j) {
        for (int64_t i = 0; i < live; ++i) block[j * r + i] = band[i * k + first + j];
      }
    }
  }
}

}  // namespace

bool run_product(ProductKernel kernel, const ProductArgs& args, size_t element_bytes, const Executor& executor) {
  if (args.m == 0 || args.out == 0) return true;
  const double work = static_cast<double>(args.begin[args.lists]) * static_cast<double>(args.r * args.c) *
                      static_cast<double>(std::max<int64_t>(args.m, 2));
  const int64_t threads = std::min<int64_t>(executor.threads, 1 + static_cast<int64_t>(work / kSerialWork));
  const int64_t panels = (args.m + kMaxPanel - 1) / kMaxPanel;

  Split split{};
  split.kernel = kernel;
  split.args = &args;
  split.scratch = scratch_bytes(args, element_bytes);
  if (threads == 1) {
    run_share(&split, 0);
    return !split.failed;
  }
  if (panels % threads == 0 || panels >= kFineShares * threads) {
    // Whole panels divide evenly: share rows, each panel is then packed once.
    split.row_shares = std::min(panels, kFineShares * threads);
  } else {
    // Share lists, by blocks. A share of more than one row packs x anew.
    const double kept = work / static_cast<double>(args.m * args.in);
    const auto most = args.m == 1 ? kFineShares * threads : static_cast<int64_t>(kept / kKeptPerPack);
    split.list_shares = std::clamp(most, threads, kFineShares * threads);
  }
  executor.run(static_cast<int>(threads), split.row_shares * split.list_shares, run_share, &split);
  return !split.failed;
}

void gather_blocks(const void* weight, int64_t n, int64_t k, int64_t r, int64_t c, const int32_t* crow, int64_t rows,
                   const void* col, bool narrow, size_t element_bytes, void* values) {
  with_bits(element_bytes, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(weight);
    T* to = static_cast<T*>(values);
    const auto blocks = [&](const auto* ids) {
      if (r == 8 && c == 1) {
        gather<true>(from, n, k, r, c, crow, rows, ids, to);
      } else {
        gather<false>(from, n, k, r, c, crow, rows, ids, to);
      }
    };
    narrow ? blocks(static_cast<const uint16_t*>(col)) : blocks(static_cast<const int32_t*>(col));
  });
}

}  // namespace sp
