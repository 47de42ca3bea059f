// What the check programs share: exactly sized buffers, values of any type, random block weights, planted faults.
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/isa.h"
#include "core/product.h"

namespace sp {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
inline std::mt19937 rng(20230913);

inline double uniform() { return std::uniform_real_distribution<double>(-1, 1)(rng); }
inline int64_t below(int64_t count) { return static_cast<int64_t>(rng() % static_cast<size_t>(count)); }

// Exactly `count` elements, 64-byte aligned like a tensor's: the byte after the last one is poisoned. All bits are set,
// which is a NaN in every floating-point type.
template <typename T>
struct Buffer {
  explicit Buffer(size_t count) : size(count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, std::max<size_t>(count * sizeof(T), 1)) != 0) abort();
    memset(memory, 0xff, count * sizeof(T));
    data.reset(static_cast<T*>(memory));
  }
  T& operator[](size_t i) { return data.get()[i]; }
  const T& operator[](size_t i) const { return data.get()[i]; }
  struct Free {
    void operator()(T* memory) const { free(memory); }
  };
  std::unique_ptr<T, Free> data;
  size_t size;
};

inline void put(float* to, double value) { *to = static_cast<float>(value); }
inline void put(double* to, double value) { *to = value; }
inline void put(int8_t* to, double value) { *to = static_cast<int8_t>(lrint(value * 127)); }
inline void put(Bf16* to, double value) {
  const float single = static_cast<float>(value);
  uint32_t bits;
  memcpy(&bits, &single, 4);
  to->bits = isnan(value) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline double get(float value) { return value; }
inline double get(double value) { return value; }
inline double get(int8_t value) { return value; }
inline double get(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float single;
  memcpy(&single, &bits, 4);
  return single;
}

template <typename T>
Buffer<T> random_buffer(int64_t count) {
  Buffer<T> buffer(static_cast<size_t>(count));
  for (size_t i = 0; i < buffer.size; ++i) put(&buffer[i], uniform());
  return buffer;
}

struct Shape {
  int64_t m, n, k, r, c;
};

// The form of the lists: ids of two bytes or four; blocks by position, from a pool with strangers first and last;
// lists of block rows by block column, instead of block columns by block row.
struct Form {
  bool narrow, indirect, by_column;
};

// A random weight [N, K] whose first block row is empty, the last one full, block column 1 empty but for that.
template <typename W>
struct Weight {
  Weight(const Shape& shape, double density, const Form& form)
      : rows((shape.n + shape.r - 1) / shape.r),
        columns((shape.k + shape.c - 1) / shape.c),
        lists(form.by_column ? columns : rows),
        mask(make_mask(density)),
        kept(std::count(mask.begin(), mask.end(), true)),
        pool(kept + 2 * form.indirect),
        dense(static_cast<size_t>(shape.n * shape.k)),
        begin(static_cast<size_t>(lists) + 1),
        wide(static_cast<size_t>(form.narrow ? 0 : kept)),
        pos(static_cast<size_t>(kept)),
        ids(static_cast<size_t>(form.narrow ? kept : 0)),
        values(static_cast<size_t>(pool * shape.r * shape.c)),
        form_(form) {
    fill_lists();
    fill_values(shape);
  }

  // Sets begin, other, pos, narrow of either kind of arguments.
  template <typename Args>
  void describe(Args& args) const {
    args.begin = begin.data.get();
    args.narrow = form_.narrow;
    args.other = form_.narrow ? static_cast<const void*>(ids.data.get()) : wide.data.get();
    args.pos = form_.indirect || form_.by_column ? pos.data.get() : nullptr;
  }

  bool kept_at(const Shape& shape, int64_t n, int64_t k) const {
    return mask[static_cast<size_t>(n / shape.r * columns + k / shape.c)];
  }

  int64_t rows, columns, lists;
  std::vector<bool> mask;
  int64_t kept, pool;  // blocks
  std::vector<double> dense;
  Buffer<int32_t> begin, wide, pos;
  Buffer<uint16_t> ids;
  Buffer<W> values;

 private:
  std::vector<bool> make_mask(double density) const {
    std::vector<bool> made;
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t j = 0; j < columns; ++j) {
        made.push_back(b == rows - 1 || (b > 0 && j != 1 && uniform() < 2 * density - 1));
      }
    }
    return made;
  }

  void fill_lists() {
    std::vector<int32_t> place(mask.size());
    for (size_t i = 0, at = 0; i < mask.size(); ++i) place[i] = static_cast<int32_t>(mask[i] ? at++ : 0);
    size_t e = 0;
    for (int64_t l = 0; l < lists; ++l) {
      begin[static_cast<size_t>(l)] = static_cast<int32_t>(e);
      for (int64_t o = 0; o < (form_.by_column ? rows : columns); ++o) {
        const size_t i = static_cast<size_t>(form_.by_column ? o * columns + l : l * columns + o);
        if (!mask[i]) continue;
        if (form_.narrow) ids[e] = static_cast<uint16_t>(o);
        if (!form_.narrow) wide[e] = static_cast<int32_t>(o);
        pos[e++] = place[i] + form_.indirect;
      }
    }
    begin[static_cast<size_t>(lists)] = static_cast<int32_t>(e);
  }

  void fill_values(const Shape& shape) {
    for (size_t i = 0, at = 0; i < mask.size(); ++i) {
      if (!mask[i]) continue;
      const int64_t n0 = static_cast<int64_t>(i) / columns * shape.r, k0 = static_cast<int64_t>(i) % columns * shape.c;
      W* block = &values[(at++ + form_.indirect) * static_cast<size_t>(shape.r * shape.c)];
      for (int64_t q = 0; q < shape.r * shape.c; ++q) {
        const int64_t n = n0 + q % shape.r, k = k0 + q / shape.r;
        const bool inside = n < shape.n && k < shape.k;
        sp::put(block + q, inside ? uniform() : 0);
        if (inside) dense[static_cast<size_t>(n * shape.k + k)] = get(block[q]);
      }
    }
  }

  Form form_;
};

constexpr int64_t kBlocks[][2] = {{8, 1}, {16, 1}, {8, 4}, {4, 4}, {1, 1}, {3, 5}, {16, 16}, {8, 2}, {1, 8}, {24, 3}};
constexpr double kSingle = 6e-8, kDouble = 1.2e-16;  // unit roundoff of the sums

enum class Fault { kNone, kRead, kWrite, kOverflow };
inline Fault fault = Fault::kNone;

// A fault of the kind that is asked for, behind the end of what a kernel read and wrote.
template <typename From, typename To>
void plant(const Buffer<From>& from, Buffer<To>& to) {
  volatile char* y = reinterpret_cast<volatile char*>(to.data.get());
  if (fault == Fault::kRead) y[0] = reinterpret_cast<const char*>(from.data.get())[from.size * sizeof(From)];
  if (fault == Fault::kWrite) y[to.size * sizeof(To)] = 0;
  volatile int large = std::numeric_limits<int>::max();
  if (fault == Fault::kOverflow) large = large + 1;
}

// The suites; false if a result is wrong.
bool check_products();
bool check_gradients();
bool check_lstm();

}  // namespace sp
