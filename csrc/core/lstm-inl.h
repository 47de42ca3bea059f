// Step of a block-sparse LSTM, CPU: the four gate rows of eight units, their activations and the new state in one pass.
//
// Layout as in linear-inl.h, two weights [4H, E] and [4H, H], block row b = outputs R * b .. of the 4H gates: the gate
//        rows of units 8u .. 8u + 7 begin at outputs 8u, H + 8u, 2H + 8u, 3H + 8u. No reordering, so any mask fits
// Types  x, h, c, y float or bfloat16; values of that type, or int8 with a scale per output (x stays float)
// Step   1 to 8 rows, R % 8 == 0, H % 8 == 0, uint16 columns: see fused(); everything else runs the product kernels
//        into a buffer and then lstm_gates
// Cost   M = 1: one load of a block and one of x per block; M in 2..8: x and h packed as [K][4 or 8], as in few_rows.
//        The gates need no buffer, unless LayerNorm must see all of them first
#pragma once

#include "core/epilogue-inl.h"
#include "core/lstm.h"
#include "core/simd-inl.h"

namespace sp {
namespace {

template <int kN>
SP_INLINE Vec<float, kN> load_wide(const int8_t* from) {
  return __builtin_convertvector(load<kN>(from), typename VecOf<float, kN>::type);
}

// Rows of gates; R = 8 and C = 1 are constants to the compiler when k8x1.
template <typename W, bool kIndirect, bool k8x1>
struct GateRows {
  explicit GateRows(const ProductArgs& args)
      : values(static_cast<const W*>(args.values)),
        crow(args.begin),
        col(static_cast<const uint16_t*>(args.other)),
        pos(args.pos),
        scale(args.scale),
        in(args.in),
        height(args.r),
        width(args.c) {}

  SP_INLINE int64_t r() const { return k8x1 ? 8 : height; }
  SP_INLINE int64_t c() const { return k8x1 ? 1 : width; }
  SP_INLINE const W* block(int64_t e) const {
    return values + (kIndirect && pos != nullptr ? pos[e] : e) * (r() * c());
  }

  // Outputs n .. n + 7 for one row, onto four chains of additions.
  SP_INLINE void add_row(const float* x, int64_t n, Vec<float, 8>* sum) const {
    const int64_t b = n / r(), r0 = n - b * r();
    const auto add = [&](int64_t e, Vec<float, 8>& chain) SP_ALWAYS_INLINE {
      const W* from = block(e) + r0;
      const int64_t first = static_cast<int64_t>(col[e]) * c();
      if (c() == 1) {
        chain += load_wide<8>(from) * x[first];
      } else {
        const int64_t last = first + c() < in ? first + c() : in;
        for (int64_t k = first; k < last; ++k) chain += load_wide<8>(from + (k - first) * r()) * x[k];
      }
    };
    const int64_t begin = crow[b], end = crow[b + 1];
    int64_t e = begin;
    for (; e + 4 <= end; e += 4) {
      SP_UNROLL for (int q = 0; q < 4; ++q) add(e + q, sum[q]);
    }
    if constexpr (!k8x1) {
      for (; e < end; ++e) add(e, sum[e & 3]);
      return;
    }
    if (begin == end) return;
    // The last up to three without a branch: their number is random, and a missed guess costs more than three blocks.
    SP_UNROLL for (int q = 0; q < 3; ++q) {
      Vec<float, 8> more = sum[q];
      add(e + q < end ? e + q : end - 1, more);
      const Vec<int32_t, 8> live = static_cast<int32_t>(-(e + q < end)) - Vec<int32_t, 8>{};
      sum[q] = live ? more : sum[q];
    }
  }

  // Outputs n .. n + 7 for the rows of a panel [K][kWidth], one accumulator each; two sets of them at kWidth = 4.
  template <int kWidth, int kSets>
  SP_INLINE void add_panel(const float* panel, int64_t n, Vec<float, 8> (*sum)[kWidth]) const {
    const int64_t b = n / r(), r0 = n - b * r();
    const auto add = [&](int64_t e, Vec<float, 8>* chain) SP_ALWAYS_INLINE {
      const W* from = block(e) + r0;
      const float* x = panel + static_cast<int64_t>(col[e]) * c() * kWidth;
      for (int64_t j = 0; j < c(); ++j) {
        const Vec<float, 8> weight = load_wide<8>(from + j * r());
        SP_UNROLL for (int i = 0; i < kWidth; ++i) chain[i] += weight * x[j * kWidth + i];
      }
    };
    int64_t e = crow[b];
    const int64_t end = crow[b + 1];
    for (; e + kSets <= end; e += kSets) {
      SP_UNROLL for (int q = 0; q < kSets; ++q) add(e + q, sum[q]);
    }
    for (; e < end; ++e) add(e, sum[0]);
  }

