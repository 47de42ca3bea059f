// Sums of a few rows, collected until they make whole cache lines of y.
//
// Rows of y are often a power of two apart, so that few of their lines fit the caches together: written eight outputs
// at a time, each line would be evicted and fetched again between its parts. And an epilogue of 32 outputs costs little
// more than one of eight.
#pragma once

#include "core/epilogue-inl.h"

namespace sp {
namespace {

constexpr int kCollected = 32;   // outputs
constexpr int kLineStride = 48;  // floats from row to row of a tile: room for what is stored past the last output

// Outputs n .. n + count - 1, count <= kCollected, of `rows` rows from tile[i * kLineStride]. Out of line, for all
// kernels.
template <typename Y>
__attribute__((noinline)) void put_lines_of(const Epilogue<Y, float>& epilogue, const float* tile, int64_t row,
                                            int64_t rows, int64_t n, int64_t count) {
  constexpr int kV = SP_VECTOR_BYTES == 64 ? 16 : 8, kParts = kCollected / kV;
  const auto write = [](Y* y, const Vec<float, kV>* part) SP_ALWAYS_INLINE {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(Y) == 2) {
      _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh((__m512)part[1], (__m512)part[0]));
      return;
    }
#endif
    SP_UNROLL for (int p = 0; p < kParts; ++p) store_narrow<kV>(y + p * kV, part[p]);
  };
  if (count == kCollected && epilogue.plain) {
    Vec<float, kV> bias[kParts] = {};
    if (epilogue.bias != nullptr) {
      SP_UNROLL for (int p = 0; p < kParts; ++p) bias[p] = load_wide<kV>(epilogue.bias + n + p * kV);
    }
    for (int64_t i = 0; i < rows; ++i) {
      Vec<float, kV> part[kParts];
      SP_UNROLL for (int p = 0; p < kParts; ++p) part[p] = load<kV>(tile + i * kLineStride + p * kV) + bias[p];
      write(epilogue.y + (row + i) * epilogue.out + n, part);
    }
  } else if (count == kCollected) {
    for (int64_t i = 0; i < rows; ++i) {
      Vec<float, kV> part[kParts];
      for (int p = 0; p < kParts; ++p) {
        part[p] = epilogue.template finish<kV>(row + i, n + p * kV, load<kV>(tile + i * kLineStride + p * kV));
      }
      const int64_t at = (row + i) * epilogue.out + n;
      if (epilogue.wide) {
        float* y = reinterpret_cast<float*>(epilogue.y) + at;
        SP_UNROLL for (int p = 0; p < kParts; ++p) store<kV>(y + p * kV, part[p]);
      } else {
        write(epilogue.y + at, part);
      }
    }
  } else {
    for (int64_t g = 0; g < count; g += 8) {
      for (int64_t i = 0; i < rows; ++i) {
        epilogue.template put<8>(row + i, n + g, load<8>(tile + i * kLineStride + g), count - g);
      }
    }
  }
}

// What a kernel of at most kRows rows writes its sums to, block row after block row.
template <int kRows, typename Y>
class Lines {
 public:
  Lines(const Epilogue<Y, float>& epilogue, int64_t row, int64_t rows) : epilogue_(epilogue), row_(row), rows_(rows) {}

  // Where eight sums of output n and the following go, rows kLineStride apart; `height` of them count.
  SP_INLINE float* place(int64_t n, int64_t height) {
    if (n % kCollected == 0 || waiting_ + height > kCollected) flush();
    if (waiting_ == 0) first_ = n;
    waiting_ += height;
    return tile_ + (waiting_ - height);
  }

  SP_INLINE void flush() {
    const int64_t left = epilogue_.out - first_, count = left < waiting_ ? left : waiting_;
    if (count > 0) put_lines_of(epilogue_, tile_, row_, rows_, first_, count);
    waiting_ = 0;
  }

 private:
  alignas(64) float tile_[kRows * kLineStride];
  const Epilogue<Y, float>& epilogue_;
  int64_t row_, rows_, first_ = 0, waiting_ = 0;
};

}  // namespace
}  // namespace sp
