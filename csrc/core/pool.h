// Threads of our own that help with the shares of a job.
//
// A job is a counter of unclaimed shares. The caller works on it first and alone if need be; helpers join when the
// system lets them run. So a processor that is busy elsewhere costs the help, not the call: the caller waits only for
// shares that a helper has begun. (Torch's pool gives every thread its part beforehand and waits for the slowest:
// beside a busy neighbour that is a slice of the scheduler, milliseconds.)
//
// One job at a time: a second caller, and a job started from within a job, run alone. Helpers are made at first use,
// never at import, block all signals, sleep between jobs and are never joined: they hold nothing that the end of the
// process would miss. A forked child starts without helpers and makes its own.
#pragma once

#include <stdint.h>

namespace sp {

using Task = void (*)(void* context, int64_t share);

// Helpers at most, whatever is asked for.
constexpr int kMaxHelpers = 255;

// Runs task(context, s) for every s in [0, shares), in any order, on the calling thread and at most threads - 1
// helpers, and returns when all are done. Give more shares than threads: a late or slow thread then holds back less.
void run_parallel(int threads, int64_t shares, Task task, void* context);

// Helpers that exist in this process, asleep or at work.
int pool_helpers();

}  // namespace sp
