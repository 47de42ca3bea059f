// strips_lstm_step: one time step of an LSTM, both weights in strips of 8: products, gates, new cells and outputs in
// one launch; with LayerNorm over the gates and over the cells (torchaudio's predictor) as well.
//
// A block takes 8 hidden units of 16 rows: the four strips that hold their input, forget, cell and output gates, in
// both weights. Its 8 warps share each list out among them and add their sums up in shared memory, where a thread then
// finds all four gates of a unit. With normalisation the gates go to memory as floats, and the last block to finish a
// row tile (a ticket per tile) normalises its 16 rows: no second launch, no cluster.
//
// x, h, c  row-major [rows, E or H], contiguous; one type, float16, bfloat16 or float32
// Maths    sums, gates, statistics and the new cell in float; c' and h' are rounded at the store, h' comes from c'
//          before rounding
// Limits   H a multiple of 8; lstm_fits() says whether x and h of 16 rows fit shared memory (E + H <= 4600, floats
// 2300) Cost     bound by latency: x and h of 16 rows are staged by each of H / 8 blocks (32 KB at E = H = 512, from
// L2), weights
//          are read once per 16 rows. The normalisation adds a trip through L2 and 16 rows' work on one multiprocessor.
#include "cuda/strips.cuh"

namespace sp::cuda {
namespace {

constexpr int kRows = 16;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kGates = 4;
constexpr int kPartialBytes = kWarps * kGates * 4 * 32 * 4;

template <typename T>
__device__ __forceinline__ float read(const void* from, int64_t i) {
  return T::widen(static_cast<const typename T::Bits*>(from)[i]);
}

template <typename T>
__device__ __forceinline__ void write(void* to, int64_t i, float v) {
  static_cast<typename T::Bits*>(to)[i] = T::narrow(v);
}

__device__ __forceinline__ float lanes_sum(float v) {
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(kAllLanes, v, d);
  return v;
}

// acc[gate] += the lists of unit octet `octet` in w, on a tile that starts at input 0.
template <typename T>
__device__ __forceinline__ void accumulate_gates(float (&acc)[kGates][1][1][4], const Strips& w,
                                                 const unsigned char* tile, int octet, int octets, int warp) {
  SP_UNROLL
  for (int gate = 0; gate < kGates; ++gate) {
    for (int chunk = 0; chunk < w.chunks; ++chunk) {
      accumulate<T, 8, kRows, 1>(acc[gate], w, (gate * octets + octet) * w.chunks + chunk,
                                 tile + chunk * kChunk * Tile<T, kRows>::kRow, 0, warp, kWarps);
    }
  }
}

// Normalises gates and cells of one row, one warp. `cells` [H]: scratch of the warp.
template <typename T>
__device__ __forceinline__ void normalise_row(const LstmStepArgs& args, int row, float* cells, int lane) {
  const int hidden = args.hidden, all = kGates * hidden;
  const float* gates = args.gates + static_cast<int64_t>(row) * all;
  const int64_t first = static_cast<int64_t>(row) * hidden;
  float sum = 0.0f;
  for (int i = lane; i < all; i += 32) sum += gates[i];
  const float mean = lanes_sum(sum) / static_cast<float>(all);
  sum = 0.0f;
  for (int i = lane; i < all; i += 32) sum += (gates[i] - mean) * (gates[i] - mean);
  const float scale = rsqrtf(lanes_sum(sum) / static_cast<float>(all) + args.g_eps);
  const auto gate = [&](int i) {
    return (gates[i] - mean) * scale * read<T>(args.g_weight, i) + read<T>(args.g_bias, i);
  };
  sum = 0.0f;
  for (int u = lane; u < hidden; u += 32) {
    const float cell = sigmoid(gate(hidden + u)) * read<T>(args.c, first + u) +
                       sigmoid(gate(u)) * hyperbolic_tangent(gate(2 * hidden + u));
    cells[u] = cell;
    sum += cell;
  }
  const float cell_mean = lanes_sum(sum) / static_cast<float>(hidden);
  sum = 0.0f;
  for (int u = lane; u < hidden; u += 32) sum += (cells[u] - cell_mean) * (cells[u] - cell_mean);
  const float cell_scale = rsqrtf(lanes_sum(sum) / static_cast<float>(hidden) + args.c_eps);
  for (int u = lane; u < hidden; u += 32) {
    const float cell = (cells[u] - cell_mean) * cell_scale * read<T>(args.c_weight, u) + read<T>(args.c_bias, u);
    write<T>(args.c_next, first + u, cell);
    write<T>(args.h_next, first + u, sigmoid(gate(3 * hidden + u)) * hyperbolic_tangent(cell));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) strips_lstm_step(const __grid_constant__ LstmStepArgs args) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int octet = static_cast<int>(blockIdx.x), octets = static_cast<int>(gridDim.x);
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * kRows;
  const int hidden = args.hidden, width = args.x != nullptr ? args.ih.k : 0;
  unsigned char* x_tile = shared_memory();
  unsigned char* h_tile = x_tile + tile_rows(width) * Tile<T, kRows>::kRow;
  float* partial = reinterpret_cast<float*>(h_tile + tile_rows(hidden) * Tile<T, kRows>::kRow);
  const auto aligned = [](const void* at, int stride) {
    return reinterpret_cast<uintptr_t>(at) % 16 == 0 && stride * kBytes<T> % 16 == 0;
  };
  if (args.x != nullptr) {
    fill_tile<T, kRows>(x_tile, args.x, width, m0, args.rows, 0, width, width, aligned(args.x, width));
  }
  fill_tile<T, kRows>(h_tile, args.h, hidden, m0, args.rows, 0, hidden, hidden, aligned(args.h, hidden));
  __syncthreads();

  float acc[kGates][1][1][4] = {};
  if (args.x != nullptr) accumulate_gates<T>(acc, args.ih, x_tile, octet, octets, warp);
  accumulate_gates<T>(acc, args.hh, h_tile, octet, octets, warp);
  SP_UNROLL
  for (int gate = 0; gate < kGates; ++gate) {
    SP_UNROLL
    for (int i = 0; i < 4; ++i) partial[((warp * kGates + gate) * 4 + i) * 32 + lane] = acc[gate][0][0][i];
  }
  __syncthreads();

  // Thread 32 i + lane: sum i of that lane, a row and a unit.
  const int i = warp, row = lane / 4 + i / 2 * 8, unit = octet * 8 + 2 * (lane % 4) + i % 2;
  const int64_t m = m0 + row;
  if (i < 4 && m < args.rows) {
    float gates[kGates];
    SP_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      const int n = gate * hidden + unit;
      float sum = args.bias_ih != nullptr ? read<T>(args.bias_ih, n) : 0.0f;
      if (args.bias_hh != nullptr) sum += read<T>(args.bias_hh, n);
      if (args.input != nullptr) sum += read<T>(args.input, m * kGates * hidden + n);
      for (int w = 0; w < kWarps; ++w) sum += partial[((w * kGates + gate) * 4 + i) * 32 + lane];
      gates[gate] = sum;
      if (args.g_weight != nullptr) args.gates[m * kGates * hidden + n] = sum;
    }
    if (args.g_weight == nullptr) {
      const float cell =
          sigmoid(gates[1]) * read<T>(args.c, m * hidden + unit) + sigmoid(gates[0]) * hyperbolic_tangent(gates[2]);
      write<T>(args.c_next, m * hidden + unit, cell);
      write<T>(args.h_next, m * hidden + unit, sigmoid(gates[3]) * hyperbolic_tangent(cell));
    }
  }
  if (args.g_weight == nullptr) return;

