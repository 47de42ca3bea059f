// Many callers, jobs of all sizes, changing numbers of threads, forks: every share must run once, and nothing may hang.
// `make sanitize` runs it under ThreadSanitizer, which cannot follow a child that starts threads (--no-forks), and
// under AddressSanitizer with forks. --broken plants a data race that only the former can see.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <random>
#include <thread>
#include <vector>

#include "core/pool.h"

namespace {

using Clock = std::chrono::steady_clock;

// A job on the caller's stack, as a product's is. Its cells are plain ints: two threads on one share are a data race,
// and so is a caller that returns before a helper has finished.
struct StressJob {
  std::vector<int> cells;
  int spins;
  bool nested;
};

void one_more(void* context, int64_t) { static_cast<std::atomic<int>*>(context)->fetch_add(1); }

void run_share(void* context, int64_t share) {
  StressJob& job = *static_cast<StressJob*>(context);
  for (int i = 0; i < job.spins; ++i) asm volatile("");
  if (job.nested) {
    std::atomic<int> inner{0};
    sp::run_parallel(4, 3, one_more, &inner);
    if (inner != 3) abort();
  }
  job.cells[static_cast<size_t>(share)] += 1;
}

int contested = 0;

void run_racing_share(void* context, int64_t share) {
  contested += 1;
  run_share(context, share);
}

bool one_job(std::mt19937& rng, sp::Task task) {
  const int threads = 1 + static_cast<int>(rng() % 5);
  StressJob job{std::vector<int>(1 + rng() % 24), static_cast<int>(rng() % 3000), rng() % 8 == 0};
  sp::run_parallel(threads, static_cast<int64_t>(job.cells.size()), task, &job);
  for (int cell : job.cells) {
    if (cell != 1) {
      fprintf(stderr, "a share ran %d times instead of once\n", cell);
      return false;
    }
  }
  if (rng() % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(rng() % 300));  // lets helpers fall asleep
  return true;
}

// Products in a child whose helpers have stayed in the parent.
bool child_works(unsigned seed) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // a hang becomes an error
    bool good = sp::pool_helpers() == 0;
    std::mt19937 rng(seed);
    for (int i = 0; good && i < 50; ++i) good = one_job(rng, run_share);
    _exit(good ? 0 : 1);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    fprintf(stderr, "a forked child failed (status %d)\n", status);
    return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  bool broken = false, forking = true;
  double seconds = 10;
  for (int i = 1; i < argc; ++i) {
    if (strcmp(argv[i], "--broken") == 0) {
      broken = true;
    } else if (strcmp(argv[i], "--no-forks") == 0) {
      forking = false;
    } else if ((seconds = atof(argv[i])) <= 0) {
      return fprintf(stderr, "usage: stress_pool [--broken] [--no-forks] [SECONDS]\n"), 2;
    }
  }
  if (sp::pool_helpers() != 0) return fprintf(stderr, "helpers exist before the first job\n"), 1;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  std::atomic<bool> good{true};
  std::atomic<long> jobs{0}, forks{0};
  std::vector<std::thread> callers;
  for (unsigned caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&, caller] {
      std::mt19937 rng(caller);
      long own = 0;
      while (good && Clock::now() < end) {
        if (!one_job(rng, broken ? run_racing_share : run_share)) good = false;
        ++jobs;
        if (forking && caller == 0 && ++own % 200 == 0) {
          if (!child_works(static_cast<unsigned>(rng()))) good = false;
          ++forks;
        }
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  printf("stress_pool: %ld jobs of 4 callers, %ld forks, %d helpers: %s\n", jobs.load(), forks.load(),
         sp::pool_helpers(), good ? "good" : "FAILED");
  return good ? 0 : 1;
}
