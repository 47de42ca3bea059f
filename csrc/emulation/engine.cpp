// Fibers, and the order in which they run.
#include "emulation/engine.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <random>

#include "emulation/state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace sp::emulation {

constexpr size_t kStackBytes = 256 << 10;

// --- fibers ---------------------------------------------------------------------------------------------------------
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
static void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;  // 16-byte aligned after the return into `entry`
  *top = reinterpret_cast<void*>(entry);
  context.stack_pointer = top - 6;
}
static void swap(Context& from, Context& to) { sp_emulation_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Context : ucontext_t {};
static void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
static void swap(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

namespace {

std::vector<char*> stacks;
const std::function<void()>* kernel = nullptr;
Context scheduler;
uint64_t block_limit = 0, first_block = 0;

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
  swap(*thread.context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &host_stack, &host_stack_bytes);
#endif
}

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
  swap(scheduler, *thread.context);
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

// --- one block ------------------------------------------------------------------------------------------------------
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
    if (thread->dirty != 0) block_dirty = block_dirty == 0 ? thread->dirty : std::min(block_dirty, thread->dirty);
    thread->dirty = 0;
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
    thread.dirty = 0;
    thread.events.clear();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(thread.stack, kStackBytes);  // its last frames were left, not returned from
#endif
    prepare(*thread.context, thread.stack, thread_main);
  }
  block_dirty = 0;
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
    threads.back()->context = std::make_shared<Context>();
    threads.back()->stack = stacks[static_cast<size_t>(i)];
  }
  warps.assign(static_cast<size_t>(count) / kWarp, Warp{});
}

}  // namespace

// --- host -----------------------------------------------------------------------------------------------------------
void limit_blocks(uint64_t limit) { block_limit = limit; }
void skip_blocks(uint64_t count) { first_block = count; }

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
  for (uint64_t b = first_block; b < (block_limit > 0 ? std::min(block_limit, blocks) : blocks); ++b) {
    const Index block{static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                      static_cast<unsigned>(b / grid.x / grid.y)};
    start_block(grid, block, count);
    if (!run_block(rng)) break;
  }
  free(memory);
  regions[0].begin = regions[0].end = 0;
}

// --- threads of the kernel ------------------------------------------------------------------------------------------
const Place& place() { return now->place; }
unsigned char* shared_base() { return shared_memory_now; }
size_t shared_size() { return shared_bytes_now; }

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

}  // namespace sp::emulation
