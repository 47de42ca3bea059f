// CPU kernels of training: the products of the gradients and the gathering of kept blocks.
#include <algorithm>
#include <cstring>

#include "core/isa.h"
#include "core/product.h"
#include "torch/check.h"
#include "torch/run.h"

namespace sp {
namespace {

// Multiply-adds from which a second thread is worth waking, as for the forward product.
constexpr double kSerialWork = 6e5;

int64_t threads_for(double work) {
  return std::min<int64_t>(torch::stable::get_num_threads(), 1 + static_cast<int64_t>(work / kSerialWork));
}

// Calls task(share, begin, end) for `shares` even shares of [0, count), each on one thread.
template <typename Task>
void share(int64_t count, int64_t shares, const Task& task) {
  shares = std::max<int64_t>(1, std::min(count, shares));
  if (shares == 1) return task(0, 0, count);
  const auto run = [&](int64_t i) { task(i, count * i / shares, count * (i + 1) / shares); };
  run_parallel(
      static_cast<int>(shares), shares, [](void* all, int64_t i) { (*static_cast<const decltype(run)*>(all))(i); },
      const_cast<void*>(static_cast<const void*>(&run)));
}

// Private memory for `shares` threads: `each` elements of `type`, whole cache lines.
class Scratch {
 public:
  Scratch(int64_t shares, int64_t each, ScalarType type)
      : bytes_((each * (type == ScalarType::Double ? 8 : 4) + 63) / 64 * 64), memory_(make(shares * bytes_)) {}

  void* of(int64_t share) { return static_cast<char*>(memory_.mutable_data_ptr()) + share * bytes_; }

 private:
  static Tensor make(int64_t bytes) { return empty_cpu(&bytes, 1, ScalarType::Byte); }

