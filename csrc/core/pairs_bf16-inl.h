// A bf16 weight as pairs of inputs, in the order in which the vdpbf16ps kernels read it (dot_bf16-inl.h).
//
// A pair is two columns of one slice, the eight (or last fewer) outputs of a block row: weights [pair][8][2], the
// columns of x [pair][2]. An even number of pairs: what is missing has weights 0 and names a column that x does not
// have, whose input is 0. Made once for a prepared product (arrange_bf16), else slice by slice into a buffer.
#pragma once

#include "core/widen-inl.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

namespace sp {
namespace {

template <typename Index>
struct Pairs {
  const uint32_t* weights;
  const Index* inputs;  // twice the number of the column: then the address of a column of up to 16 bytes is no sum
  int64_t count;        // without the one that makes them even
  bool cold;            // see fetch_ahead
};

constexpr int64_t kNarrowInputs = 0x7fff;  // up to here uint16 holds twice the number of a column

SP_INLINE int64_t padded_inputs(const ProductArgs& args) { return (args.in + args.c - 1) / args.c * args.c; }

// Slices of the block rows, numbered through.
struct Slices {
  int64_t height, per_row;

  explicit Slices(const ProductArgs& args) : height(args.r), per_row((args.r + 7) / 8) {}

  SP_INLINE int64_t row(int64_t s) const { return per_row == 1 ? s : s / per_row; }
  SP_INLINE int64_t within(int64_t s) const { return per_row == 1 ? 0 : s % per_row * 8; }  // first output in its row
  SP_INLINE int64_t output(int64_t s) const { return row(s) * height + within(s); }
  SP_INLINE int64_t outputs(int64_t s) const { return height - within(s) < 8 ? height - within(s) : 8; }
};

SP_INLINE int64_t pairs_of(const ProductArgs& args, int64_t row) {
  return ((args.begin[row + 1] - args.begin[row]) * args.c + 1) / 2;
}

// Writes the pairs of slice s.
template <typename L, typename Index>
SP_INLINE void make_pairs(const L& lists, const Slices& slices, int64_t s, int64_t padded, uint32_t* weights,
                          Index* inputs) {
  const int64_t r0 = slices.within(s), height = slices.outputs(s);
  const Index none = static_cast<Index>(2 * padded);
  const auto column = [&](const Bf16* from) SP_ALWAYS_INLINE {
    if (height == 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r0));
    return _mm_maskz_loadu_epi16(static_cast<__mmask8>((1 << height) - 1), from + r0);
  };
  const uint32_t* start = weights;
  const __m256i interleave = _mm512_castsi512_si256(words([](int lane, int half) { return 8 * half + lane % 8; }));
  const auto put = [&](__m256i both, Index k, Index l) SP_ALWAYS_INLINE {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights), _mm256_permutexvar_epi16(interleave, both));
    const Index columns[2] = {k, l};
    memcpy(inputs, columns, sizeof columns);
    weights += 8, inputs += 2;
  };
  const auto join = [](__m128i first, __m128i second)
                        SP_ALWAYS_INLINE { return _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1); };
  const auto input = [&](int64_t e, int64_t j)
                         SP_ALWAYS_INLINE { return static_cast<Index>(2 * (lists.input(e) + j)); };
  const __m128i zero = _mm_setzero_si128();
  int64_t e = lists.crow[slices.row(s)];
  const int64_t end = lists.crow[slices.row(s) + 1];
  if (lists.c() == 1) {
    for (; e + 2 <= end; e += 2) {
      if constexpr (L::kContiguous) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lists.block(e)));
        put(both, input(e, 0), input(e + 1, 0));
      } else {
        put(join(column(lists.block(e)), column(lists.block(e + 1))), input(e, 0), input(e + 1, 0));
      }
    }
    if (e < end) put(join(column(lists.block(e)), zero), input(e, 0), none);
  } else {
    __m128i waiting = zero;
    Index at = none;
    bool odd = false;
    for (; e < end; ++e) {
      for (int64_t j = 0; j < lists.c(); ++j, odd = !odd) {
        const __m128i more = column(lists.block(e) + j * lists.r());
        if (odd) put(join(waiting, more), at, input(e, j));
        waiting = more, at = input(e, j);
      }
    }
    if (odd) put(join(waiting, zero), at, none);
  }
  if ((weights - start) % 16 != 0) put(join(zero, zero), none, none);
}

