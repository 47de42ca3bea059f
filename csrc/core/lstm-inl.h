// A step of an LSTM from its gates on: LayerNorm if there is one, activations, the new cell and the new output.
//
// Types  x, h, c, y of type Y (float, bfloat16, double); gates of type Acc (float, double)
// Cost   a few hundred cycles for 128 units: exp by a polynomial, in vectors as wide as there are
#pragma once

#include "core/epilogue-inl.h"
#include "core/lstm.h"
#include "core/simd-inl.h"

namespace sp {
namespace {

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

// The new cell, and the new output where no normalisation comes between them.
template <typename Y, typename Acc>
struct Units {
  const Acc* gates;
  int64_t hidden;
  const Y* c;
  Y* c_next;
  Y* h_next;

  template <int kN>
  SP_INLINE void run(int64_t i) const {
    Vec<Acc, kN> gate[4];
    SP_UNROLL for (int g = 0; g < 4; ++g) gate[g] = load<kN>(gates + g * hidden + i);
    finish_units<kN, Y, Acc>(gate, c + i, c_next + i, h_next + i);
  }
};

template <typename Acc, int kN>
SP_INLINE Acc total(Vec<Acc, kN> v) {
  Acc sum = 0;
  SP_UNROLL for (int i = 0; i < kN; ++i) sum += v[i];
  return sum;
}

template <typename T, typename Acc>
struct Deviation {
  const T* row;
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

template <typename T, typename Y, typename Acc>
struct Rescale {
  T* row;
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
template <typename T, typename Y, typename Acc>
void layer_norm(T* row, int64_t count, const void* weight, const void* bias, float eps) {
  const auto mean_of = [&](Acc mean, bool square) {
    const Deviation<T, Acc> deviation{row, mean, square};
    for_lanes<kLanes<Acc>>(count, deviation);
    return (total<Acc, kLanes<Acc>>(deviation.wide) + deviation.sum) / static_cast<Acc>(count);
  };
  const Acc mean = mean_of(0, false);
  const Acc variance = mean_of(mean, true) + static_cast<Acc>(eps);
  const Acc root = sizeof(Acc) == 4 ? static_cast<Acc>(__builtin_sqrtf(static_cast<float>(variance)))
                                    : static_cast<Acc>(__builtin_sqrt(static_cast<double>(variance)));
  for_lanes<kLanes<Acc>>(
      count, Rescale<T, Y, Acc>{row, static_cast<const Y*>(weight), static_cast<const Y*>(bias), mean, 1 / root});
}

template <typename Y, typename Acc>
struct Output {
  const Acc* gate;
  const Y* c;
  Y* h;

  template <int kN>
  SP_INLINE void run(int64_t i) const {
    store_narrow<kN>(h + i, vsigmoid<Acc, kN>(load<kN>(gate + i)) * vtanh<Acc, kN>(load_wide<kN>(c + i)));
  }
};

template <typename Y, typename Acc>
void lstm_gates(const LstmStep& step) {
  const LstmArgs& args = *step.lstm;
  const int64_t hidden = args.hidden;
  for (int64_t m = 0; m < args.rows; ++m) {
    Acc* gates = static_cast<Acc*>(step.gates) + m * 4 * hidden;
    const Y* c = static_cast<const Y*>(step.c) + m * hidden;
    Y* c_next = static_cast<Y*>(step.c_next) + m * hidden;
    Y* h_next = static_cast<Y*>(step.h_next) + m * hidden;
    if (args.g_weight != nullptr) layer_norm<Acc, Y, Acc>(gates, 4 * hidden, args.g_weight, args.g_bias, args.g_eps);
    for_lanes<kLanes<Acc>>(hidden, Units<Y, Acc>{gates, hidden, c, c_next, h_next});
    if (args.g_weight != nullptr) {
      layer_norm<Y, Y, Acc>(c_next, hidden, args.c_weight, args.c_bias, args.c_eps);
      for_lanes<kLanes<Acc>>(hidden, Output<Y, Acc>{gates + 3 * hidden, c_next, h_next});
    }
  }
}

}  // namespace
}  // namespace sp