  int64_t bytes_;
  Tensor memory_;
};

void check_float(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "the CPU kernels of gradients take float32 "
                  "and float64; cast ",
                  name, ", or use another backend");
}

// The lists of the forward product as `begin`, `other` and `pos` of either kind of arguments.
template <typename Args>
void forward_lists(Args& args, const Tensor& crow, const Tensor& col, const std::optional<Tensor>& pos, int64_t n) {
  args.begin = int32_data(crow, "crow");
  args.narrow = is_narrow(col, "col");
  args.other = col.const_data_ptr();
  STD_TORCH_CHECK(crow.numel() - 1 == (n + args.r - 1) / args.r, "crow has ", crow.numel(),
                  " entries, which does not fit n = ", n, " outputs in blocks of ", args.r);
  if (pos.has_value()) {
    args.pos = int32_data(*pos, "pos");
    STD_TORCH_CHECK(pos->numel() == col.numel(), "pos and col differ in length");
  }
}

Tensor bcsr_linear_dx_cpu(const Tensor& dy, const Tensor& values, const Tensor& crow, const Tensor& col,
                          const std::optional<Tensor>& pos, int64_t k, const std::optional<Tensor>& crow_t,
                          const std::optional<Tensor>& row_t, const std::optional<Tensor>& pos_t) {
  check_dense(dy, "dy", 2);
  check_dense(values, "values", 3);
  check_float(dy, "dy and values");
  const ScalarType type = dy.scalar_type();
  STD_TORCH_CHECK(values.scalar_type() == type, "values and dy differ in dtype");
  ProductArgs args{};
  args.x = dy.const_data_ptr();
  args.values = values.const_data_ptr();
  args.m = dy.size(0);
  args.in = dy.size(1);
  args.out = k;
  args.c = values.size(1);
  args.r = values.size(2);
  args.lists = crow.numel() - 1;
  forward_lists(args, crow, col, pos, args.in);
  STD_TORCH_CHECK(pos.has_value() || values.size(0) >= col.numel(), "values holds fewer blocks than col names");
  const int64_t shape[] = {args.m, k};
  Tensor dx = empty_cpu(shape, 2, type);
  args.y = dx.mutable_data_ptr();
  if (args.m == 0 || k == 0) return dx;
  const double work = static_cast<double>(col.numel()) * static_cast<double>(args.r * args.c * args.m);
  const bool single = type == ScalarType::Float;
  if (crow_t.has_value() && args.m <= kDxFewRows && args.r % 8 == 0 && single) {
    args.begin = int32_data(*crow_t, "crow_t");
    args.lists = crow_t->numel() - 1;
    STD_TORCH_CHECK(args.lists == (k + args.c - 1) / args.c, "crow_t has ", args.lists + 1,
                    " entries, which does not fit k = ", k, " inputs in blocks of ", args.c);
    STD_TORCH_CHECK(
        row_t.has_value() && pos_t.has_value() && pos_t->numel() == row_t->numel() && row_t->numel() == col.numel(),
        "row_t and pos_t must be given with crow_t, as long as col");
    args.narrow = is_narrow(*row_t, "row_t");
    args.other = row_t->const_data_ptr();
    args.pos = int32_data(*pos_t, "pos_t");
    const int64_t shares = threads_for(work);
    Scratch scratch(shares, dx_few_scratch_elements(args), type);
    share(args.lists, shares, [&](int64_t i, int64_t l0, int64_t l1) {
      kernels().linear_dx_few_f32(args, 0, args.m, l0, l1, scratch.of(i));
    });
    return dx;
  }
  const ProductKernel kernel = single ? kernels().linear_dx_f32 : linear_dx_f64;
  const int64_t panels = (args.m + kMaxPanel - 1) / kMaxPanel;
  const int64_t shares = std::min(panels, threads_for(work));
  Scratch scratch(shares, dx_scratch_elements(args), type);
  share(panels, shares, [&](int64_t i, int64_t p0, int64_t p1) {
    kernel(args, p0 * kMaxPanel, std::min(args.m, p1 * kMaxPanel), 0, args.lists, scratch.of(i));
  });
  return dx;
}

void few_rows_dw(const WeightGradArgs& args, const WeightGradKernel& kernel, int64_t lists, int64_t threads,
                 ScalarType type) {
  WeightGradShare all{};
  all.m1 = args.m, all.k1 = args.k;
  Scratch columns(1, args.k * few_stride(args.m), type), tiles(threads, 8 * args.m, type);
  all.columns = columns.of(0);
  share((args.k + 15) / 16, threads, [&](int64_t, int64_t k0, int64_t k1) {  // whole cache lines
    kernel.turn_x(args, all, 16 * k0, std::min(args.k, 16 * k1));
  });
  share(lists, threads, [&](int64_t i, int64_t l0, int64_t l1) {
    WeightGradShare mine = all;
    mine.l0 = l0, mine.l1 = l1, mine.scratch = tiles.of(i);
    kernel.product(args, mine);
  });
}

// Bytes of a panel of x, which all block rows read: it shares the second cache with what streams through.
constexpr int64_t kPanelBytes = 384 * 1024;

void many_rows_dw(const WeightGradArgs& args, const WeightGradKernel& kernel, int64_t lists, int64_t threads,
                  ScalarType type) {
  // Even chunks: a short last one would pay for its sums over the lanes like a full one.
  const int64_t chunks = (args.m + kGradRows - 1) / kGradRows, rows = (args.m + chunks - 1) / chunks;
  const int64_t bytes = turned_stride(rows) * (type == ScalarType::Double ? 8 : 4), unit = 16 * args.c;
  const int64_t width = std::max(unit, kPanelBytes / bytes / unit * unit);
  Scratch columns(1, std::min(width, args.k) * turned_stride(rows), type);
  Scratch dys(1, lists * args.r * turned_length(rows), type), cursor(1, lists, ScalarType::Float);
  WeightGradShare part{};
  part.columns = columns.of(0), part.dys = dys.of(0), part.cursor = static_cast<int32_t*>(cursor.of(0));
  const int64_t lines = (16 + args.r - 1) / args.r * args.r;  // outputs of whole block rows, at least a cache line
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    part.m0 = args.m * chunk / chunks, part.m1 = args.m * (chunk + 1) / chunks;
    share((args.n + lines - 1) / lines, threads, [&](int64_t, int64_t n0, int64_t n1) {
      kernel.turn_dy(args, part, lines * n0, std::min(args.n, lines * n1));
    });
    for (part.k0 = 0; part.k0 < args.k; part.k0 += width) {
      part.k1 = std::min(args.k, part.k0 + width);
      share((part.k1 - part.k0 + 15) / 16, threads, [&](int64_t, int64_t k0, int64_t k1) {
        kernel.turn_x(args, part, part.k0 + 16 * k0, std::min(part.k1, part.k0 + 16 * k1));
      });
      share(lists, threads, [&](int64_t, int64_t l0, int64_t l1) {
        WeightGradShare mine = part;
        mine.l0 = l0, mine.l1 = l1;
        kernel.product(args, mine);
      });
    }
  }
}

