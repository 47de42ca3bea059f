#include "emulation/engine.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <random>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace sp::emulation {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kWarp = 32;

// --- fibers
// --------------------------------------------------------------------------------------------------------------
#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
// Saves the registers that a call preserves on the old stack and takes those of the new one.
extern "C" void sp_emulation_switch(void** from, void* to);
asm(R"(
.text
.globl sp_emulation_switch
.hidden sp_emulation_switch
.type sp_emulation_switch, @function
sp_emulation_switch:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sp_emulation_switch, .-sp_emulation_switch
)");
void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;  // 16-byte aligned after the return into `entry`
  *top = reinterpret_cast<void*>(entry);
  context.stack_pointer = top - 6;
}
void swap(Context& from, Context& to) { sp_emulation_switch(&from.stack_pointer, to.stack_pointer); }
#else
using Context = ucontext_t;
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
void swap(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

// --- threads, warps, the block that runs
// -------------------------------------------------------------------------------
enum class State { kReady, kBarrier, kWarp, kDone };

struct Event {
  const void* site;
  uintptr_t address;
  uint32_t bytes;
  bool write, shared;
};

struct Thread {
  Context context;
  char* stack = nullptr;
  Place place;
  State state = State::kDone;
  const void* site = nullptr;  // where it waits
  unsigned id = 0;             // unique within a launch
  bool fenced = false, met_atomic = false;
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

std::vector<char*> stacks;
std::vector<std::unique_ptr<Thread>> threads;
std::vector<Warp> warps;
std::vector<Region> regions(1);  // the first: shared memory
unsigned char* shared_memory_now = nullptr;
size_t shared_bytes_now = 0;
const std::function<void()>* kernel = nullptr;
Thread* now = nullptr;
Context scheduler;
uint32_t interval = 0, clock_now = 0;
struct Visible {
  uint32_t released = 0, acquired = 0;
};
std::vector<Visible> visible;  // per block of the launch
Counters counted;
std::vector<std::string> faults;
std::map<const void*, bool> faulty_sites;
uint64_t block_limit = 0;

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

#if defined(__SANITIZE_ADDRESS__)
void* host_fake_stack;
const void* host_stack;
size_t host_stack_bytes;
#endif

void to_scheduler(Thread& thread, bool last) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, host_stack, host_stack_bytes);
#endif
  (void)last;
  swap(thread.context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &host_stack, &host_stack_bytes);
#endif
}

void flush_warp(unsigned warp);

void thread_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
  (*kernel)();
  now->state = State::kDone;
  to_scheduler(*now, true);
  abort();
}

void resume(Thread& thread) {
  now = &thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&host_fake_stack, thread.stack, kStackBytes);
#endif
  swap(scheduler, thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(host_fake_stack, nullptr, nullptr);
#endif
  now = nullptr;
}

void block_and_wait(State state, const void* site) {
  Thread& me = *now;
  me.state = state;
  me.site = site;
  to_scheduler(me, false);
}

// --- counters
// ------------------------------------------------------------------------------------------------------------ Clocks
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

// --- races
// ---------------------------------------------------------------------------------------------------------------
#if defined(SP_EMULATION_TRACE)
bool ordered(const Mark& before, const Thread& me) {
  if (before.thread == 0 || before.thread == me.id) return true;
  const unsigned its_block = (before.thread - 1) / 1024, my_block = (me.id - 1) / 1024;
  if (its_block != my_block) {
    return before.time < visible[its_block].released && visible[its_block].released <= visible[my_block].acquired;
  }
  if (before.interval != interval) return true;
  const unsigned its_warp = (before.thread - 1) % 1024 / kWarp, my_warp = (me.id - 1) % 1024 / kWarp;
  return its_warp == my_warp && before.warp_interval != warps[my_warp].interval;
}

void report_race(const Region& region, uintptr_t address, const Mark& before, bool before_wrote, const void* site,
                 bool write) {
  if (faulty_sites[site]) return;
  faulty_sites[site] = true;
  char offset[32];
  snprintf(offset, sizeof offset, "+0x%zx", static_cast<size_t>(address - region.begin));
  faults.push_back("race on " + region.name + offset + ": " + who(now->id) + (write ? " writes at " : " reads at ") +
                   where(site) + " what " + who(before.thread) + (before_wrote ? " wrote at " : " read at ") +
                   where(before.site) + ", no barrier in between");
}

