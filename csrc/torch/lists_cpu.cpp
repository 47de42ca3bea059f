// CPU operators on masks: index lists, their update, the choice of blocks by score, a weight with its mask applied.
#include <algorithm>
#include <tuple>

#include "core/lists.h"
#include "core/pool.h"
#include "torch/check.h"

namespace sp {
namespace {

using Lists = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // bits, crow, col, crow_t, row_t, pos_t

constexpr int64_t kNarrowIds = 1 << 16;

// A list is rebuilt from its mask where at least this share of its blocks has changed: merging them costs more.
constexpr int64_t kChangedShare = 8;

Tensor empty_1d(int64_t size, ScalarType type) { return empty_cpu(&size, 1, type); }

ScalarType id_type(int64_t count) { return count <= kNarrowIds ? ScalarType::UInt16 : ScalarType::Int; }

// Lists of a mask on their way: bits and crow are filled by `count`, the others have room once `make_room` was called.
struct Making {
  Making(const Tensor& mask) {
    check_dense(mask, "mask", 2);
    STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "mask must be bool");
    rows = mask.size(0);
    cols = mask.size(1);
    STD_TORCH_CHECK(rows * cols < (int64_t{1} << 31), "mask has ", rows, " x ", cols, " blocks; want below 2^31");
    from = static_cast<const uint8_t*>(mask.const_data_ptr());
    bits = empty_1d((rows * cols + 7) / 8, ScalarType::Byte);
    crow = empty_1d(rows + 1, ScalarType::Int);
    count = count_blocks(from, rows, cols, static_cast<uint8_t*>(bits.mutable_data_ptr()),
                         static_cast<int32_t*>(crow.mutable_data_ptr()));
    col = empty_1d(count, id_type(cols));
    crow_t = empty_1d(cols + 1, ScalarType::Int);
    row_t = empty_1d(count, id_type(rows));
    pos_t = empty_1d(count, ScalarType::Int);
  }

  BlockLists lists() const { return views(bits, crow, col, crow_t, row_t, pos_t); }

  static BlockLists views(const Tensor& bits, const Tensor& crow, const Tensor& col, const Tensor& crow_t,
                          const Tensor& row_t, const Tensor& pos_t) {
    return {static_cast<uint8_t*>(bits.mutable_data_ptr()),
            static_cast<int32_t*>(crow.mutable_data_ptr()),
            col.mutable_data_ptr(),
            static_cast<int32_t*>(crow_t.mutable_data_ptr()),
            row_t.mutable_data_ptr(),
            static_cast<int32_t*>(pos_t.mutable_data_ptr()),
            col.scalar_type() == ScalarType::UInt16,
            row_t.scalar_type() == ScalarType::UInt16};
  }

  Lists done() const { return {bits, crow, col, crow_t, row_t, pos_t}; }

  int64_t rows, cols, count;
  const uint8_t* from;
  Tensor bits, crow, col, crow_t, row_t, pos_t;
};

Lists bcsr_lists_cpu(const Tensor& mask) {
  const Making made(mask);
  build_lists(made.from, made.rows, made.cols, made.lists());
  return made.done();
}

Lists bcsr_update_cpu(const Tensor& mask, const Tensor& bits, const Tensor& crow, const Tensor& col,
                      const Tensor& crow_t, const Tensor& row_t, const Tensor& pos_t) {
  const Making made(mask);
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte && bits.numel() == made.bits.numel() &&
                      crow.numel() == made.crow.numel() && crow_t.numel() == made.crow_t.numel(),
                  "the lists are not those of a mask of this shape");
  int32_data(crow, "crow");
  int32_data(crow_t, "crow_t");
  int32_data(pos_t, "pos_t");
  is_narrow(col, "col");
  is_narrow(row_t, "row_t");
  STD_TORCH_CHECK(bits.is_contiguous() && col.scalar_type() == made.col.scalar_type() &&
                      row_t.scalar_type() == made.row_t.scalar_type() && row_t.numel() == col.numel() &&
                      pos_t.numel() == col.numel(),
                  "the lists do not belong together");
  const BlockLists before = Making::views(bits, crow, col, crow_t, row_t, pos_t), after = made.lists();
  const int64_t limit = made.count / kChangedShare + 1;
  if (count_changes(before.bits, after.bits, made.rows, made.cols, limit) < limit) {
    update_lists(made.rows, made.cols, before, after);
  } else {
    build_lists(made.from, made.rows, made.cols, after);
  }
  return made.done();
}

// Rows of a matrix that one share of the work reads at least, in elements: less does not pay for waking a helper.
constexpr int64_t kDotsShare = 1 << 16;

