// The engine under emulation/cuda.h: runs the blocks of a kernel on the host, every thread a fiber, and watches.
//
// What it finds out about a launch:
//   faults    two threads that touch the same bytes of shared or written global memory, one of them writing, with no
//             barrier in between; barriers and warp operations that not all threads reach; misaligned vector accesses;
//             writes to what the host passed as read-only
//   counters  what a roofline needs: sectors of global memory, wavefronts of shared memory, tensor-core instructions
// Both see the accesses that the compiler instrumented (-fsanitize=thread with the hooks of engine.cpp, not the
// ThreadSanitizer library) and those of the wrappers in emulation/cuda.h. Without instrumentation, as in the
// AddressSanitizer build, they are off; results and out-of-bounds accesses are what that build is for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace sp::emulation {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

struct Counters {
  uint64_t global_load_sectors = 0;   // of 32 bytes, after coalescing within a warp
  uint64_t global_store_sectors = 0;  // like the loads: a sector written in part counts whole
  uint64_t global_atomics = 0;
  uint64_t shared_wavefronts = 0;  // one clock of one multiprocessor each; bank conflicts add some
  uint64_t shared_ideal = 0;       // the same without conflicts
  uint64_t mma_16816 = 0;          // 2048 multiply-adds
  uint64_t mma_1688 = 0;           // 1024
  uint64_t mma_tf32 = 0;           // m16n8k8, 1024, at half the rate
  uint64_t barriers = 0;           // __syncthreads, per block
  uint64_t blocks = 0;
};

enum class Access { kRead, kWrite };

// Global memory of the next launches. Written buffers are checked for races, read-only ones for writes.
void watch(const void* begin, size_t bytes, const char* name, Access access);
void forget(const void* begin);
void watch_nothing();

// Runs `body` once per thread of the grid, blocks one after the other; `limit` > 0 stops after so many blocks, and the
// first `count` are skipped.
void run(Index grid, int threads, size_t shared_bytes, const std::function<void()>& body);
void limit_blocks(uint64_t limit);
void skip_blocks(uint64_t count);

Counters take_counters();
std::vector<std::string> take_faults();

// --- for emulation/cuda.h: what a thread of the running kernel asks for ---------------------------------------------
struct Place {
  Index thread, block, block_dim, grid_dim;
  unsigned lane;
};
const Place& place();
unsigned char* shared_base();
size_t shared_size();
void block_barrier(const void* site);
// All 32 lanes of a warp meet; the last one runs `act` on everybody's operands, in lane order.
void warp_meets(const void* site, void* operand, const std::function<void(void* const*)>& act);
void warp_barrier(const void* site);
void access(const void* site, const void* address, size_t bytes, bool write);
void ldmatrix_trans(const void* site, uint32_t address, uint32_t* out, int matrices);
enum class Matrix { k16816, k1688, kTf32 };
// d[16, 8] += a[16, K] b[K, 8]; `widen` is for the 16-bit formats.
void mma(const void* site, Matrix kind, float (*widen)(uint16_t), float* d, const uint32_t* a, const uint32_t* b);
void fence();
void atomic(const void* site, void* address, size_t bytes);
void fault(const void* site, const std::string& what);

}  // namespace sp::emulation
