// CUDA kernels of the `sparse_pathways` operators over strips, registered on torch's stable ABI.
//
// Schemas and fake kernels are defined in Python (sparse_pathways/ops/strips.py). Index lists are trusted; the checks
// below only keep a wrong call from reading stray memory. Nothing waits for the device but strips_pack without a
// capacity, which sizes its memory by the count.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <limits>
#include <tuple>

#include "cuda/kernels.h"
#include "torch/check.h"

namespace sp {
namespace {

using torch::stable::accelerator::DeviceGuard;

cuda::Stream current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cuda::Stream>(stream);
}

int multiprocessors(int32_t device) {
  int count = 0;
  STD_TORCH_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess,
                  "the number of multiprocessors cannot be read");
  return count;
}

void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, "CUDA: ", error); }

Tensor empty_cuda(std::initializer_list<int64_t> sizes, ScalarType type, int32_t device) {
  int64_t shape[kMaxDim], strides[kMaxDim], stride = 1;
  const int64_t dim = static_cast<int64_t>(sizes.size());
  for (int64_t i = dim; i-- > 0; stride *= shape[i]) {
    shape[i] = sizes.begin()[i];
    strides[i] = stride;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, shape, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

cuda::Dtype dtype_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, name,
                  " must be float32, float16 or bfloat16");
  return type == ScalarType::Float  ? cuda::Dtype::kFloat
         : type == ScalarType::Half ? cuda::Dtype::kHalf
                                    : cuda::Dtype::kBf16;
}

int to_int(int64_t value, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value <= std::numeric_limits<int>::max(), name, " = ", value, " does not fit an int");
  return static_cast<int>(value);
}

// What a kernel reads must lie where it runs.
void check_device(const Tensor& tensor, const char* name, int32_t device) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, name, " is not on CUDA device ", device);
}

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// A vector of the type of `like`, or null.
const void* vector_data(const std::optional<Tensor>& tensor, const char* name, int64_t numel, const Tensor& like) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->is_contiguous() && tensor->numel() == numel && tensor->is_cuda() &&
                      tensor->get_device_index() == like.get_device_index() &&
                      tensor->scalar_type() == like.scalar_type(),
                  name, " must be contiguous, of x's dtype and device, ", numel, " elements");
  return tensor->const_data_ptr();
}

// --- strips ---------------------------------------------------------------------------------------------------------
std::tuple<Tensor, Tensor, Tensor, Tensor> strips_pack_cuda(const Tensor& source, const Tensor& crow, const Tensor& col,
                                                            const std::optional<Tensor>& pos, int64_t n, int64_t k,
                                                            int64_t r, int64_t c, int64_t p, int64_t capacity) {
  const int32_t device = source.get_device_index();
  const DeviceGuard guard(device);
  STD_TORCH_CHECK(p == 8 || p == 16 || p == 32, "p = ", p, "; want 8, 16 or 32");
  check_device(crow, "crow", device);
  check_device(col, "col", device);
  if (pos.has_value()) check_device(*pos, "pos", device);
  const bool dense = source.dim() == 2;
  check_dense(source, "source", dense ? 2 : 3);
  cuda::PackArgs args{};
  args.dtype = dtype_of(source, "source");
  args.crow = int32_data(crow, "crow");
  args.narrow = is_narrow(col, "col");
  args.col = col.const_data_ptr();
  args.n = to_int(n, "n"), args.k = to_int(k, "k"), args.r = to_int(r, "r"), args.c = to_int(c, "c");
  STD_TORCH_CHECK(args.r > 0 && args.c > 0 && crow.numel() - 1 == ceil_div(n, r), "crow has ", crow.numel(),
                  " entries, which does not fit n = ", n, " outputs in blocks of ", r);
  if (dense) {
    STD_TORCH_CHECK(source.size(0) == n && source.size(1) == k, "the weight is not n x k");
    args.weight = source.const_data_ptr();
    args.stride = k;
  } else {
    STD_TORCH_CHECK(source.size(1) == c && source.size(2) == r, "values are not [blocks, c, r]");
    STD_TORCH_CHECK(pos.has_value() || source.size(0) >= col.numel(), "values holds fewer blocks than col names");
    args.blocks = source.const_data_ptr();
    if (pos.has_value()) args.pos = int32_data(*pos, "pos");
  }
  args.p = static_cast<int>(p);
  args.strips = ceil_div(n, p);
  args.chunks = ceil_div(k, cuda::kChunk);
  Tensor begin = empty_cuda({int64_t{args.strips} * args.chunks + 1}, ScalarType::Int, device);
  Tensor state = empty_cuda({1}, ScalarType::Int, device);
  args.begin = static_cast<int32_t*>(begin.mutable_data_ptr());
  args.state = static_cast<int32_t*>(state.mutable_data_ptr());
  args.capacity = capacity >= 0 ? to_int(capacity, "capacity") : std::numeric_limits<int>::max();
  const cuda::Stream stream = current_stream(device);
  check_launch(cuda::pack_count(args, stream));
  if (capacity < 0) {
    int32_t needed = 0;
    STD_TORCH_CHECK(
        cudaMemcpyAsync(&needed, args.state, sizeof needed, cudaMemcpyDeviceToHost, stream) == cudaSuccess &&
            cudaStreamSynchronize(stream) == cudaSuccess,
        "the count of octets cannot be read (strips_pack without a capacity waits for the device; give one "
        "to capture it in a graph)");
    args.capacity = needed;
  }
  Tensor ids = empty_cuda({args.capacity, 8}, ScalarType::UInt16, device);
  Tensor values = empty_cuda({args.capacity, p * 8}, source.scalar_type(), device);
  args.ids = static_cast<uint16_t*>(ids.mutable_data_ptr());
  args.values = values.mutable_data_ptr();
  check_launch(cuda::pack_fill(args, stream));
  // The caller has waited already; now whoever is given these strips later, on whatever stream, finds them filled.
  STD_TORCH_CHECK(capacity >= 0 || cudaStreamSynchronize(stream) == cudaSuccess, "the strips cannot be filled");
  return {values, ids, begin, state};
}

