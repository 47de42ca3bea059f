#include "core/isa.h"

#include <atomic>
#include <cstring>
#ifdef SP_X86
#include <cpuid.h>
#endif

namespace sp {

bool wide_datapath = false;

extern const KernelTable kernels_portable;
#ifdef SP_X86
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
extern const KernelTable kernels_avx512_dot;
#endif

namespace {

#ifdef SP_X86
// AMD's Zen 5 (family 1Ah) and later. Its own bit for this, FP512 of leaf 8000_001Ah, is hidden by hypervisors.
bool has_wide_datapath() {
  unsigned leaf, vendor[3], version, unused;
  if (!__get_cpuid(0, &leaf, &vendor[0], &vendor[2], &vendor[1])) return false;
  if (std::memcmp(vendor, "AuthenticAMD", sizeof vendor) != 0) return false;
  if (!__get_cpuid(1, &version, &unused, &unused, &unused)) return false;
  return (version >> 8 & 0xf) == 0xf && 0xf + (version >> 20 & 0xff) >= 0x1a;
}
#endif

// __builtin_cpu_supports reads cpuid and, for the AVX families, XCR0: a level that the operating system does not save
// on a context switch counts as absent.
int detect() {
#ifdef SP_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kPortable;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!wide) return kAvx2;
  wide_datapath = has_wide_datapath();
  const bool dot = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
                   __builtin_cpu_supports("avx512vbmi");
  return dot ? kAvx512Dot : kAvx512;
#else
  return kPortable;
#endif
}

std::atomic<int>& level() {
  static std::atomic<int> value{max_isa()};
  return value;
}

}  // namespace

int max_isa() {
  static const int detected = detect();
  return detected;
}

int isa() { return level().load(std::memory_order_relaxed); }

int set_isa(int wanted) {
  if (wanted < kPortable || wanted > max_isa()) return -1;
  return level().exchange(wanted, std::memory_order_relaxed);
}

const KernelTable& kernels() {
#ifdef SP_X86
  switch (isa()) {
    case kAvx512Dot:
      return kernels_avx512_dot;
    case kAvx512:
      return kernels_avx512;
    case kAvx2:
      return kernels_avx2;
  }
#endif
  return kernels_portable;
}

}  // namespace sp