  int* last = reinterpret_cast<int*>(partial);
  __threadfence();
  __syncthreads();  // also: everybody has read the partial sums
  if (threadIdx.x == 0) {
    *last = atomicAdd(&args.tickets[blockIdx.y], 1) == octets - 1;
    __threadfence();
  }
  __syncthreads();
  if (*last == 0) return;
  float* cells = reinterpret_cast<float*>(x_tile) + warp * hidden;  // the tiles are no longer needed
  for (int r = warp; r < kRows && m0 + r < args.rows; r += kWarps) {
    normalise_row<T>(args, static_cast<int>(m0) + r, cells, lane);
    __syncwarp();
  }
  if (threadIdx.x == 0) args.tickets[blockIdx.y] = 0;
}

size_t shared_bytes(const LstmStepArgs& args, Dtype dtype) {
  const int width = args.x != nullptr ? args.ih.k : 0;
  return static_cast<size_t>(tile_rows(width) + tile_rows(args.hidden)) * kRows * size_of(dtype) + kPartialBytes;
}

template <typename T>
const char* run(const LstmStepArgs& args, Dtype dtype, Stream stream) {
  if (args.rows > kMaxGridY * kRows) return "more than 1048560 rows";
  const dim3 grid(static_cast<unsigned>(args.hidden / 8), static_cast<unsigned>((args.rows + kRows - 1) / kRows));
  return launch<strips_lstm_step<T>>(grid, kThreads, shared_bytes(args, dtype), stream, args);
}

}  // namespace

bool lstm_fits(int width, int hidden, Dtype dtype) {
  const size_t tiles = static_cast<size_t>(tile_rows(width) + tile_rows(hidden)) * kRows * size_of(dtype);
  return hidden % 8 == 0 && tiles + kPartialBytes <= kMaxSharedBytes;
}

const char* lstm_step(const LstmStepArgs& args, Dtype dtype, Stream stream) {
  if (args.rows == 0 || args.hidden == 0) return nullptr;
  switch (dtype) {
    case Dtype::kFloat:
      return run<FloatType>(args, dtype, stream);
    case Dtype::kHalf:
      return run<HalfType>(args, dtype, stream);
    default:
      return run<Bf16Type>(args, dtype, stream);
  }
}

}  // namespace sp::cuda