cuda::Strips strips_of(const Tensor& values, const Tensor& ids, const Tensor& begin, int64_t n, int64_t k, int64_t p,
                       int32_t device) {
  check_device(values, "values", device);
  check_device(ids, "ids", device);
  check_device(begin, "begin", device);
  check_dense(values, "values", 2);
  check_dense(ids, "ids", 2);
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::UInt16 && ids.size(1) == 8, "ids must be uint16 [octets, 8]");
  STD_TORCH_CHECK(values.size(0) == ids.size(0) && values.size(1) == p * 8, "values and ids differ in octets");
  cuda::Strips strips{values.const_data_ptr(),
                      static_cast<const uint16_t*>(ids.const_data_ptr()),
                      int32_data(begin, "begin"),
                      to_int(n, "n"),
                      to_int(k, "k"),
                      static_cast<int>(p),
                      ceil_div(n, p),
                      ceil_div(k, cuda::kChunk)};
  STD_TORCH_CHECK(begin.numel() == int64_t{strips.strips} * strips.chunks + 1, "begin has ", begin.numel(),
                  " entries, which does not fit strips of ", p, " of a weight ", n, " x ", k);
  return strips;
}

Tensor strips_linear_cuda(const Tensor& x, const Tensor& values, const Tensor& ids, const Tensor& begin,
                          const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t n,
                          int64_t p, int64_t activation, int64_t tile_m) {
  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  STD_TORCH_CHECK(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1), "x must be [m, k], its rows contiguous");
  STD_TORCH_CHECK(values.scalar_type() == x.scalar_type(), "values and x differ in dtype");
  STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::kTanh), "unknown activation");
  cuda::LinearArgs args{};
  const cuda::Dtype dtype = dtype_of(x, "x");
  args.weight = strips_of(values, ids, begin, n, x.size(1), p, device);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.m = x.size(0);
  args.bias = vector_data(bias, "bias", n, x);
  args.residual = vector_data(residual, "residual", args.m * n, x);
  args.activation = static_cast<Activation>(activation);
  const int count = multiprocessors(device);
  args.tile_m =
      tile_m > 0 ? to_int(tile_m, "tile_m") : cuda::choose_tile(args.m, args.weight.n, args.weight.p, dtype, count);
  Tensor y = empty_cuda({args.m, n}, x.scalar_type(), device);
  args.y = y.mutable_data_ptr();
  check_launch(cuda::linear(args, dtype, count, current_stream(device)));
  return y;
}