void check_race(Region& region, uintptr_t address, size_t bytes, const void* site, bool write, unsigned shift = 0) {
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

Region* find(uintptr_t address) {
  for (Region& region : regions) {
    if (address >= region.begin && address < region.end) return &region;
  }
  return nullptr;
}

#endif

// --- one block
// -----------------------------------------------------------------------------------------------------------
void release_barrier() {
  ++counted.barriers;
  ++interval;
  const void* site = nullptr;
  for (unsigned w = 0; w < warps.size(); ++w) flush_warp(w);
  for (auto& thread : threads) {
    if (thread->state != State::kBarrier) continue;
    if (site != nullptr && thread->site != site) fault(thread->site, "threads of one block wait at different barriers");
    site = thread->site;
    thread->state = State::kReady;
  }
}

bool run_block(std::mt19937& rng) {
  std::vector<unsigned> order(threads.size());
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), rng);
  for (;;) {
    bool progress = false, waiting = false;
    unsigned alive = 0, at_barrier = 0;
    for (unsigned i : order) {
      Thread& thread = *threads[i];
      if (thread.state == State::kReady) {
        resume(thread);
        progress = true;
      }
      alive += thread.state != State::kDone;
      at_barrier += thread.state == State::kBarrier;
      waiting |= thread.state == State::kWarp;
    }
    if (alive == 0) break;
    if (at_barrier == alive) {
      release_barrier();
    } else if (!progress) {
      const Thread& stuck = **std::find_if(threads.begin(), threads.end(), [&](const auto& t) {
        return t->state == (waiting ? State::kWarp : State::kBarrier);
      });
      fault(stuck.site, "deadlock: not all threads reach this barrier or warp operation");
      return false;
    }
  }
  for (unsigned w = 0; w < warps.size(); ++w) flush_warp(w);
  return true;
}

void start_block(Index grid, Index block, int count) {
  for (int i = 0; i < count; ++i) {
    Thread& thread = *threads[static_cast<size_t>(i)];
    const unsigned number = block.x + block.y * grid.x + block.z * grid.x * grid.y;
    thread.place = {{static_cast<unsigned>(i), 0, 0},
                    block,
                    {static_cast<unsigned>(count), 1, 1},
                    grid,
                    static_cast<unsigned>(i) % kWarp};
    thread.state = State::kReady;
    thread.id = number * 1024 + static_cast<unsigned>(i) + 1;
    thread.fenced = thread.met_atomic = false;
    thread.events.clear();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(thread.stack, kStackBytes);  // its last frames were left, not returned from
#endif
    prepare(thread.context, thread.stack, thread_main);
  }
  for (Warp& warp : warps) warp = Warp{};
  memset(shared_memory_now, 0xff, shared_bytes_now);  // NaN, and ids that are out of range
  std::fill(regions[0].cells.begin(), regions[0].cells.end(), Cell{});
  ++interval;
  ++counted.blocks;
}

void set_up_threads(int count) {
  while (stacks.size() < static_cast<size_t>(count)) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    stacks.push_back(static_cast<char*>(memory));
  }
  threads.clear();
  for (int i = 0; i < count; ++i) {
    threads.push_back(std::make_unique<Thread>());
    threads.back()->stack = stacks[static_cast<size_t>(i)];
  }
  warps.assign(static_cast<size_t>(count) / kWarp, Warp{});
}

}  // namespace

// --- host
// ------------------------------------------------------------------------------------------------------------------
void watch(const void* begin, size_t bytes, const char* name, Access access) {
  Region region;
  region.name = name;
  region.begin = reinterpret_cast<uintptr_t>(begin);
  region.end = region.begin + bytes;
  region.constant = access == Access::kRead;
  if (!region.constant) region.cells.resize(bytes);
  regions.push_back(std::move(region));
}

void watch_nothing() { regions.resize(1); }

void limit_blocks(uint64_t limit) { block_limit = limit; }

void run(Index grid, int count, size_t shared_bytes, const std::function<void()>& body) {
  if (count % static_cast<int>(kWarp) != 0 || count > 1024) abort();
  // Exactly as large as asked for: AddressSanitizer sees the byte after the last.
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, std::max<size_t>(shared_bytes, 1)) != 0) abort();
  shared_memory_now = static_cast<unsigned char*>(memory);
  shared_bytes_now = shared_bytes;
  Region& shared = regions[0];
  shared.name = "shared memory";
  shared.shared = true;
  shared.begin = reinterpret_cast<uintptr_t>(memory);
  shared.end = shared.begin + shared_bytes;
  shared.cells.assign(shared_bytes / shared.cell_bytes() + 1, Cell{});
  for (size_t i = 1; i < regions.size(); ++i) {  // one launch after another: ordered
    std::fill(regions[i].cells.begin(), regions[i].cells.end(), Cell{});
  }
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  visible.assign(blocks, Visible{});
  kernel = &body;
  set_up_threads(count);
  std::mt19937 rng(20230913);
  for (uint64_t b = 0; b < (block_limit > 0 ? std::min(block_limit, blocks) : blocks); ++b) {
    const Index block{static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                      static_cast<unsigned>(b / grid.x / grid.y)};
    start_block(grid, block, count);
    if (!run_block(rng)) break;
  }
  free(memory);
  regions[0].begin = regions[0].end = 0;
}

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

// --- threads of the kernel
// ---------------------------------------------------------------------------------------------
const Place& place() { return now->place; }
unsigned char* shared_base() { return shared_memory_now; }
size_t shared_size() { return shared_bytes_now; }

void fault(const void* site, const std::string& what) {
  if (faulty_sites[site]) return;
  faulty_sites[site] = true;
  faults.push_back(what + " (" + where(site) + (now != nullptr ? ", " + who(now->id) : "") + ")");
}

void block_barrier(const void* site) { block_and_wait(State::kBarrier, site); }

