// bcsr_linear, forward, CPU, bf16.   y[M, N] = x[M, K] @ W[N, K].T + bias[N]
//
// W      as in linear-inl.h, values bf16
// x, y   bf16, row-major and contiguous; bias, residual bf16 or null
// Maths  products of bf16 exact, sums float, y rounded once to nearest even. With vdpbf16ps denormal operands, sums and
//        results count as zero
// Limits any R, C, M >= 0, N, K. Fast for R % 8 == 0, tuned for 8x1
// Cost   dot_bf16-inl.h where the instruction set has vdpbf16ps: near the rate of its dot products from M = 16 on, if
// the
//        weight is arranged (types.h). Else widen-inl.h: M = 1 bound by memory, the speed of fp32 above
#pragma once

#include "core/dot_bf16-inl.h"
#include "core/widen-inl.h"

namespace sp {
namespace {

#if !defined(SP_DOT_BF16)
constexpr Arrange arrange_bf16 = nullptr;
#endif

struct LinearBf16 {
  const ProductArgs& args;
  int64_t m0, m1, l0, l1;
  float* scratch;

  int64_t padded() const { return (args.in + args.c - 1) / args.c * args.c; }
  // Behind the panel and its empty column.
  float* buffer() const { return scratch + (padded() + 1) * kMaxPanel; }

#if defined(SP_DOT_BF16)
  // The next rows of x, `taken` of them, as a panel with a last column of zeros.
  template <int kRows>
  const Bf16* pack(int64_t row, int64_t taken) const {
    Bf16* panel = reinterpret_cast<Bf16*>(scratch);
    const Bf16* x = static_cast<const Bf16*>(args.x) + row * args.in;
    pack_panel_of<kRows>(x, args.in, taken, args.in, padded() + 1, panel);
    return panel;
  }
#else
  // The next rows of x, `taken` of them, as floats [padded][kWidth].
  template <int kWidth>
  void pack(int64_t row, int64_t taken) const {
    const uint16_t* x = &static_cast<const Bf16*>(args.x)[row * args.in].bits;
    pack_narrow<kWidth, uint16_t>(
        taken, args.in, padded(), scratch,
        [&](int64_t i, int64_t j) SP_ALWAYS_INLINE { return load<8>(x + i * args.in + j); },
        [&](int64_t i, int64_t j) SP_ALWAYS_INLINE {
          const Bf16 value{x[i * args.in + j]};
          return load_wide<1>(&value)[0];
        },
        [](float* to, Vec<uint16_t, 8> v)
            SP_ALWAYS_INLINE { store<8>(to, load_wide<8>(reinterpret_cast<const Bf16*>(&v))); });
  }
#endif

  // One row as floats, zero behind the last.
  void widen_row(int64_t row) const {
    constexpr int kL = kLanes<float>;
    const Bf16* x = static_cast<const Bf16*>(args.x) + row * args.in;
    int64_t k = 0;
    for (; k + kL <= args.in; k += kL) store<kL>(scratch + k, load_wide<kL>(x + k));
    for (; k < args.in; ++k) scratch[k] = load_wide<1>(x + k)[0];
    for (; k <= padded(); ++k) scratch[k] = 0;
  }

#if defined(SP_DOT_BF16)
  // `taken` rows, at most kWidth, by Sums.
  template <int kWidth, typename Sums, typename Source>
  int64_t few(const Source& source, int64_t m, int64_t taken) const {
    const Sums sums;
    const Bf16* panel = pack<kWidth>(m, taken);
    if constexpr (Source::kEightByOne) {
      for_slices<kWidth>(args, m, taken, l0, l1,
                         [&](int64_t s, float* to) SP_ALWAYS_INLINE { sums(source.lists, s, panel, to); });
    } else {
      const Source own = source;  // known to be nobody else's
      for_slices<kWidth>(args, m, taken, l0, l1,
                         [&](int64_t s, float* to) SP_ALWAYS_INLINE { sums(own.slice(s), panel, to); });
    }
    return taken;
  }

