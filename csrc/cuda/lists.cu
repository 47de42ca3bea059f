// mask_lists: bits, crow, col, row, crow_t, row_t, pos_t of the block masks of all layers, in one launch.
//
// Nothing leaves the device: memory has a fixed capacity, the number of blocks stays in `state`, and so a graph can be
// captured once and replayed over changing masks. Two phases. The blocks of the second wait for all of the first of the
// same layer. Blocks take their numbers from a ticket as they start, so what they wait for has been started before.
//   1  rows: count, prefix at every 32nd column, bits   columns: count
//   2  rows: crow, col, row                             columns: crow_t, row_t, pos_t
// A warp takes a row, or 32 columns; the place of a block in row order is the count of the rows above, plus the prefix,
// plus a ballot.
// Limits  rows * cols below 2^31
// Cost    the mask is read four times, from L2 after the first; each warp adds up the counts before its own
#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace sp::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;

constexpr int row_blocks(int rows) { return rows > kWarps ? (rows + kWarps - 1) / kWarps : 1; }

__device__ __forceinline__ void put_id(void* ids, int64_t at, int id, bool narrow) {
  if (narrow) {
    static_cast<uint16_t*>(ids)[at] = static_cast<uint16_t>(id);
  } else {
    static_cast<int32_t*>(ids)[at] = id;
  }
}

// Sum of counts[0 .. end), in every lane.
__device__ __forceinline__ int warp_sum(const int32_t* counts, int end, int lane) {
  int sum = 0;
  for (int i = lane; i < end; i += 32) sum += counts[i];
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
  return sum;
}

struct Layer : ListsLayer {
  __device__ __forceinline__ explicit Layer(const ListsLayer& from)
      : ListsLayer(from), rows(static_cast<int>(from.rows)), cols(static_cast<int>(from.cols)) {}
  int rows, cols;
};

struct Work {
  int32_t* tickets;   // [0]: blocks of phase 1 that are done; [1]: of phase 2
  int32_t* counts;    // [rows]
  int32_t* counts_t;  // [cols]
  int32_t* prefix;    // [rows, stripes]
};

__device__ __forceinline__ void count_rows(const Layer& layer, const Work& work, int job, int warp, int lane) {
  const int r = job * kWarps + warp;
  if (r < layer.rows) {
    int count = 0;
    for (int s = 0; s < lists_stripes(layer.cols); ++s) {
      const int c = s * 32 + lane;
      if (lane == 0) work.prefix[static_cast<int64_t>(r) * lists_stripes(layer.cols) + s] = count;
      const bool kept = c < layer.cols && layer.mask[static_cast<int64_t>(r) * layer.cols + c] != 0;
      count += __popc(__ballot_sync(kAllLanes, kept));
    }
    if (lane == 0) work.counts[r] = count;
  }
  // The rows of a block are a multiple of 8, so its bits are whole bytes.
  const int64_t all = static_cast<int64_t>(layer.rows) * layer.cols;
  const int64_t begin = static_cast<int64_t>(job) * kWarps * layer.cols, end = begin + int64_t{kWarps} * layer.cols;
  for (int64_t i = begin + 8 * static_cast<int64_t>(threadIdx.x); i < end && i < all; i += 8 * kThreads) {
    unsigned bits = 0;
    for (int j = 0; j < 8 && i + j < all; ++j) bits |= static_cast<unsigned>(layer.mask[i + j] != 0) << j;
    layer.bits[i / 8] = static_cast<uint8_t>(bits);
  }
}

// Kept blocks of column c in rows [r0, r1).
__device__ __forceinline__ int count_column(const Layer& layer, int c, int r0, int r1) {
  int count = 0;
  if (c < layer.cols) {
    for (int r = r0; r < r1; ++r) count += layer.mask[static_cast<int64_t>(r) * layer.cols + c] != 0;
  }
  return count;
}

// The rows of one stripe are shared out among the warps; sums [kWarps, 32] of each warp and column.
__device__ __forceinline__ void count_columns(const Layer& layer, const Work& work, int stripe, int warp, int lane,
                                              int* sums) {
  const int share = (layer.rows + kWarps - 1) / kWarps, c = stripe * 32 + lane;
  const int r0 = warp * share, r1 = r0 + share < layer.rows ? r0 + share : layer.rows;
  sums[warp * 32 + lane] = count_column(layer, c, r0, r1);
  __syncthreads();
  if (warp == 0 && c < layer.cols) {
    int count = 0;
    for (int w = 0; w < kWarps; ++w) count += sums[w * 32 + lane];
    work.counts_t[c] = count;
  }
}

