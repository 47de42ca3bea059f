// What the parts of the emulator share: the threads of the block that runs, and the memory that is watched.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulation/engine.h"

namespace sp::emulation {

constexpr unsigned kWarp = 32;
struct Context;  // of a fiber

enum class State { kReady, kBarrier, kWarp, kDone };

struct Event {
  const void* site;
  uintptr_t address;
  uint32_t bytes;
  bool write, shared;
};

struct Thread {
  std::shared_ptr<Context> context;
  char* stack = nullptr;
  Place place;
  State state = State::kDone;
  const void* site = nullptr;  // where it waits
  unsigned id = 0;             // unique within a launch
  bool fenced = false, met_atomic = false;
  uint32_t dirty = 0;  // time of its first write to global memory that no fence covers; 0: none
  std::vector<Event> events;
};

struct Warp {
  void* operands[kWarp];
  unsigned arrived = 0;
  const void* site = nullptr;
  uint32_t interval = 0;  // counts __syncwarp
};

// Who touched a cell last, and in which interval between barriers.
struct Mark {
  uint32_t thread = 0, interval = 0, warp_interval = 0, time = 0;
  const void* site = nullptr;
};
struct Cell {  // two bytes of shared memory (kernels store nothing smaller there), a byte of global memory
  Mark write;
  Mark read[3];  // the last one; the last of another thread of its warp; the last of another warp
};

struct Region {
  std::string name;
  uintptr_t begin = 0, end = 0;
  bool shared = false, constant = false;
  std::vector<Cell> cells;
  uintptr_t cell_bytes() const { return shared ? 2 : 1; }
};

// How far the writes of a block reach: up to `released` for those who have acquired since.
struct Visible {
  uint32_t released = 0, acquired = 0;
};

inline std::vector<std::unique_ptr<Thread>> threads;
inline std::vector<Warp> warps;
inline std::vector<Region> regions(1);  // the first: shared memory
inline unsigned char* shared_memory_now = nullptr;
inline size_t shared_bytes_now = 0;
inline Thread* now = nullptr;         // null: the host runs
inline uint32_t interval = 0;         // counts barriers, and blocks
inline std::vector<Visible> visible;  // per block of the launch
inline uint32_t block_dirty =
    0;  // like Thread::dirty, of the writes before the last barrier: any thread's fence covers them
inline Counters counted;

// Puts the accesses of a warp since its lanes last met together to instructions, and counts them.
void flush_warp(unsigned warp);
uint64_t wavefronts(const std::vector<uintptr_t>& addresses, uint32_t bytes);
// `shift`: on behalf of that many lanes further.
void check_race(Region& region, uintptr_t address, size_t bytes, const void* site, bool write, unsigned shift = 0);

}  // namespace sp::emulation