// --- LSTM -----------------------------------------------------------------------------------------------------------
// All steps of one direction of one layer: one launch each, and for more than one step the input product of all before.
std::tuple<Tensor, Tensor, Tensor> strips_lstm_cuda(
    const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& values_ih, const Tensor& ids_ih,
    const Tensor& begin_ih, const std::optional<Tensor>& bias_ih, const Tensor& values_hh, const Tensor& ids_hh,
    const Tensor& begin_hh, const std::optional<Tensor>& bias_hh, const std::optional<Tensor>& g_weight,
    const std::optional<Tensor>& g_bias, const std::optional<Tensor>& c_weight, const std::optional<Tensor>& c_bias,
    double g_eps, double c_eps, bool reverse) {
  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  check_dense(x, "x", 3);
  check_dense(h, "h", 2);
  check_dense(c, "c", 2);
  check_device(h, "h", device);
  check_device(c, "c", device);
  const int64_t steps = x.size(0), rows = x.size(1), width = x.size(2), hidden = h.size(1);
  STD_TORCH_CHECK(h.size(0) == rows && c.size(0) == rows && c.size(1) == hidden, "x, h and c differ in shape");
  STD_TORCH_CHECK(h.scalar_type() == x.scalar_type() && c.scalar_type() == x.scalar_type() &&
                      values_ih.scalar_type() == x.scalar_type() && values_hh.scalar_type() == x.scalar_type(),
                  "x, h, c and the weights differ in dtype");
  const cuda::Dtype dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(cuda::lstm_fits(static_cast<int>(steps > 1 ? 0 : width), to_int(hidden, "hidden"), dtype),
                  "E = ", width, ", H = ", hidden,
                  " do not fit the kernel: H must be a multiple of 8, E + H within shared memory");
  cuda::LstmStepArgs args{};
  args.ih = strips_of(values_ih, ids_ih, begin_ih, 4 * hidden, width, 8, device);
  args.hh = strips_of(values_hh, ids_hh, begin_hh, 4 * hidden, hidden, 8, device);
  args.bias_ih = vector_data(bias_ih, "bias_ih", 4 * hidden, x);
  args.bias_hh = vector_data(bias_hh, "bias_hh", 4 * hidden, x);
  args.g_weight = vector_data(g_weight, "g_weight", 4 * hidden, x);
  const bool norm = args.g_weight != nullptr;
  STD_TORCH_CHECK(norm == g_bias.has_value() && norm == c_weight.has_value() && norm == c_bias.has_value(),
                  "the normalisation needs all four of its parameters");
  args.g_bias = vector_data(g_bias, "g_bias", 4 * hidden, x);
  args.c_weight = vector_data(c_weight, "c_weight", hidden, x);
  args.c_bias = vector_data(c_bias, "c_bias", hidden, x);
  args.g_eps = static_cast<float>(g_eps), args.c_eps = static_cast<float>(c_eps);
  args.rows = to_int(rows, "rows"), args.hidden = static_cast<int>(hidden);
  const cuda::Stream stream = current_stream(device);

  const int64_t tiles = (rows + 15) / 16;
  Tensor scratch = empty_cuda({norm ? rows : 0, 4 * hidden}, ScalarType::Float, device);
  Tensor tickets = empty_cuda({norm ? tiles : 0}, ScalarType::Int, device);
  if (norm && tiles > 0) {
    STD_TORCH_CHECK(
        cudaMemsetAsync(tickets.mutable_data_ptr(), 0, static_cast<size_t>(tiles) * 4, stream) == cudaSuccess,
        "the tickets cannot be cleared");
  }
  args.gates = static_cast<float*>(scratch.mutable_data_ptr());
  args.tickets = static_cast<int32_t*>(tickets.mutable_data_ptr());

  Tensor y = empty_cuda({steps, rows, hidden}, x.scalar_type(), device);
  Tensor cells = empty_cuda({steps > 0 ? steps : 1, rows, hidden}, x.scalar_type(), device);
  Tensor input = empty_cuda({steps > 1 ? steps * rows : 0, 4 * hidden}, x.scalar_type(), device);
  if (steps > 1 && rows > 0) {
    cuda::LinearArgs product{};
    product.weight = args.ih;
    product.x = x.const_data_ptr();
    product.x_stride = width;
    product.bias = args.bias_ih;
    product.y = input.mutable_data_ptr();
    product.m = steps * rows;
    const int count = multiprocessors(device);
    product.tile_m = cuda::choose_tile(product.m, product.weight.n, 8, dtype, count);
    check_launch(cuda::linear(product, dtype, count, stream));
    args.bias_ih = nullptr;
  }
  const size_t element = cuda::size_of(dtype), state = static_cast<size_t>(rows * hidden) * element;
  const void *h_now = h.const_data_ptr(), *c_now = c.const_data_ptr();
  for (int64_t i = 0; i < steps; ++i) {
    const size_t at = static_cast<size_t>(reverse ? steps - 1 - i : i);
    if (steps > 1) {
      args.input = static_cast<const char*>(input.const_data_ptr()) + at * 4 * state;
    } else {
      args.x = x.const_data_ptr();
    }
    args.h = h_now, args.c = c_now;
    args.h_next = static_cast<char*>(y.mutable_data_ptr()) + at * state;
    args.c_next = static_cast<char*>(cells.mutable_data_ptr()) + at * state;
    check_launch(cuda::lstm_step(args, dtype, stream));
    h_now = args.h_next, c_now = args.c_next;
  }
  Tensor h_last = empty_cuda({rows, hidden}, x.scalar_type(), device);
  Tensor c_last = empty_cuda({rows, hidden}, x.scalar_type(), device);
  for (const auto& [to, from] :
       {std::pair<void*, const void*>{h_last.mutable_data_ptr(), h_now}, {c_last.mutable_data_ptr(), c_now}}) {
    STD_TORCH_CHECK(cudaMemcpyAsync(to, from, state, cudaMemcpyDeviceToDevice, stream) == cudaSuccess,
                    "the last state cannot be copied");
  }
  return {y, h_last, c_last};
}

