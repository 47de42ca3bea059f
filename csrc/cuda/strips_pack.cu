// strips_pack: strips (kernels.h) of a block-sparse weight, from its lists and its blocks or the dense weight.
//
// One warp per list. An input belongs to the list of a strip if any block row that the strip touches keeps its block
// column, so P may be higher than R (a union, filled with zeros) or lower (a block row makes several strips).
// Order: kernels.h. The inputs of the list sorted by bank_of() are dealt to its octets in turn; the place in the sorted
// list comes from ballots, since bank_of() of input 32 i + lane is the same for all i.
// Cost: R x C blocks are looked up by bisection, per input and block row; 2048 x 512 at 30 % reads 0.6 MB and writes
// 0.7.
#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace sp::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarps = 4;

// Entry of block (b, column) in the lists; -1 if it is pruned.
__device__ __forceinline__ int find_block(const PackArgs& args, int b, int column) {
  int low = args.crow[b], high = args.crow[b + 1];
  const int end = high;
  while (low < high) {
    const int middle = (low + high) / 2;
    const int found =
        args.narrow ? static_cast<const uint16_t*>(args.col)[middle] : static_cast<const int32_t*>(args.col)[middle];
    if (found < column) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == end) return -1;
  const int found =
      args.narrow ? static_cast<const uint16_t*>(args.col)[low] : static_cast<const int32_t*>(args.col)[low];
  return found == column ? low : -1;
}

__device__ __forceinline__ bool keeps(const PackArgs& args, int strip, int k) {
  const int last = (strip + 1) * args.p < args.n ? (strip + 1) * args.p : args.n;
  for (int b = strip * args.p / args.r; b <= (last - 1) / args.r; ++b) {
    if (find_block(args, b, k / args.c) >= 0) return true;
  }
  return false;
}

// Bits of output n, input k, of the block with entry e.
template <typename Bits>
__device__ __forceinline__ Bits value(const PackArgs& args, int e, int n, int k) {
  if (args.blocks == nullptr) return static_cast<const Bits*>(args.weight)[n * args.stride + k];
  const int64_t block = args.pos != nullptr ? args.pos[e] : e;
  return static_cast<const Bits*>(args.blocks)[(block * args.c + k % args.c) * args.r + n % args.r];
}

// Lanes whose input has the same bank_of() as this one's, and how many lanes sort before it in all.
struct Residue {
  unsigned same;
  int place;  // of the residue in the order of the slots: even ones first, so that floats find quads without conflict
};

__device__ __forceinline__ int place_of(int k) { return (bank_of(k) & 1) * 4 + (bank_of(k) >> 1); }

__device__ __forceinline__ Residue residue(int lane) {
  Residue r{0, place_of(lane)};
  for (int other = 0; other < 32; ++other) r.same |= static_cast<unsigned>(place_of(other) == r.place) << other;
  return r;
}

__global__ void strips_count(const __grid_constant__ PackArgs args) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int list = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (list >= args.strips * args.chunks) return;
  const int k0 = list % args.chunks * kChunk;
  int count = 0;
  for (int first = 0; first < kChunk && k0 + first < args.k; first += 32) {
    const int k = k0 + first + lane;
    count += __popc(__ballot_sync(kAllLanes, k < args.k && keeps(args, list / args.chunks, k)));
  }
  if (lane == 0) args.begin[list + 1] = octets_of(count);
}

// Running sum of begin[1..], one block. Beyond the capacity all lists become empty.
__global__ void strips_sum(const __grid_constant__ PackArgs args) {
  constexpr int kThreads = 1024;
  int* sums = reinterpret_cast<int*>(shared_memory());  // [32]
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int lists = args.strips * args.chunks;
  int before = 0;
  for (int first = 0; first < lists; first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    int sum = i < lists ? args.begin[i + 1] : 0;
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, static_cast<unsigned>(d));
      if (lane >= d) sum += other;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    int all = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) sum += sums[w];
      all += sums[w];
    }
    if (i < lists) args.begin[i + 1] = before + sum;
    before += all;
    __syncthreads();
  }
  if (before > args.capacity) {
    for (int i = static_cast<int>(threadIdx.x); i < lists; i += kThreads) args.begin[i + 1] = 0;
  }
  if (threadIdx.x == 0) {
    args.begin[0] = 0;
    args.state[0] = before;
  }
}

