// bcsr_linear, forward, CPU, bf16.   y[M, N] = x[M, K] @ W[N, K].T + bias[N]
//
// W      as in linear-inl.h, values bf16
// x, y   bf16, row-major and contiguous; bias, residual bf16 or null
// Maths  products of bf16 exact, sums float, y rounded once to nearest even. With vdpbf16ps (M >= 2) denormal operands
//        and sums count as zero
// Limits any R, C, M >= 0, N, K. Fast for R % 8 == 0, tuned for 8x1
// Cost   M = 1: see widen-inl.h; x is widened once. M >= 2: dot_bf16-inl.h where the instruction set has vdpbf16ps,
// else
//        the speed of fp32
#pragma once

#include "core/dot_bf16-inl.h"
#include "core/widen-inl.h"

namespace sp {
namespace {

struct LinearBf16 {
  const ProductArgs& args;
  int64_t m0, m1, l0, l1;
  float* scratch;

  // Rows row .. row + taken - 1 of x as panel [padded][kWidth] of bf16 or, widened, of float.
  template <int kWidth, typename To>
  void pack(int64_t row, int64_t taken, int64_t padded, To* panel) const {
    const uint16_t* x = &static_cast<const Bf16*>(args.x)[row * args.in].bits;
    pack_narrow<kWidth, uint16_t>(
        taken, args.in, padded, panel,
        [&](int64_t i, int64_t j) SP_ALWAYS_INLINE { return load<8>(x + i * args.in + j); },
        [&](int64_t i, int64_t j) SP_ALWAYS_INLINE { return widened(x[i * args.in + j], To{}); },
        [](To* to, Vec<uint16_t, 8> v) SP_ALWAYS_INLINE {
          if constexpr (sizeof(To) == 4) {
            store<8>(to, load_wide<8>(reinterpret_cast<const Bf16*>(&v)));
          } else {
            store<8>(&to->bits, v);
          }
        });
  }

  SP_INLINE static Bf16 widened(uint16_t bits, Bf16) { return Bf16{bits}; }
  SP_INLINE static float widened(uint16_t bits, float) {
    const Bf16 value{bits};
    return load_wide<1>(&value)[0];
  }

  template <typename L>
  void rows(const L& lists) const {
    const int64_t padded = (args.in + args.c - 1) / args.c * args.c;
    const Epilogue<Bf16, float> epilogue(args);
    float* buffer = scratch + (padded + 1) * kMaxPanel;  // behind the panel and its empty row
    const bool eights = args.r % 8 == 0;
    for (int64_t m = m0; m < m1;) {
      const int64_t left = m1 - m;
      const auto take = [&](auto width, auto* panel) {
        constexpr int kWidth = decltype(width)::value;
        const int64_t taken = left < kWidth ? left : kWidth;
        pack<kWidth>(m, taken, padded, panel);
        return taken;
      };
      int64_t taken = 1;
      if (left == 1) {
        const Bf16* x = static_cast<const Bf16*>(args.x) + m * args.in;
        int64_t k = 0;
        for (; k + 8 <= args.in; k += 8) store<8>(scratch + k, load_wide<8>(x + k));
        for (; k < args.in; ++k) scratch[k] = load_wide<1>(x + k)[0];
        for (; k < padded; ++k) scratch[k] = 0;
        widened_gemv<false>(lists, epilogue, scratch, m, 1.0f, l0, l1);
        m += 1;
        continue;
      }
#if defined(SP_DOT_BF16)
      Bf16* panel = reinterpret_cast<Bf16*>(scratch);
      if (eights && left <= 8) {
        if (left == 2) {
          taken = take(Int<2>{}, panel);
          dot_few_rows<2>(lists, epilogue, panel, m, taken, l0, l1);
        } else if (left <= 4) {
          taken = take(Int<4>{}, panel);
          dot_few_rows<4>(lists, epilogue, panel, m, taken, l0, l1);
        } else {
          taken = take(Int<8>{}, panel);
          dot_few_rows<8>(lists, epilogue, panel, m, taken, l0, l1);
        }
      } else if (left > 24) {
        taken = take(Int<32>{}, panel);
        memset(panel + padded * 32, 0, 64);
        dot_panel<2>(lists, epilogue, panel, buffer, padded, m, taken, l0, l1);
      } else {
        taken = take(Int<16>{}, panel);
        memset(panel + padded * 16, 0, 32);
        dot_panel<1>(lists, epilogue, panel, buffer, padded, m, taken, l0, l1);
      }
#else
      constexpr int kL = kLanes<float>;
      if (eights && left <= 4) {
        taken = take(Int<4>{}, scratch);
        widened_few_rows<4, false>(lists, epilogue, scratch, m, taken, nullptr, l0, l1);
      } else if (eights && left <= 8) {
        taken = take(Int<8>{}, scratch);
        widened_few_rows<8, false>(lists, epilogue, scratch, m, taken, nullptr, l0, l1);
      } else if (left > 2 * kL - 8) {
        taken = take(Int<2 * kL>{}, scratch);
        widened_panel<2, false>(lists, epilogue, scratch, buffer, padded, m, taken, nullptr, l0, l1);
      } else {
        taken = take(Int<kL>{}, scratch);
        widened_panel<1, false>(lists, epilogue, scratch, buffer, padded, m, taken, nullptr, l0, l1);
      }
#endif
      m += taken;
    }
  }
};

void linear_bf16(const ProductArgs& args, int64_t m0, int64_t m1, int64_t l0, int64_t l1, void* scratch) {
  const LinearBf16 product{args, m0, m1, l0, l1, static_cast<float*>(scratch)};
  with_lists<Bf16>(args, [&](const auto& lists) { product.rows(lists); });
}

}  // namespace
}  // namespace sp