// --- index lists ----------------------------------------------------------------------------------------------------
// `table` [layers, sizeof(ListsLayer) / 8] int64 and `first` [layers + 1] int32, on the device: the masks, the lists
// and their work space, by address; whoever made the table keeps them alive. `ticket` int32 [2], zero.
void mask_lists_cuda(const Tensor& table, const Tensor& first, const Tensor& ticket, int64_t jobs) {
  const int32_t device = table.get_device_index();
  const DeviceGuard guard(device);
  check_device(first, "first", device);
  check_device(ticket, "ticket", device);
  STD_TORCH_CHECK(ticket.numel() == 2, "ticket has ", ticket.numel(), " entries; want 2");
  check_dense(table, "table", 2);
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && table.size(1) * 8 == sizeof(cuda::ListsLayer),
                  "table must be int64 [layers, ", sizeof(cuda::ListsLayer) / 8, "]");
  const int count = to_int(table.size(0), "layers");
  STD_TORCH_CHECK(first.numel() == count + 1, "first has ", first.numel(), " entries for ", count, " layers");
  const cuda::ListsArgs args{static_cast<const cuda::ListsLayer*>(table.const_data_ptr()), int32_data(first, "first"),
                             const_cast<int32_t*>(int32_data(ticket, "ticket")), count};
  check_launch(cuda::build_lists(args, to_int(jobs, "jobs"), current_stream(device)));
}

int64_t lists_jobs_op(int64_t rows, int64_t cols) {
  return cuda::lists_jobs(to_int(rows, "rows"), to_int(cols, "cols"));
}

int64_t lists_work_op(int64_t rows, int64_t cols) {
  return cuda::lists_work(to_int(rows, "rows"), to_int(cols, "cols"));
}

}  // namespace
}  // namespace sp

STABLE_TORCH_LIBRARY_IMPL(sparse_pathways, CUDA, m) {
  m.impl("strips_pack", TORCH_BOX(&sp::strips_pack_cuda));
  m.impl("strips_linear", TORCH_BOX(&sp::strips_linear_cuda));
  m.impl("strips_lstm", TORCH_BOX(&sp::strips_lstm_cuda));
  m.impl("mask_lists", TORCH_BOX(&sp::mask_lists_cuda));
}

// No tensor among the arguments, so no CUDA key to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(sparse_pathways, CompositeExplicitAutograd, m) {
  m.impl("lists_jobs", TORCH_BOX(&sp::lists_jobs_op));
  m.impl("lists_work", TORCH_BOX(&sp::lists_work_op));
}