// Pairs of all slices in a row, and before them where those of a slice start. Weights are 64-byte aligned.
struct ArrangedPairs {
  static constexpr bool kMade = true, kEightByOne = false;
  using Index = uint16_t;
  struct Slice {
    int32_t start, count;
  };

  ArrangedPairs(const ProductArgs& args, void* to)
      : slices(static_cast<Slice*>(to)), weights(reinterpret_cast<uint32_t*>(slices + room(args))) {}

  explicit ArrangedPairs(const ProductArgs& args) : ArrangedPairs(args, const_cast<void*>(args.arranged)) {
    inputs = reinterpret_cast<Index*>(weights + 8 * int64_t(slices[args.lists * Slices(args).per_row].start));
    cold = args.cold;
  }

  SP_INLINE static int64_t room(const ProductArgs& args) { return (args.lists * Slices(args).per_row + 8) / 8 * 8; }

  SP_INLINE Pairs<Index> slice(int64_t s) const {
    const int64_t start = slices[s].start;
    return {weights + 8 * start, inputs + 2 * start, slices[s].count, cold};
  }

  Slice* slices;  // one more than there are, for the end
  uint32_t* weights;
  Index* inputs = nullptr;
  bool cold = false;
};

// Arrange (types.h) for linear_bf16.
size_t arrange_bf16(const ProductArgs& args, void* to) {
  const int64_t padded = padded_inputs(args);
  if (padded > kNarrowInputs) return 0;
  const Slices slices(args);
  const int64_t count = args.lists * slices.per_row;
  int64_t pairs = 0;
  for (int64_t s = 0; s <= count; ++s) {
    const int64_t more = s == count ? 0 : pairs_of(args, slices.row(s));
    if (to != nullptr) {
      static_cast<ArrangedPairs::Slice*>(to)[s] = {static_cast<int32_t>(pairs), static_cast<int32_t>(more)};
    }
    pairs += (more + 1) / 2 * 2;
  }
  if (to != nullptr) {
    ProductArgs done = args;
    done.arranged = to;
    const ArrangedPairs arranged(done);
    with_lists<Bf16>(args, [&](const auto& lists) {
      for (int64_t s = 0; s < count; ++s) {
        const int64_t start = arranged.slices[s].start;
        make_pairs(lists, slices, s, padded, arranged.weights + 8 * start, arranged.inputs + 2 * start);
      }
    });
  }
  return static_cast<size_t>(ArrangedPairs::room(args)) * sizeof(ArrangedPairs::Slice) +
         static_cast<size_t>(pairs) * (32 + 4);
}

// Pairs of the slice asked for last, in a buffer with room for all columns of x.
template <typename L, typename Column>
struct BufferedPairs {
  static constexpr bool kMade = false, kEightByOne = L::kEightByOne;
  using Index = Column;

  BufferedPairs(const ProductArgs& args, const L& lists, void* buffer)
      : args(args),
        lists(lists),
        slices(args),
        padded(padded_inputs(args)),
        weights(static_cast<uint32_t*>(buffer)),
        inputs(reinterpret_cast<Index*>(weights + (padded / 2 + 2) * 8)) {}

  SP_INLINE Pairs<Index> slice(int64_t s) const {
    make_pairs(lists, slices, s, padded, weights, inputs);
    return {weights, inputs, pairs_of(args, slices.row(s)), false};  // just made, so in the first cache
  }

  const ProductArgs& args;
  const L& lists;
  Slices slices;
  int64_t padded;
  uint32_t* weights;
  Index* inputs;
};

template <typename Column, typename L>
BufferedPairs<L, Column> buffered_pairs(const ProductArgs& args, const L& lists, void* buffer) {
  return {args, lists, buffer};
}

// Twice the two columns of pair t: in one load where they are narrow, since loads are what binds most kernels here.
struct Columns {
  int64_t first, second;
};
SP_INLINE Columns columns_of(const uint16_t* inputs, int64_t t) {
  uint32_t both;
  memcpy(&both, inputs + 2 * t, sizeof both);
  return {both & 0xffff, both >> 16};
}
SP_INLINE Columns columns_of(const int32_t* inputs, int64_t t) { return {inputs[2 * t], inputs[2 * t + 1]}; }

}  // namespace
}  // namespace sp

#endif