void warp_meets(const void* site, void* operand, const std::function<void(void* const*)>& act) {
  Thread& me = *now;
  const unsigned number = me.place.thread.x / kWarp;
  Warp& warp = warps[number];
  if (warp.arrived > 0 && warp.site != site) fault(site, "lanes of one warp meet at different instructions");
  warp.site = site;
  warp.operands[me.place.lane] = operand;
  if (++warp.arrived < kWarp) {
    block_and_wait(State::kWarp, site);
    return;
  }
  act(warp.operands);
  warp.arrived = 0;
  flush_warp(number);
  for (unsigned i = number * kWarp; i < (number + 1) * kWarp; ++i) {
    if (threads[i]->state == State::kWarp) threads[i]->state = State::kReady;
  }
}

void warp_barrier(const void* site) {
  const unsigned number = now->place.thread.x / kWarp;
  warp_meets(site, nullptr, [number](void* const*) { ++warps[number].interval; });
}

void fence() {
  now->fenced = true;
  if (now->met_atomic) visible[(now->id - 1) / 1024].acquired = ++clock_now;
}

void atomic(const void*, void*, size_t) {
  ++counted.global_atomics;
  if (now->fenced) visible[(now->id - 1) / 1024].released = ++clock_now;
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

// --- matrix instructions
// ----------------------------------------------------------------------------------------------- Lane i of each eight
// supplies the address of a row of 16 bytes; matrix j comes from lanes 8j .. 8j + 7. Transposed: lane l gets the
// elements of rows 2 (l % 4) and 2 (l % 4) + 1 in column l / 4.
void ldmatrix_trans(const void* site, uint32_t address, uint32_t* out, int matrices) {
  struct Operand {
    uint32_t address;
    uint32_t* out;
  } mine{address, out};
  warp_meets(site, &mine, [site, matrices](void* const* lanes) {
    unsigned char* rows[kWarp];
    std::vector<uintptr_t> offsets;
    for (int i = 0; i < 8 * matrices; ++i) {
      const uint32_t at = static_cast<Operand*>(lanes[i])->address;
      if (at % 16 != 0 || at + 16 > shared_bytes_now) {
        fault(site, "ldmatrix: row address outside shared memory or not a multiple of 16");
        return;
      }
      rows[i] = shared_memory_now + at;
      offsets.push_back(at);
#if defined(SP_EMULATION_TRACE)
      for (unsigned shift : {0u, 1u}) {  // a row goes to many lanes: no lane may have written it unsynchronised
        check_race(regions[0], reinterpret_cast<uintptr_t>(rows[i]), 16, site, false, shift);
      }
#endif
    }
    counted.shared_wavefronts += wavefronts(offsets, 16);
    counted.shared_ideal += static_cast<uint64_t>(matrices);
    for (int l = 0; l < static_cast<int>(kWarp); ++l) {
      for (int j = 0; j < matrices; ++j) {
        uint16_t low, high;
        memcpy(&low, rows[8 * j + 2 * (l % 4)] + 2 * (l / 4), 2);
        memcpy(&high, rows[8 * j + 2 * (l % 4) + 1] + 2 * (l / 4), 2);
        static_cast<Operand*>(lanes[l])->out[j] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

void mma(const void* site, Matrix kind, float (*widen)(uint16_t), float* d, const uint32_t* a, const uint32_t* b) {
  struct Operand {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  warp_meets(site, &mine, [kind, widen](void* const* lanes) {
    const auto at = [&](int lane) -> const Operand& { return *static_cast<const Operand*>(lanes[lane]); };
    const int depth = kind == Matrix::k16816 ? 16 : 8;
    ++(kind == Matrix::k16816 ? counted.mma_16816 : kind == Matrix::k1688 ? counted.mma_1688 : counted.mma_tf32);
    const auto tf32 = [](uint32_t bits) {
      bits &= 0xffffe000u;
      float f;
      memcpy(&f, &bits, 4);
      return f;
    };
    const auto half = [&](uint32_t word, int which) { return widen(static_cast<uint16_t>(word >> 16 * which)); };
    double left[16][16], right[16][8];
    for (int k = 0; k < depth; ++k) {
      for (int row = 0; row < 16; ++row) {
        left[k][row] = kind == Matrix::kTf32 ? tf32(at(row % 8 * 4 + k % 4).a[row / 8 + k / 4 * 2])
                                             : half(at(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], k % 2);
      }
      for (int column = 0; column < 8; ++column) {
        right[k][column] = kind == Matrix::kTf32 ? tf32(at(column * 4 + k % 4).b[k / 4])
                                                 : half(at(column * 4 + k % 8 / 2).b[k / 8], k % 2);
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        float& sum = at(row % 8 * 4 + column / 2).d[row / 8 * 2 + column % 2];
        double exact = sum;
        for (int k = 0; k < depth; ++k) exact += left[k][row] * right[k][column];
        sum = static_cast<float>(exact);
      }
    }
  });
}

}  // namespace sp::emulation

// --- what -fsanitize=thread calls for every access in the kernels
// --------------------------------------------------------
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