  const W* values;
  const int32_t* crow;
  const uint16_t* col;
  const int32_t* pos;
  const float* scale;
  int64_t in, height, width;
};

// kN units of one row from their gates: c_next and h_next.
template <int kN, typename Y, typename Acc>
SP_INLINE void finish_units(const Vec<Acc, kN>* gate, const Y* c, Y* c_next, Y* h_next) {
  const Vec<Acc, kN> cell =
      vsigmoid<Acc, kN>(gate[1]) * load_wide<kN>(c) + vsigmoid<Acc, kN>(gate[0]) * vtanh<Acc, kN>(gate[2]);
  store_narrow<kN>(c_next, cell);
  store_narrow<kN>(h_next, vsigmoid<Acc, kN>(gate[3]) * vtanh<Acc, kN>(cell));
}

// Calls body.template run<kN>(i) for i over 0 .. count in the widest vectors that fit.
template <int kWidest, typename Body>
SP_INLINE void for_lanes(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kWidest <= count; i += kWidest) body.template run<kWidest>(i);
  for (; i < count; ++i) body.template run<1>(i);
}

// The new cell, and the new output where no normalisation comes between them. Gates of type G, `stride` apart.
template <typename Y, typename Acc, typename G>
struct Units {
  const G* gates;
  int64_t stride;
  const Y* c;
  Y* c_next;
  Y* h_next;

  template <int kN>
  SP_INLINE void run(int64_t i) const {
    Vec<Acc, kN> gate[4];
    SP_UNROLL for (int g = 0; g < 4; ++g) gate[g] = load_wide<kN>(gates + g * stride + i);
    finish_units<kN, Y, Acc>(gate, c + i, c_next + i, h_next + i);
  }
};

template <typename Y, typename W>
struct StepKernel {
  const LstmStep& step;
  const LstmArgs& args;
  int64_t u0, u1;
  float* scratch;
  float* gates;

  // Rows of the step as floats: they are floats, or are made so.
  const float* floats(const void* rows, int64_t count, float* room) const {
    if constexpr (sizeof(Y) == sizeof(float)) {
      return static_cast<const float*>(rows);
    } else {
      const Y* from = static_cast<const Y*>(rows);
      for (int64_t i = 0; i < count; ++i) room[i] = load_wide<1>(from + i)[0];
      return room;
    }
  }

  template <bool kIndirect, bool k8x1>
  void run() const {
    const GateRows<W, kIndirect, k8x1> ih(args.ih), hh(args.hh);
    if (args.rows == 1) {
      const float* x = step.x == nullptr ? nullptr : floats(step.x, ih.in, scratch);
      one_row(ih, hh, x, floats(step.h, hh.in, scratch + ih.in));
    } else if (args.rows <= 4) {
      few_rows<4>(ih, hh);
    } else {
      few_rows<8>(ih, hh);
    }
    finish();
  }

  // What is added to the sums of outputs n .. n + 7 of row `row` besides the products.
  SP_INLINE Vec<float, 8> start(int64_t row, int64_t n) const {
    Vec<float, 8> sum = {};
    if (step.input != nullptr) {
      sum = load_wide<8>(static_cast<const Y*>(step.input) + row * 4 * args.hidden + n);
    } else if (args.ih.bias != nullptr) {
      sum = load_wide<8>(static_cast<const Y*>(args.ih.bias) + n);
    }
    if (args.hh.bias != nullptr) sum += load_wide<8>(static_cast<const Y*>(args.hh.bias) + n);
    return sum;
  }

  // Where this share keeps the gates of a row until all its units are there: activations run fastest in wide vectors.
  SP_INLINE float* local(int64_t row) const { return gates + row * 32 * (u1 - u0); }

  SP_INLINE void keep(int64_t row, int64_t u, int64_t g, Vec<float, 8> gate) const {
    if (step.sums != nullptr) {
      store_narrow<8>(static_cast<Y*>(step.sums) + (row * 4 + g) * args.hidden + 8 * u, gate);
    } else {
      store<8>(local(row) + 8 * (g * (u1 - u0) + u - u0), gate);
    }
  }