template <typename T>
void block_dots(const Tensor& a, const Tensor& e, int64_t r, int64_t c, float* sums) {
  struct Job {
    const T *a, *e;
    int64_t n, k, r, c, rows, at_once;
    float* sums;
  };
  Job job{static_cast<const T*>(a.const_data_ptr()),
          static_cast<const T*>(e.const_data_ptr()),
          a.size(0),
          a.size(1),
          r,
          c,
          (a.size(0) + r - 1) / r,
          0,
          sums};
  job.at_once = kDotsShare / std::max<int64_t>(1, r * job.k) + 1;
  const auto task = [](void* context, int64_t share) {
    const Job& of = *static_cast<const Job*>(context);
    const int64_t first = share * of.at_once, last = std::min(of.rows, first + of.at_once);
    sp::block_dots(of.a, of.e, of.n, of.k, of.r, of.c, first, last, of.sums);
  };
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  run_parallel(threads, (job.rows + job.at_once - 1) / job.at_once, task, &job);
}

Tensor block_dots_cpu(const Tensor& a, const Tensor& e, int64_t r, int64_t c) {
  check_dense(a, "a", 2);
  check_dense(e, "e", 2);
  const ScalarType type = a.scalar_type();
  STD_TORCH_CHECK(r > 0 && c > 0, "block = (", r, ", ", c, "); want both above 0");
  STD_TORCH_CHECK(a.size(0) == e.size(0) && a.size(1) == e.size(1) && type == e.scalar_type(),
                  "a and e must have one shape and dtype");
  const int64_t shape[] = {(a.size(0) + r - 1) / r, (a.size(1) + c - 1) / c};
  Tensor sums = empty_cpu(shape, 2, ScalarType::Float);
  float* to = static_cast<float*>(sums.mutable_data_ptr());
  if (type == ScalarType::Float) {
    block_dots<float>(a, e, r, c, to);
  } else {
    STD_TORCH_CHECK(type == ScalarType::BFloat16, "a and e must be float32 or bfloat16");
    block_dots<Bf16>(a, e, r, c, to);
  }
  return sums;
}

Tensor topk_blocks_cpu(const Tensor& scores, int64_t keep) {
  check_dense(scores, "scores", 1);
  const int64_t count = scores.numel();
  STD_TORCH_CHECK(0 < keep && keep < count, "keep = ", keep, "; want between 1 and ", count - 1);
  Tensor kept = empty_1d(count, ScalarType::Bool);
  uint8_t* to = static_cast<uint8_t*>(kept.mutable_data_ptr());
  if (scores.scalar_type() == ScalarType::Float) {
    select_highest(static_cast<const float*>(scores.const_data_ptr()), count, keep, to);
  } else {
    STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Double, "scores must be float32 or float64");
    select_highest(static_cast<const double*>(scores.const_data_ptr()), count, keep, to);
  }
  return kept;
}

Tensor masked_weight_cpu(const Tensor& weight, const Tensor& bits, int64_t r, int64_t c, bool) {
  check_dense(weight, "weight", 2);
  check_dense(bits, "bits", 1);
  const int64_t n = weight.size(0), k = weight.size(1);
  STD_TORCH_CHECK(r > 0 && c > 0 && bits.scalar_type() == ScalarType::Byte &&
                      bits.numel() == (((n + r - 1) / r) * ((k + c - 1) / c) + 7) / 8,
                  "bits are not those of a mask of this weight");
  const size_t bytes = weight.element_size();
  STD_TORCH_CHECK(bytes == 2 || bytes == 4 || bytes == 8, "weight must have elements of 2, 4 or 8 bytes");
  const int64_t shape[] = {n, k};
  Tensor kept = empty_cpu(shape, 2, weight.scalar_type());
  mask_weight(weight.const_data_ptr(), n, k, r, c, static_cast<const uint8_t*>(bits.const_data_ptr()), bytes,
              kept.mutable_data_ptr());
  return kept;
}

}  // namespace
}  // namespace sp

STABLE_TORCH_LIBRARY_IMPL(sparse_pathways, CPU, m) {
  m.impl("bcsr_lists", TORCH_BOX(&sp::bcsr_lists_cpu));
  m.impl("bcsr_update", TORCH_BOX(&sp::bcsr_update_cpu));
  m.impl("block_dots", TORCH_BOX(&sp::block_dots_cpu));
  m.impl("masked_weight", TORCH_BOX(&sp::masked_weight_cpu));
  m.impl("topk_blocks", TORCH_BOX(&sp::topk_blocks_cpu));
}