  // The next rows, at most eight.
  template <typename Source>
  int64_t few_of(const Source& source, int64_t m, int64_t rows) const {
    if constexpr (Source::kMade) {
      if (wide_datapath) {
        if (rows == 2) return few<4, RowSums<2>>(source, m, rows);
        if (rows == 3) return few<4, RowSums<3>>(source, m, rows);
        if (rows == 4) return few<4, RowSums<4>>(source, m, rows);
        if (rows == 5) return few<8, RowSums<5>>(source, m, rows);
      }
    }
    return rows <= 4 ? few<4, SquareSums<4>>(source, m, rows) : few<8, SquareSums<8>>(source, m, rows);
  }

  template <int kZ, typename Source>
  int64_t many(const Source& source, int64_t m) const {
    const int64_t taken = m1 - m < 8 * kZ ? m1 - m : 8 * kZ;
    dot_panel<kZ>(args, source, pack<PanelSums<kZ>::kWidth>(m, taken), m, taken, l0, l1);
    return taken;
  }

  template <typename Source>
  void rows(const Source& source) const {
    for (int64_t m = m0; m < m1;) {
      const int64_t left = m1 - m;
      if (left == 1) {
        widen_row(m);
        const Source own = source;
        for_slices<1>(args, m, 1, l0, l1,
                      [&](int64_t s, float* to) SP_ALWAYS_INLINE { dot_row(own.slice(s), scratch, to); });
        m += 1;
      } else if (left <= 8) {
        m += few_of(source, m, left);
      } else if (left <= 16) {
        m += many<2>(source, m);
      } else if (left <= 24) {
        m += many<3>(source, m);
      } else {
        m += many<4>(source, m);
      }
    }
  }

  void run() const {
    if (args.arranged != nullptr) return rows(ArrangedPairs(args));
    with_lists<Bf16>(args, [&](const auto& lists) {
      if (m1 - m0 == 1) {  // blocks as they are: one row does not pay for making pairs
        widen_row(m0);
        widened_gemv<false>(lists, Epilogue<Bf16, float>(args), scratch, m0, 1.0f, l0, l1);
      } else if (padded() <= kNarrowInputs) {
        rows(buffered_pairs<uint16_t>(args, lists, buffer()));
      } else {
        const Lists<Bf16, false, false> any(args);
        rows(buffered_pairs<int32_t>(args, any, buffer()));
      }
    });
  }
#else
  template <typename L>
  void rows(const L& lists) const {
    constexpr int kL = kLanes<float>;
    const Epilogue<Bf16, float> epilogue(args);
    const bool eights = args.r % 8 == 0;
    for (int64_t m = m0; m < m1;) {
      const int64_t left = m1 - m;
      const auto take = [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        const int64_t taken = left < kWidth ? left : kWidth;
        pack<kWidth>(m, taken);
        return taken;
      };
      int64_t taken = 1;
      if (left == 1) {
        widen_row(m);
        widened_gemv<false>(lists, epilogue, scratch, m, 1.0f, l0, l1);
      } else if (eights && left <= 4) {
        taken = take(Int<4>{});
        widened_few_rows<4, false>(lists, epilogue, scratch, m, taken, nullptr, l0, l1);
      } else if (eights && left <= 8) {
        taken = take(Int<8>{});
        widened_few_rows<8, false>(lists, epilogue, scratch, m, taken, nullptr, l0, l1);
      } else if (left > 2 * kL - 8) {
        taken = take(Int<2 * kL>{});
        widened_panel<2, false>(lists, epilogue, scratch, buffer(), padded(), m, taken, nullptr, l0, l1);
      } else {
        taken = take(Int<kL>{});
        widened_panel<1, false>(lists, epilogue, scratch, buffer(), padded(), m, taken, nullptr, l0, l1);
      }
      m += taken;
    }
  }

  void run() const {
    with_lists<Bf16>(args, [&](const auto& lists) { rows(lists); });
  }
#endif
};

void linear_bf16(const ProductArgs& args, int64_t m0, int64_t m1, int64_t l0, int64_t l1, void* scratch) {
  LinearBf16{args, m0, m1, l0, l1, static_cast<float*>(scratch)}.run();
}

}  // namespace
}  // namespace sp