Tensor bcsr_linear_dw_cpu(const Tensor& dy, const Tensor& x, const Tensor& crow, const Tensor& col,
                          const std::optional<Tensor>& pos, int64_t r, int64_t c, int64_t blocks) {
  check_dense(dy, "dy", 2);
  check_dense(x, "x", 2);
  check_float(x, "dy and x");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(dy.scalar_type() == type, "dy and x differ in dtype");
  STD_TORCH_CHECK(dy.size(0) == x.size(0), "dy has ", dy.size(0), " rows, x has ", x.size(0));
  STD_TORCH_CHECK(r > 0 && c > 0, "blocks of ", r, " x ", c);
  WeightGradArgs args{};
  args.dy = dy.const_data_ptr();
  args.x = x.const_data_ptr();
  args.m = x.size(0);
  args.n = dy.size(1);
  args.k = x.size(1);
  args.r = r;
  args.c = c;
  args.dense = blocks < 0;
  forward_lists(args, crow, col, pos, args.n);
  STD_TORCH_CHECK(args.dense || pos.has_value() || blocks >= col.numel(), "blocks is below what col names");
  const int64_t dense_shape[] = {args.n, args.k}, values_shape[] = {blocks, c, r};
  Tensor dw = args.dense ? empty_cpu(dense_shape, 2, type) : empty_cpu(values_shape, 3, type);
  args.dw = dw.mutable_data_ptr();
  // Blocks that no entry points to have a gradient too.
  if (!args.dense && pos.has_value()) std::memset(args.dw, 0, static_cast<size_t>(dw.numel()) * dw.element_size());

  const WeightGradKernel kernel = type == ScalarType::Float ? kernels().linear_dw_f32 : linear_dw_f64;
  const int64_t threads = threads_for(static_cast<double>(col.numel()) * static_cast<double>(r * c * args.m));
  args.m <= kernel.few ? few_rows_dw(args, kernel, crow.numel() - 1, threads, type)
                       : many_rows_dw(args, kernel, crow.numel() - 1, threads, type);
  return dw;
}

Tensor bcsr_gather_cpu(const Tensor& weight, const Tensor& crow, const Tensor& col, int64_t r, int64_t c) {
  check_dense(weight, "weight", 2);
  const int32_t* begin = int32_data(crow, "crow");
  const bool narrow = is_narrow(col, "col");
  const int64_t rows = crow.numel() - 1;
  STD_TORCH_CHECK(r > 0 && c > 0 && rows == (weight.size(0) + r - 1) / r, "crow has ", rows + 1,
                  " entries, which does not fit ", weight.size(0), " outputs in blocks of ", r);
  const size_t bytes = weight.element_size();
  STD_TORCH_CHECK(bytes == 2 || bytes == 4 || bytes == 8, "weight must have elements of 2, 4 or 8 bytes");
  const int64_t shape[] = {col.numel(), c, r};
  Tensor values = empty_cpu(shape, 3, weight.scalar_type());
  gather_blocks(weight.const_data_ptr(), weight.size(0), weight.size(1), r, c, begin, rows, col.const_data_ptr(),
                narrow, bytes, values.mutable_data_ptr());
  return values;
}

}  // namespace
}  // namespace sp

STABLE_TORCH_LIBRARY_IMPL(sparse_pathways, CPU, m) {
  m.impl("bcsr_linear_dx", TORCH_BOX(&sp::bcsr_linear_dx_cpu));
  m.impl("bcsr_linear_dw", TORCH_BOX(&sp::bcsr_linear_dw_cpu));
  m.impl("bcsr_gather", TORCH_BOX(&sp::bcsr_gather_cpu));
}
