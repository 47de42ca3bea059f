#include "core/pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>

namespace sp {

namespace {

// How long a helper looks out for the next job before it sleeps: products of one model follow each other within this
// time. A helper that looks out answers within a microsecond; one that sleeps is 25 us late on a virtual Zen 4, and to
// wake it costs the caller 2 us. And how long a caller looks out for the last shares before it sleeps.
constexpr std::chrono::microseconds kHelperSpin{50};
constexpr std::chrono::microseconds kCallerSpin{20};

// A caller that waited this long for the last shares, and longer than it worked, was held up by a helper that the
// system had stopped. It then works alone for kAlone times as long: a busy neighbour costs a fiftieth of the time at
// most.
constexpr std::chrono::microseconds kHeldUp{200};
constexpr int kAlone = 50;

using Clock = std::chrono::steady_clock;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// True as soon as done(), false after `patience`.
template <typename Done>
bool spin(std::chrono::microseconds patience, const Done& done) {
  const auto end = Clock::now() + patience;
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      pause();
    }
  } while (Clock::now() < end);
  return false;
}

// Everything is static and trivially destroyed: a helper may look at it until the last instruction of the process.
struct alignas(64) Helper {
  std::atomic<uint32_t> calls{0};  // grows by one per call for help
};

struct Job {
  // Written by the owner between jobs. A helper reads them after it claimed a share, and a job with a claimed share
  // that is not finished cannot end: a helper that wakes late finds no share and reads nothing.
  Task task;
  void* context;
  alignas(64) std::atomic<int64_t> unclaimed{0};
  alignas(64) std::atomic<int64_t> unfinished{0};
  std::atomic<uint32_t> ends{0};  // grows by one when a job's last share is finished
};

std::atomic<bool> owned{false};  // by the caller whose job runs; guards what only an owner touches
std::atomic<int> helpers{0};
Clock::time_point alone_until{};
bool prepared_for_fork = false;
Helper helper[kMaxHelpers];
Job job;
thread_local bool at_work = false;  // a share of some job is running on this thread

// Works on shares until none is unclaimed.
void help() {
  at_work = true;
  int64_t open = job.unclaimed.load(std::memory_order_relaxed);
  while (open > 0) {
    if (!job.unclaimed.compare_exchange_weak(open, open - 1, std::memory_order_acquire, std::memory_order_relaxed)) {
      continue;
    }
    job.task(job.context, open - 1);
    if (job.unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      job.ends.fetch_add(1, std::memory_order_release);
      job.ends.notify_one();
    }
    open = job.unclaimed.load(std::memory_order_relaxed);
  }
  at_work = false;
}

void* serve(void* argument) {
  Helper& self = *static_cast<Helper*>(argument);
  uint32_t answered = 0;
  for (;;) {
    const auto called = [&] { return self.calls.load(std::memory_order_acquire) != answered; };
    if (!spin(kHelperSpin, called)) self.calls.wait(answered, std::memory_order_acquire);
    answered = self.calls.load(std::memory_order_acquire);
    help();
  }
}

// In a forked child: the helpers have stayed in the parent, and so has any other thread that owned the job.
void forget_helpers() {
  helpers.store(0, std::memory_order_relaxed);
  owned.store(false, std::memory_order_relaxed);
}

// Makes helpers until there are `wanted`; fewer if the system refuses.
int hire(int wanted) {
  int count = helpers.load(std::memory_order_relaxed);
  if (count >= wanted) return wanted;
  if (!prepared_for_fork) prepared_for_fork = pthread_atfork(nullptr, nullptr, forget_helpers) == 0;
  if (!prepared_for_fork) return 0;
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
  for (; count < wanted; ++count) {
    helper[count].calls.store(0, std::memory_order_relaxed);
    pthread_t thread;
    if (pthread_create(&thread, nullptr, serve, &helper[count]) != 0) break;
#if defined(__linux__)
    pthread_setname_np(thread, "sparse_pathways");
#endif
    pthread_detach(thread);
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  helpers.store(count, std::memory_order_relaxed);
  return count;
}

// Waits for shares that helpers have begun.
template <typename Ended>
void wait_for(const Ended& ended, uint32_t end, Clock::time_point began) {
  const auto worked_until = Clock::now();
  if (!spin(kCallerSpin, ended)) job.ends.wait(end, std::memory_order_acquire);
  const auto now = Clock::now();
  const auto waited = now - worked_until;
  if (waited > kHeldUp && waited > worked_until - began) alone_until = now + kAlone * waited;
}

}  // namespace

void run_parallel(int threads, int64_t shares, Task task, void* context) {
  const int wanted = static_cast<int>(std::min<int64_t>(std::min(threads - 1, kMaxHelpers), shares - 1));
  if (wanted < 1 || at_work || owned.exchange(true, std::memory_order_acquire)) {
    for (int64_t share = 0; share < shares; ++share) task(context, share);
    return;
  }
  const auto began = Clock::now();
  const int called = began < alone_until ? 0 : hire(wanted);
  job.task = task;
  job.context = context;
  const uint32_t end = job.ends.load(std::memory_order_relaxed);
  job.unfinished.store(shares, std::memory_order_relaxed);
  job.unclaimed.store(shares, std::memory_order_release);
  for (int i = 0; i < called && job.unclaimed.load(std::memory_order_relaxed) > 0; ++i) {
    helper[i].calls.fetch_add(1, std::memory_order_release);
    helper[i].calls.notify_one();
  }
  help();
  const auto ended = [&] { return job.ends.load(std::memory_order_acquire) != end; };
  if (!ended()) wait_for(ended, end, began);
  owned.store(false, std::memory_order_release);
}

int pool_helpers() { return helpers.load(std::memory_order_relaxed); }

}  // namespace sp
