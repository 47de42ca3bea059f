// What one thread of this machine can do at best: multiply-adds on registers, and reading memory in order.
//
// Compiled by ceilings.py for the machine it runs on (-march=native) and called through ctypes; nothing of the package
// uses it. Every function returns how much it did, operations or bytes; the caller takes the time.

#include <cstdint>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

using Floats = float __attribute__((vector_size(kBytes)));
using Words = std::uint64_t __attribute__((vector_size(kBytes)));

constexpr int kChains = 12;  // independent sums: more than latency times issue rate of any core we know
volatile float sink;

// `step(sum)` is one instruction. Named sums, because an array of them would live on the stack; they start apart, so
// that the compiler cannot make one chain of all.
template <typename Vector, typename Step>
void RunChains(std::int64_t rounds, Step step) {
  Vector s0 = Vector{} + 0, s1 = s0 + 1, s2 = s0 + 2, s3 = s0 + 3, s4 = s0 + 4, s5 = s0 + 5;
  Vector s6 = s0 + 6, s7 = s0 + 7, s8 = s0 + 8, s9 = s0 + 9, s10 = s0 + 10, s11 = s0 + 11;
  for (std::int64_t i = 0; i < rounds; ++i) {
    s0 = step(s0), s1 = step(s1), s2 = step(s2), s3 = step(s3), s4 = step(s4), s5 = step(s5);
    s6 = step(s6), s7 = step(s7), s8 = step(s8), s9 = step(s9), s10 = step(s10), s11 = step(s11);
  }
  s0 += s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9 + s10 + s11;
  sink = static_cast<float>(s0[0]);
}

}  // namespace

extern "C" {

double FmaFloat32(std::int64_t rounds) {
  const Floats a = Floats{} + 0.5f, b = Floats{} + 0.25f;
  RunChains<Floats>(rounds, [=](Floats sum) { return sum * a + b; });
  return 2.0 * rounds * kChains * (kBytes / 4);
}

double DotBFloat16(std::int64_t rounds) {
#if defined(__AVX512BF16__)
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f));
  RunChains<__m512>(rounds, [=](__m512 sum) { return _mm512_dpbf16_ps(sum, a, a); });
  return 2.0 * rounds * kChains * 32;
#else
  (void)rounds;
  return 0;
#endif
}

double DotInt8(std::int64_t rounds) {
#if defined(__AVX512VNNI__)
  const __m512i a = _mm512_set1_epi8(3);
  RunChains<__m512i>(rounds, [=](__m512i sum) { return _mm512_dpbusd_epi32(sum, a, a); });
  return 2.0 * rounds * kChains * 64;
#elif defined(__AVXVNNI__)
  const __m256i a = _mm256_set1_epi8(3);
  RunChains<__m256i>(rounds, [=](__m256i sum) { return _mm256_dpbusd_avx_epi32(sum, a, a); });
  return 2.0 * rounds * kChains * 32;
#else
  (void)rounds;
  return 0;
#endif
}

double ReadMemory(const void* memory, std::int64_t bytes) {
  constexpr int kStreams = 8;
  const Words* words = static_cast<const Words*>(memory);
  Words sums[kStreams] = {};
  const std::int64_t count = bytes / kBytes / kStreams * kStreams;
  for (std::int64_t i = 0; i < count; i += kStreams) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) sums[s] += words[i + s];
  }
  for (int s = 1; s < kStreams; ++s) sums[0] += sums[s];
  sink = static_cast<float>(sums[0][0]);
  return static_cast<double>(count) * kBytes;
}
}