template <typename Bits>
__global__ void strips_fill(const __grid_constant__ PackArgs args) {
  constexpr int kValuesPerWord = 4 / static_cast<int>(sizeof(Bits));
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int list = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (list >= args.strips * args.chunks) return;
  const int strip = list / args.chunks, k0 = list % args.chunks * kChunk;
  const int begin = args.begin[list], octets = args.begin[list + 1] - begin;
  if (octets == 0) return;
  const Residue mine = residue(lane);
  const unsigned before_me = (1u << lane) - 1;

  int sorted = 0, count = 0;  // inputs that sort before all of this residue; inputs in all
  for (int first = 0; first < kChunk && k0 + first < args.k; first += 32) {
    const int k = k0 + first + lane;
    const unsigned kept = __ballot_sync(kAllLanes, k < args.k && keeps(args, strip, k));
    count += __popc(kept);
    for (int other = 0; other < 16; ++other) {  // bank_of() repeats after 16
      if (place_of(other) < mine.place) sorted += __popc(kept >> other & 0x10001u);
    }
  }

  Bits* values = static_cast<Bits*>(args.values);
  const auto put = [&](int place, int n, Bits bits) {  // place: in the sorted list; n: output within the strip
    const int octet = begin + place % octets, slot = place / octets;
    const int owner = n % 8 * 4 + (kValuesPerWord == 2 ? slot / 2 : slot % 4);
    const int inner = kValuesPerWord == 2 ? slot % 2 : slot / 4;
    values[((static_cast<int64_t>(octet) * 32 + owner) * (args.p / 8) + n / 8) * 2 + inner] = bits;
  };

  for (int first = 0; first < kChunk && k0 + first < args.k; first += 32) {
    const int k = k0 + first + lane;
    const bool kept = k < args.k && keeps(args, strip, k);
    const unsigned lanes = __ballot_sync(kAllLanes, kept) & mine.same;
    const int place = sorted + __popc(lanes & before_me);
    sorted += __popc(lanes);
    if (!kept) continue;
    args.ids[static_cast<int64_t>(begin + place % octets) * 8 + place / octets] = static_cast<uint16_t>(k - k0);
    int b = -1, e = -1;
    for (int i = 0; i < args.p; ++i) {
      const int n = strip * args.p + i;
      if (n < args.n && n / args.r != b) {
        b = n / args.r;
        e = find_block(args, b, k / args.c);
      }
      put(place, i, n < args.n && e >= 0 ? value<Bits>(args, e, n, k) : Bits{0});
    }
  }
  __syncwarp();  // the fillers below read what other lanes wrote
  for (int place = count + lane; place < octets * 8; place += 32) {
    uint16_t* ids = args.ids + static_cast<int64_t>(begin + place % octets) * 8;
    ids[place / octets] = ids[0];
    for (int i = 0; i < args.p; ++i) put(place, i, Bits{0});
  }
}

int blocks(const PackArgs& args) { return (args.strips * args.chunks + kWarps - 1) / kWarps; }

}  // namespace

const char* pack_count(const PackArgs& args, Stream stream) {
  const int grid = blocks(args);
  if (grid > 0) {
    if (const char* error = launch<strips_count>(dim3(static_cast<unsigned>(grid)), kWarps * 32, 0, stream, args)) {
      return error;
    }
  }
  return launch<strips_sum>(dim3(1), 1024, 32 * sizeof(int), stream, args);
}

const char* pack_fill(const PackArgs& args, Stream stream) {
  const int grid = blocks(args);
  if (grid == 0) return nullptr;
  if (args.dtype == Dtype::kFloat) {
    return launch<strips_fill<uint32_t>>(dim3(static_cast<unsigned>(grid)), kWarps * 32, 0, stream, args);
  }
  return launch<strips_fill<uint16_t>>(dim3(static_cast<unsigned>(grid)), kWarps * 32, 0, stream, args);
}

}  // namespace sp::cuda