  void finish() const {
    if (step.sums != nullptr) return;
    for (int64_t row = 0; row < args.rows; ++row) {
      const int64_t at = row * args.hidden + 8 * u0;
      for_lanes<kLanes<float>>(
          8 * (u1 - u0), Units<Y, float, float>{local(row), 8 * (u1 - u0), static_cast<const Y*>(step.c) + at,
                                                static_cast<Y*>(step.c_next) + at, static_cast<Y*>(step.h_next) + at});
    }
  }

  template <typename Rows>
  SP_INLINE void one_row(const Rows& ih, const Rows& hh, const float* x, const float* h) const {
    for (int64_t g = 0; g < 4; ++g) {
      for (int64_t u = u0; u < u1; ++u) {
        const int64_t n = g * args.hidden + 8 * u;
        Vec<float, 8> sum[4] = {start(0, n)};
        if (x != nullptr) {
          if constexpr (sizeof(W) == 1) {  // the two weights have scales of their own
            Vec<float, 8> part[4] = {};
            ih.add_row(x, n, part);
            sum[0] += ((part[0] + part[1]) + (part[2] + part[3])) * load<8>(ih.scale + n);
          } else {
            ih.add_row(x, n, sum);
          }
        }
        if constexpr (sizeof(W) == 1) {
          Vec<float, 8> part[4] = {};
          hh.add_row(h, n, part);
          sum[0] += ((part[0] + part[1]) + (part[2] + part[3])) * load<8>(hh.scale + n);
        } else {
          hh.add_row(h, n, sum);
        }
        keep(0, u, g, (sum[0] + sum[1]) + (sum[2] + sum[3]));
      }
    }
  }

  template <int kWidth, typename Rows>
  SP_INLINE void few_rows(const Rows& ih, const Rows& hh) const {
    constexpr int kSets = kWidth == 4 ? 2 : 1;
    const float* x_panel = step.x == nullptr ? nullptr : panel<kWidth>(ih, step.x, scratch);
    const float* h_panel = panel<kWidth>(hh, step.h, scratch + (ih.in + ih.c()) * 2 * kWidth);
    for (int64_t g = 0; g < 4; ++g) {
      for (int64_t u = u0; u < u1; ++u) {
        const int64_t n = g * args.hidden + 8 * u;
        Vec<float, 8> sum[kSets][kWidth] = {}, part[kWidth] = {};
        if (x_panel != nullptr) {
          ih.template add_panel<kWidth, kSets>(x_panel, n, sum);
          if constexpr (sizeof(W) == 1) {
            SP_UNROLL for (int i = 0; i < kWidth; ++i) {
              part[i] = join<kSets, kWidth>(sum, i) * load<8>(ih.scale + n);
              SP_UNROLL for (int q = 0; q < kSets; ++q) sum[q][i] = Vec<float, 8>{};
            }
          }
        }
        hh.template add_panel<kWidth, kSets>(h_panel, n, sum);
        SP_UNROLL for (int i = 0; i < kWidth; ++i) {
          Vec<float, 8> total = join<kSets, kWidth>(sum, i);
          if constexpr (sizeof(W) == 1) {
            total *= load<8>(hh.scale + n);
            if (x_panel != nullptr) total += part[i];
          }
          if (i < args.rows) keep(i, u, g, total + start(i, n));
        }
      }
    }
  }

  template <int kSets, int kWidth>
  static SP_INLINE Vec<float, 8> join(const Vec<float, 8> (*sum)[kWidth], int i) {
    if constexpr (kSets == 2) return sum[0][i] + sum[1][i];
    return sum[0][i];
  }

