// Who touched what: faults and counters.
#include <dlfcn.h>
#include <stdio.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "emulation/state.h"

namespace sp::emulation {
namespace {

uint32_t clock_now = 0;
std::vector<std::string> faults;
std::map<const void*, bool> faulty_sites;

std::string where(const void* site) {
  Dl_info info;
  if (site == nullptr || dladdr(site, &info) == 0) return "?";
  char command[4096], line[1024] = "?";
  snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
           static_cast<size_t>(static_cast<const char*>(site) - static_cast<const char*>(info.dli_fbase)) - 1);
  if (FILE* pipe = popen(command, "r")) {
    if (fgets(line, sizeof line, pipe) == nullptr) line[0] = '?', line[1] = 0;
    pclose(pipe);
  }
  const std::string text(line);
  const size_t slash = text.rfind('/');
  std::string name = slash == std::string::npos ? text : text.substr(slash + 1);
  while (!name.empty() && (name.back() == '\n' || name.back() == ' ')) name.pop_back();
  return name;
}

std::string who(unsigned id) {
  return "block " + std::to_string((id - 1) / 1024) + " thread " + std::to_string((id - 1) % 1024);
}

// Printed at once: a wrong index may crash the kernel before its launch returns.
void add_fault(const std::string& what) {
  faults.push_back(what);
  printf("     %s\n", what.c_str());
  fflush(stdout);
}

}  // namespace

void fault(const void* site, const std::string& what) {
  if (faulty_sites[site]) return;
  faulty_sites[site] = true;
  add_fault(what + " (" + where(site) + (now != nullptr ? ", " + who(now->id) : "") + ")");
}

// --- counters -------------------------------------------------------------------------------------------------------
// Clocks
// that shared memory needs for one instruction: accesses of 4 bytes go 32 at a time, of 8 16, of 16 8; in each turn
// every bank serves one word.
uint64_t wavefronts(const std::vector<uintptr_t>& addresses, uint32_t bytes) {
  const size_t turn = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
  uint64_t sum = 0;
  for (size_t first = 0; first < addresses.size(); first += turn) {
    std::array<std::vector<uintptr_t>, 32> banks;
    size_t longest = 0;
    for (size_t i = first; i < std::min(first + turn, addresses.size()); ++i) {
      for (uintptr_t word = addresses[i] / 4; word <= (addresses[i] + bytes - 1) / 4; ++word) {
        auto& bank = banks[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        longest = std::max(longest, bank.size());
      }
    }
    sum += longest;
  }
  return sum;
}

// The accesses of the lanes of one warp since they last met, put together to instructions: the n-th execution of one
// place in the code by every lane.
void flush_warp(unsigned warp) {
  struct Item {
    const void* site;
    unsigned turn, lane;
    const Event* event;
  };
  std::vector<Item> items;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    std::map<const void*, unsigned> turns;
    for (const Event& event : threads[warp * kWarp + lane]->events) {
      items.push_back({event.site, turns[event.site]++, lane, &event});
    }
  }
  std::sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return std::tie(a.site, a.turn, a.lane) < std::tie(b.site, b.turn, b.lane);
  });
  for (size_t i = 0; i < items.size();) {
    size_t j = i;
    std::vector<uintptr_t> addresses, sectors;
    for (; j < items.size() && items[j].site == items[i].site && items[j].turn == items[i].turn; ++j) {
      const Event& event = *items[j].event;
      addresses.push_back(event.address - (event.shared ? regions[0].begin : 0));
      for (uintptr_t s = event.address / 32; s <= (event.address + event.bytes - 1) / 32; ++s) sectors.push_back(s);
    }
    const Event& first = *items[i].event;
    if (first.shared) {
      counted.shared_wavefronts += wavefronts(addresses, first.bytes);
      counted.shared_ideal += (addresses.size() * first.bytes + 127) / 128;
    } else {
      std::sort(sectors.begin(), sectors.end());
      const auto distinct = std::unique(sectors.begin(), sectors.end()) - sectors.begin();
      (first.write ? counted.global_store_sectors : counted.global_load_sectors) += static_cast<uint64_t>(distinct);
    }
    i = j;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) threads[warp * kWarp + lane]->events.clear();
}

// --- races ----------------------------------------------------------------------------------------------------------
#if defined(SP_EMULATION_TRACE)
static bool ordered(const Mark& before, const Thread& me) {
  if (before.thread == 0 || before.thread == me.id) return true;
  const unsigned its_block = (before.thread - 1) / 1024, my_block = (me.id - 1) / 1024;
  if (its_block != my_block) {
    return before.time < visible[its_block].released && visible[its_block].released <= visible[my_block].acquired;
  }
  if (before.interval != interval) return true;
  const unsigned its_warp = (before.thread - 1) % 1024 / kWarp, my_warp = (me.id - 1) % 1024 / kWarp;
  return its_warp == my_warp && before.warp_interval != warps[my_warp].interval;
}

static void report_race(const Region& region, uintptr_t address, const Mark& before, bool before_wrote,
                        const void* site, bool write) {
  if (faulty_sites[site]) return;
  faulty_sites[site] = true;
  char offset[32];
  snprintf(offset, sizeof offset, "+0x%zx", static_cast<size_t>(address - region.begin));
  add_fault("race on " + region.name + offset + ": " + who(now->id) + (write ? " writes at " : " reads at ") +
            where(site) + " what " + who(before.thread) + (before_wrote ? " wrote at " : " read at ") +
            where(before.site) + ", no barrier in between");
}

