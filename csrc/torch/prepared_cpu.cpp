// A product whose weight was looked at once: `packed_linear(x, handle)`.
//
// A call of `bcsr_linear` costs as much as a small product, most of it for nine tensors and options that stay the same
// from call to call. A handle stands for all of them but x. Python owns handles (ops/prepared.py): it makes one per
// weight, pathway and bias, and releases it with them. Lists and values are arranged for their kernel at the same time
// (types.h), a copy of the weight that the handle owns.
#include <atomic>
#include <fstream>

#include "torch/direct.h"
#include "torch/prepared.h"

namespace sp {
namespace {

std::atomic<int64_t> held_bytes{0};

// Of the third level, as the first core sees it. (glibc's sysconf counts what a virtual machine has no share of.)
int64_t last_cache() {
  int64_t kib = 0;
  std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kib;  // "32768K"
  return kib > 0 ? kib << 10 : int64_t{32} << 20;
}

// Not inside a function: a process that is forked while a thread is in its first call would wait for ever for it.
const int64_t room = last_cache();

// Without memory for a copy the product reads the tensors, as without a handle.
void arrange(Prepared& prepared) {
  const Arrange arrange = arrange_for(prepared.type);
  const size_t bytes = arrange == nullptr ? 0 : arrange(prepared.args, nullptr);
  const Tensor &values = prepared.operands.values, &col = prepared.operands.col;
  prepared.bytes = values.numel() * values.element_size() + col.numel() * col.element_size();
  if (bytes == 0) return;
  prepared.bytes = static_cast<int64_t>(bytes);
  prepared.arranged.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (prepared.arranged != nullptr) arrange(prepared.args, prepared.arranged.get());
  prepared.args.arranged = prepared.arranged.get();
}

int64_t prepare_linear_cpu(const Tensor& values, const Tensor& crow, const Tensor& col,
                           const std::optional<Tensor>& pos, const std::optional<Tensor>& bias, int64_t n, int64_t k,
                           const std::optional<Tensor>& scale, int64_t activation, bool quantise_x, int64_t base) {
  const LinearOperands operands{values, crow, col, pos, scale, bias, n, activation, quantise_x};
  check_operands(operands);
  const Prepared* added = base == 0 ? nullptr : find_prepared(base);
  STD_TORCH_CHECK(added == nullptr || (added->args.out == n && added->args.in == k), "base is of another shape");
  const ScalarType type = values.scalar_type();
  auto prepared = std::make_unique<Prepared>(Prepared{kAlive, type, weight_args(operands, k), 0, added, operands, {}});
  arrange(*prepared);
  held_bytes += prepared->bytes;
  return reinterpret_cast<int64_t>(prepared.release());
}

void release_linear_op(int64_t handle) {
  Prepared* prepared = find_prepared(handle);
  held_bytes -= prepared->bytes;
  prepared->alive = 0;
  delete prepared;
}

Tensor product(const Tensor& x, const Prepared& weight, const std::optional<Tensor>& residual) {
  std::optional<Tensor> initial;
  if (weight.base != nullptr) initial = product(x, *weight.base, std::nullopt);
  return run_linear(x, args_now(weight), weight.type, weight.operands.bias, residual, initial);
}

// x [..., K] of the weight's x_dtype, any strides.
Tensor packed_linear_cpu(const Tensor& x, int64_t handle, const std::optional<Tensor>& residual) {
  const Prepared& weight = *find_prepared(handle);
  return product(x.is_contiguous() ? x : torch::stable::contiguous(x), weight, residual);
}

// --- for direct.cpp
// ---------------------------------------------------------------------------------------------------
DirectWeight direct_weight(int64_t handle) {
  const Prepared& weight = *find_prepared(handle);
  return {weight.args.in, weight.args.out, static_cast<int>(x_type(weight.type)), weight.operands.bias.has_value(),
          weight.bytes};
}

void direct_linear(int64_t handle, const void* x, int64_t m, const void* bias, const void* residual, void* y) {
  const Prepared& weight = *find_prepared(handle);
  for (int64_t at = 0; at < 1024; at += 64) __builtin_prefetch(static_cast<const char*>(weight.args.arranged) + at);
  if (weight.base != nullptr) {
    direct_linear(reinterpret_cast<int64_t>(weight.base), x, m, nullptr, nullptr, y);
  }
  multiply(args_now(weight), weight.type, {x, bias, residual, weight.base == nullptr ? nullptr : y, m, y});
}

constexpr DirectCalls kDirectCalls{kDirectVersion, direct_weight, direct_linear};

int64_t direct_calls_op() { return reinterpret_cast<int64_t>(&kDirectCalls); }

}  // namespace

bool beyond_caches() { return held_bytes.load(std::memory_order_relaxed) > room; }

}  // namespace sp

STABLE_TORCH_LIBRARY_IMPL(sparse_pathways, CPU, m) {
  m.impl("prepare_linear", TORCH_BOX(&sp::prepare_linear_cpu));
  m.impl("packed_linear", TORCH_BOX(&sp::packed_linear_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(sparse_pathways, CompositeExplicitAutograd, m) {
  m.impl("release_linear", TORCH_BOX(&sp::release_linear_op));
  m.impl("direct_calls", TORCH_BOX(&sp::direct_calls_op));
}