  // The rows packed as [K][kWidth], in the first half of a room of twice that size.
  template <int kWidth, typename Rows>
  const float* panel(const Rows& w, const void* rows, float* room) const {
    const int64_t padded = (w.in + w.c() - 1) / w.c() * w.c();
    const float* from = floats(rows, args.rows * w.in, room + (w.in + w.c()) * kWidth);
    pack_panel<kWidth>(from, w.in, args.rows, w.in, padded, room);
    return room;
  }
};

template <typename Y, typename W>
void lstm_step(const LstmStep& step, int64_t u0, int64_t u1, void* scratch) {
  const LstmArgs& args = *step.lstm;
  float* room = static_cast<float*>(scratch);
  const StepKernel<Y, W> kernel{step, args, u0, u1, room + args.rows * 32 * (u1 - u0), room};
  const bool indirect = args.ih.pos != nullptr || args.hh.pos != nullptr;
  const bool tuned = args.ih.r == 8 && args.ih.c == 1 && args.hh.r == 8 && args.hh.c == 1;
  if (!tuned) {
    kernel.template run<true, false>();  // finds out about pos at every block: one version less to compile
  } else if (indirect) {
    kernel.template run<true, true>();
  } else {
    kernel.template run<false, true>();
  }
}

// --- from the gates on ---------------------------------------------------------------------------------------------
template <typename Acc, int kN>
SP_INLINE Acc total(Vec<Acc, kN> v) {
  Acc sum = 0;
  SP_UNROLL for (int i = 0; i < kN; ++i) sum += v[i];
  return sum;
}

template <typename Y, typename Acc>
struct Deviation {
  const Y* row;
  Acc mean;
  bool square;
  mutable Acc sum = 0;
  mutable Vec<Acc, kLanes<Acc>> wide = {};

  template <int kN>
  SP_INLINE void run(int64_t i) const {
    Vec<Acc, kN> v = load_wide<kN>(row + i) - mean;
    if (square) v *= v;
    if constexpr (kN == 1) {
      sum += v[0];
    } else {
      wide += v;
    }
  }
};

template <typename Y, typename Acc>
struct Rescale {
  Y* row;
  const Y* weight;
  const Y* bias;
  Acc mean, factor;

  template <int kN>
  SP_INLINE void run(int64_t i) const {
    store_narrow<kN>(row + i,
                     (load_wide<kN>(row + i) - mean) * factor * load_wide<kN>(weight + i) + load_wide<kN>(bias + i));
  }
};

// row = (row - mean) / sqrt(variance + eps) * weight + bias, in place.
template <typename Y, typename Acc>
void layer_norm(Y* row, int64_t count, const void* weight, const void* bias, float eps) {
  const auto mean_of = [&](Acc mean, bool square) {
    const Deviation<Y, Acc> deviation{row, mean, square};
    for_lanes<kLanes<Acc>>(count, deviation);
    return (total<Acc, kLanes<Acc>>(deviation.wide) + deviation.sum) / static_cast<Acc>(count);
  };
  const Acc mean = mean_of(0, false);
  const Acc variance = mean_of(mean, true) + static_cast<Acc>(eps);
  const Acc root = sizeof(Acc) == 4 ? static_cast<Acc>(__builtin_sqrtf(static_cast<float>(variance)))
                                    : static_cast<Acc>(__builtin_sqrt(static_cast<double>(variance)));
  for_lanes<kLanes<Acc>>(
      count, Rescale<Y, Acc>{row, static_cast<const Y*>(weight), static_cast<const Y*>(bias), mean, 1 / root});
}

template <typename Y, typename Acc>
struct Output {
  const Y* gate;
  const Y* c;
  Y* h;

  template <int kN>
  SP_INLINE void run(int64_t i) const {
    store_narrow<kN>(h + i, vsigmoid<Acc, kN>(load_wide<kN>(gate + i)) * vtanh<Acc, kN>(load_wide<kN>(c + i)));
  }
};

template <typename Y, typename Acc>
void lstm_gates(const LstmStep& step, int64_t m0, int64_t m1) {
  const LstmArgs& args = *step.lstm;
  const int64_t hidden = args.hidden;
  for (int64_t m = m0; m < m1; ++m) {
    Y* sums = static_cast<Y*>(step.sums) + m * 4 * hidden;
    Y* c_next = static_cast<Y*>(step.c_next) + m * hidden;
    Y* h_next = static_cast<Y*>(step.h_next) + m * hidden;
    if (args.g_weight != nullptr) layer_norm<Y, Acc>(sums, 4 * hidden, args.g_weight, args.g_bias, args.g_eps);
    for_lanes<kLanes<Acc>>(hidden,
                           Units<Y, Acc, Y>{sums, hidden, static_cast<const Y*>(step.c) + m * hidden, c_next, h_next});
    if (args.g_weight != nullptr) {
      layer_norm<Y, Acc>(c_next, hidden, args.c_weight, args.c_bias, args.c_eps);
      for_lanes<kLanes<Acc>>(hidden, Output<Y, Acc>{sums + 3 * hidden, c_next, h_next});
    }
  }
}

}  // namespace
}  // namespace sp