__device__ __forceinline__ void fill_rows(const Layer& layer, const Work& work, int job, int warp, int lane,
                                          bool fits) {
  const int r = job * kWarps + warp;
  if (r == 0 && lane == 0) layer.crow[0] = 0;
  if (r >= layer.rows) return;
  int at = warp_sum(work.counts, r, lane);
  if (lane == 0) layer.crow[r + 1] = fits ? at + work.counts[r] : 0;
  if (!fits) return;
  for (int s = 0; s < lists_stripes(layer.cols); ++s) {
    const int c = s * 32 + lane;
    const bool kept = c < layer.cols && layer.mask[static_cast<int64_t>(r) * layer.cols + c] != 0;
    const unsigned lanes = __ballot_sync(kAllLanes, kept);
    if (kept) {
      const int mine = at + __popc(lanes & ((1u << lane) - 1));
      put_id(layer.col, mine, c, layer.cols <= 1 << 16);
      put_id(layer.row, mine, r, layer.rows <= 1 << 16);
    }
    at += __popc(lanes);
  }
}

__device__ __forceinline__ void fill_columns(const Layer& layer, const Work& work, int stripe, int warp, int lane,
                                             bool fits, int* sums) {
  const int share = (layer.rows + kWarps - 1) / kWarps, c = stripe * 32 + lane;
  const int r0 = warp * share, r1 = r0 + share < layer.rows ? r0 + share : layer.rows;
  int* begins = sums + kWarps * 32;  // [32]: of the columns, in column order
  if (warp == 0) {
    int end = c < layer.cols ? work.counts_t[c] : 0;
    const int mine = end;
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(kAllLanes, end, static_cast<unsigned>(d));
      if (lane >= d) end += other;
    }
    end += warp_sum(work.counts_t, stripe * 32 < layer.cols ? stripe * 32 : layer.cols, lane);
    begins[lane] = end - mine;
    if (c < layer.cols) layer.crow_t[c + 1] = fits ? end : 0;
    if (c == 0) layer.crow_t[0] = 0;
  }
  sums[warp * 32 + lane] = count_column(layer, c, r0, r1);
  __syncthreads();
  if (!fits) return;
  int at = begins[lane];
  for (int w = 0; w < warp; ++w) at += sums[w * 32 + lane];
  int above = warp_sum(work.counts, r0 < layer.rows ? r0 : layer.rows, lane);
  for (int r = r0; r < r1; ++r) {
    const bool kept = c < layer.cols && layer.mask[static_cast<int64_t>(r) * layer.cols + c] != 0;
    const unsigned lanes = __ballot_sync(kAllLanes, kept);
    if (kept) {
      put_id(layer.row_t, at, r, layer.rows <= 1 << 16);
      layer.pos_t[at] = above + work.prefix[static_cast<int64_t>(r) * lists_stripes(layer.cols) + stripe] +
                        __popc(lanes & ((1u << lane) - 1));
      ++at;
    }
    above += work.counts[r];
  }
}

__global__ void __launch_bounds__(kThreads) mask_lists(const __grid_constant__ ListsArgs args) {
  int* sums = reinterpret_cast<int*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) sums[0] = atomicAdd(&args.ticket[0], 1);
  __syncthreads();
  const int number = sums[0];
  __syncthreads();                 // before `sums` is written again
  int low = 0, high = args.count;  // the last layer that begins at or before this block
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (args.first[middle] <= number ? low : high) = middle;
  }
  const Layer layer(args.layers[low]);
  const int by_row = row_blocks(layer.rows), half = by_row + lists_stripes(layer.cols);
  int job = number - args.first[low];
  const Work work{layer.work, layer.work + 2, layer.work + 2 + layer.rows, layer.work + 2 + layer.rows + layer.cols};

  const bool first_phase = job < half;
  if (!first_phase) {
    job -= half;
    if (threadIdx.x == 0) wait_for(work.tickets, half);
    __syncthreads();
  }
  if (first_phase) {
    if (job < by_row) {
      count_rows(layer, work, job, warp, lane);
    } else {
      count_columns(layer, work, job - by_row, warp, lane, sums);
    }
  } else {
    const int blocks = warp_sum(work.counts, layer.rows, lane);
    if (job < by_row) {
      fill_rows(layer, work, job, warp, lane, blocks <= layer.capacity);
    } else {
      fill_columns(layer, work, job - by_row, warp, lane, blocks <= layer.capacity, sums);
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x != 0) return;
  const int before = atomicAdd(&work.tickets[first_phase ? 0 : 1], 1);
  if (!first_phase && before == half - 1) {  // the last one leaves everything as the next build expects it
    __threadfence();
    int blocks = 0;
    for (int r = 0; r < layer.rows; ++r) blocks += work.counts[r];
    layer.state[kNnz] = blocks;
    layer.state[kOverflow] = blocks > layer.capacity;
    layer.state[kEpoch] += 1;
    work.tickets[0] = work.tickets[1] = 0;
  }
  if (atomicAdd(&args.ticket[1], 1) == static_cast<int>(gridDim.x) - 1) args.ticket[0] = args.ticket[1] = 0;
}

}  // namespace

int lists_jobs(int rows, int cols) { return 2 * (row_blocks(rows) + lists_stripes(cols)); }

const char* build_lists(const ListsArgs& args, int jobs, Stream stream) {
  if (jobs == 0) return nullptr;
  return launch<mask_lists>(dim3(static_cast<unsigned>(jobs)), kThreads, (kWarps + 1) * 32 * sizeof(int), stream, args);
}

}  // namespace sp::cuda