void check_race(Region& region, uintptr_t address, size_t bytes, const void* site, bool write, unsigned shift) {
  Thread me_shifted;  // ldmatrix: read on behalf of another lane, too
  const Thread* me = now;
  const unsigned id = shift == 0 ? me->id : (me->id - 1) / kWarp * kWarp + ((me->id - 1) + shift) % kWarp + 1;
  if (shift != 0) me_shifted.id = id, me = &me_shifted;
  const unsigned warp = (id - 1) % 1024 / kWarp;
  const Mark mark{id, interval, warps[warp].interval, ++clock_now, site};
  const uintptr_t first = (address - region.begin) / region.cell_bytes();
  const uintptr_t last_cell = (address + bytes - 1 - region.begin) / region.cell_bytes();
  for (uintptr_t c = first; c <= last_cell; ++c) {
    Cell& cell = region.cells[c];
    if (!ordered(cell.write, *me)) report_race(region, address, cell.write, true, site, write);
    if (write) {
      if (!region.shared && now->dirty == 0) now->dirty = mark.time;
      for (const Mark& read : cell.read) {
        if (!ordered(read, *me)) report_race(region, address, read, false, site, write);
      }
      cell.write = mark;
      continue;
    }
    Mark& last = cell.read[0];
    if (last.thread != 0 && last.thread != id) {
      cell.read[(last.thread - 1) / kWarp == (id - 1) / kWarp ? 1 : 2] = last;
    }
    last = mark;
  }
}

static Region* find(uintptr_t address) {
  for (Region& region : regions) {
    if (address >= region.begin && address < region.end) return &region;
  }
  return nullptr;
}

#endif

// --- accesses, fences -----------------------------------------------------------------------------------------------
void fence() {
  now->fenced = true;
  now->dirty = block_dirty = 0;
  if (now->met_atomic) visible[(now->id - 1) / 1024].acquired = ++clock_now;
}

void atomic(const void*, void*, size_t) {
  ++counted.global_atomics;
  if (now->fenced) {
    // What is not behind a fence of the thread that wrote it, or of any thread after a barrier, is not released.
    uint32_t until = ++clock_now;
    if (block_dirty != 0) until = std::min(until, block_dirty);
    for (const auto& thread : threads) {
      if (thread->dirty != 0) until = std::min(until, thread->dirty);
    }
    uint32_t& released = visible[(now->id - 1) / 1024].released;
    released = std::max(released, until);
  }
  now->met_atomic = true;
  now->fenced = false;
}

void access(const void* site, const void* address, size_t bytes, bool write) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (now == nullptr) return;
  if (at % bytes != 0 && (bytes == 8 || bytes == 16)) fault(site, "misaligned vector access");
#if defined(SP_EMULATION_TRACE)
  Region* region = find(at);
  if (region == nullptr) return;
  if (at + bytes > region->end) fault(site, "access past the end of " + region->name);
  if (region->constant && write) fault(site, "write to " + region->name + ", which is read-only");
  now->events.push_back({site, at, static_cast<uint32_t>(bytes), write, region->shared});
  if (!region->constant) check_race(*region, at, std::min<size_t>(bytes, region->end - at), site, write);
#else
  (void)write;
#endif
}

void watch(const void* begin, size_t bytes, const char* name, Access access) {
  Region region;
  region.name = name;
  region.begin = reinterpret_cast<uintptr_t>(begin);
  region.end = region.begin + bytes;
  region.constant = access == Access::kRead;
  if (!region.constant) region.cells.resize(bytes);
  regions.push_back(std::move(region));
}

// Memory given back may be given out again, for something else and of another size.
void forget(const void* begin) {
  const auto is_it = [&](const Region& region) { return region.begin == reinterpret_cast<uintptr_t>(begin); };
  regions.erase(std::remove_if(regions.begin() + 1, regions.end(), is_it), regions.end());
}

void watch_nothing() { regions.resize(1); }

Counters take_counters() {
  const Counters taken = counted;
  counted = Counters{};
  return taken;
}

std::vector<std::string> take_faults() {
  std::vector<std::string> taken;
  taken.swap(faults);
  faulty_sites.clear();
  return taken;
}

}  // namespace sp::emulation

// --- what -fsanitize=thread calls for every access in the kernels ---------------------------------------------------
#if defined(SP_EMULATION_TRACE)
#define SP_HOOK(name, bytes, write)                                                                 \
  extern "C" void name(void* address) {                                                             \
    sp::emulation::access(__builtin_return_address(0), address, static_cast<size_t>(bytes), write); \
  }
SP_HOOK(__tsan_read1, 1, false)
SP_HOOK(__tsan_read2, 2, false)
SP_HOOK(__tsan_read4, 4, false)
SP_HOOK(__tsan_read8, 8, false)
SP_HOOK(__tsan_read16, 16, false)
SP_HOOK(__tsan_write1, 1, true)
SP_HOOK(__tsan_write2, 2, true)
SP_HOOK(__tsan_write4, 4, true)
SP_HOOK(__tsan_write8, 8, true)
SP_HOOK(__tsan_write16, 16, true)
SP_HOOK(__tsan_unaligned_read2, 2, false)
SP_HOOK(__tsan_unaligned_read4, 4, false)
SP_HOOK(__tsan_unaligned_read8, 8, false)
SP_HOOK(__tsan_unaligned_read16, 16, false)
SP_HOOK(__tsan_unaligned_write2, 2, true)
SP_HOOK(__tsan_unaligned_write4, 4, true)
SP_HOOK(__tsan_unaligned_write8, 8, true)
SP_HOOK(__tsan_unaligned_write16, 16, true)
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_read_range(void*, size_t) {}
extern "C" void __tsan_write_range(void*, size_t) {}
#endif
