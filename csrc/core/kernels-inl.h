// All kernels, and their table for the instruction set of the source that includes this.
#pragma once

#include "core/linear-inl.h"
#include "core/linear_bf16-inl.h"
#include "core/linear_dw-inl.h"
#include "core/linear_dx-inl.h"
#include "core/linear_i8-inl.h"
#include "core/lstm-inl.h"

namespace sp {
namespace {

constexpr KernelTable kernels_named(const char* name) {
  return {
      .name = name,
      .linear_f32 = &linear<float>,
      .linear_bf16 = &linear_bf16,
      .linear_i8 = &linear_i8,
      .arrange_bf16 = arrange_bf16,
      .arrange_i8 = kArrangeI8,
      .linear_dx_f32 = &linear_dx<float>,
      .linear_dx_few_f32 = &linear_dx_few,
      .linear_dw_f32 = kWeightGrad<float>,
      .lstm_gates_f32 = &lstm_gates<float, float>,
      .lstm_gates_bf16 = &lstm_gates<Bf16, float>,
  };
}

}  // namespace
}  // namespace sp
