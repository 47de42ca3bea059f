#include "core/lists.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/elements.h"

namespace sp {

namespace {

uint64_t load_word(const uint8_t* from) {
  uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

// Mask bytes i < count, each 0 or 1, as bits, lowest first.
void pack_bits(const uint8_t* mask, int64_t count, uint8_t* bits) {
  int64_t i = 0;
#if defined(__SSE2__)
  for (; i + 16 <= count; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask + i));
    const uint16_t packed = static_cast<uint16_t>(_mm_movemask_epi8(_mm_slli_epi16(bytes, 7)));
    std::memcpy(bits + i / 8, &packed, sizeof packed);
  }
#endif
  for (; i < count; i += 8) {
    uint8_t bytes[8] = {};
    std::memcpy(bytes, mask + i, static_cast<size_t>(std::min<int64_t>(8, count - i)));
    bits[i / 8] = static_cast<uint8_t>((load_word(bytes) * 0x0102040810204080ull) >> 56);
  }
}

// Sum of mask bytes i < count, each 0 or 1: eight at a time, as long as a byte can hold their sum.
int32_t sum_bytes(const uint8_t* mask, int64_t count) {
  int64_t sum = 0, i = 0;
  while (i + 8 <= count) {
    const int64_t end = std::min(count - 7, i + 8 * 255);
    uint64_t bytes = 0;
    for (; i < end; i += 8) bytes += load_word(mask + i);
    const uint64_t pairs = (bytes & 0x00ff00ff00ff00ffull) + (bytes >> 8 & 0x00ff00ff00ff00ffull);
    sum += static_cast<int64_t>((pairs * 0x0001000100010001ull) >> 48);
  }
  for (; i < count; ++i) sum += mask[i];
  return static_cast<int32_t>(sum);
}

// sums[j] = sum of column j: in bytes, as long as one can hold it.
void sum_columns(const uint8_t* mask, int64_t rows, int64_t cols, int32_t* sums) {
  std::vector<uint8_t> bytes(static_cast<size_t>(cols));
  std::fill_n(sums, cols, 0);
  for (int64_t b = 0; b < rows;) {
    std::fill(bytes.begin(), bytes.end(), uint8_t{0});
    for (const int64_t end = std::min<int64_t>(rows, b + 255); b < end; ++b) {
      for (int64_t j = 0; j < cols; ++j) bytes[j] = static_cast<uint8_t>(bytes[j] + mask[b * cols + j]);
    }
    for (int64_t j = 0; j < cols; ++j) sums[j] += bytes[j];
  }
}

// Columns of the set bytes of one mask row; `to` has room for cols + 1, since every column is written before it counts.
template <typename Id>
void set_columns(const uint8_t* mask, int64_t cols, Id* to) {
  for (int64_t j = 0; j < cols; ++j) {
    *to = static_cast<Id>(j);
    to += mask[j];
  }
}

void prefix_sums(int32_t* begin, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i <= count; ++i) {
    const int32_t here = begin[i];
    begin[i] = sum;
    sum += here;
  }
}

template <typename Col, typename Row>
void build(const uint8_t* mask, int64_t rows, int64_t cols, const BlockLists& lists) {
  Col* col = static_cast<Col*>(lists.col);
  Row* row_t = static_cast<Row*>(lists.row_t);
  std::vector<Col> line(static_cast<size_t>(cols + 1));
  std::vector<int32_t> next(static_cast<size_t>(cols + 1), 0);
  sum_columns(mask, rows, cols, next.data());
  prefix_sums(next.data(), cols);
  std::copy(next.begin(), next.end(), lists.crow_t);
  for (int64_t b = 0; b < rows; ++b) {
    const int32_t begin = lists.crow[b], end = lists.crow[b + 1];
    if (begin == end) continue;
    set_columns(mask + b * cols, cols, line.data());
    std::copy_n(line.data(), end - begin, col + begin);
    for (int32_t e = begin; e < end; ++e) {
      const int32_t place = next[line[e - begin]]++;
      row_t[place] = static_cast<Row>(b);
      lists.pos_t[place] = e;
    }
  }
}

struct Change {
  int32_t row, col;
  bool kept;
};

// Calls visit(place) for every place in row order where the masks differ, in order, until it returns false.
template <typename Visit>
void differences(const uint8_t* before, const uint8_t* after, int64_t count, const Visit& visit) {
  const int64_t bytes = (count + 7) / 8;
  for (int64_t i = 0; i < bytes; i += 8) {
    uint64_t word = 0;
    if (i + 8 <= bytes) {
      word = load_word(before + i) ^ load_word(after + i);
    } else {
      for (int64_t q = i; q < bytes; ++q) word |= static_cast<uint64_t>(before[q] ^ after[q]) << (8 * (q - i));
    }
    for (; word != 0; word &= word - 1) {
      if (!visit(i * 8 + __builtin_ctzll(word))) return;
    }
  }
}

// One block row of `after`, merged from that of `before` and its changes [first, last), both in column order.
template <typename Col>
void merge_row(const Col* from, const Col* end, const Change* first, const Change* last, Col* to) {
  for (; first != last; ++first) {
    while (from != end && *from < first->col) *to++ = *from++;
    if (first->kept) {
      *to++ = static_cast<Col>(first->col);
    } else {
      ++from;
    }
  }
  std::copy(from, end, to);
}

template <typename Col, typename Row>
class Update {
 public:
  Update(int64_t rows, int64_t cols, const BlockLists& before, const BlockLists& after)
      : rows_(rows), cols_(cols), before_(before), after_(after) {
    differences(before.bits, after.bits, rows * cols, [&](int64_t place) {
      const bool kept = (after.bits[place / 8] >> (place % 8) & 1) != 0;
      changes_.push_back({static_cast<int32_t>(place / cols), static_cast<int32_t>(place % cols), kept});
      return true;
    });
  }

  void run() {
    row_lists();
    sort_by_column();
    column_lists();
  }

 private:
  // From row order to column order, rows ascending in each column.
  void sort_by_column() {
    std::vector<int32_t> next(static_cast<size_t>(cols_ + 1), 0);
    for (const Change& change : changes_) ++next[change.col];
    prefix_sums(next.data(), cols_);
    std::vector<Change> sorted(changes_.size());
    for (const Change& change : changes_) sorted[next[change.col]++] = change;
    changes_.swap(sorted);
  }

  // Runs of unchanged block rows are copied in one piece.
  void row_lists() {
    const Col* from = static_cast<const Col*>(before_.col);
    Col* to = static_cast<Col*>(after_.col);
    const Change* change = changes_.data();
    const Change* end = change + changes_.size();
    int64_t done = 0;
    while (change != end) {
      const int64_t row = change->row;
      const Change* last = change;
      while (last != end && last->row == row) ++last;
      std::copy(from + before_.crow[done], from + before_.crow[row], to + after_.crow[done]);
      merge_row(from + before_.crow[row], from + before_.crow[row + 1], change, last, to + after_.crow[row]);
      change = last;
      done = row + 1;
    }
    std::copy(from + before_.crow[done], from + before_.crow[rows_], to + after_.crow[done]);
  }

  // Entries [begin, end) of the transposed lists before, in one piece: block rows stay, places move with their row.
  void copy_run(int64_t begin, int64_t end) {
    const Row* row = static_cast<const Row*>(before_.row_t);
    std::copy(row + begin, row + end, static_cast<Row*>(after_.row_t) + place_);
    int32_t* to = after_.pos_t + place_;
    for (int64_t p = begin; p < end; ++p) *to++ = before_.pos_t[p] + moved_[row[p]];
    place_ += end - begin;
  }

  void column_lists() {
    moved_.resize(static_cast<size_t>(rows_));
    for (int64_t b = 0; b < rows_; ++b) moved_[b] = after_.crow[b] - before_.crow[b];
    std::vector<int32_t> grown(static_cast<size_t>(cols_ + 1), 0);
    int64_t from = 0;
    for (const Change& change : changes_) {
      const Row* row = static_cast<const Row*>(before_.row_t);
      const int64_t first = before_.crow_t[change.col], last = before_.crow_t[change.col + 1];
      // Up to the change: whole columns before it, and the rows above it in its own.
      const int64_t up_to = std::lower_bound(row + std::max(first, from), row + last, change.row) - row;
      copy_run(from, up_to);
      from = up_to;
      if (change.kept) {
        static_cast<Row*>(after_.row_t)[place_] = static_cast<Row>(change.row);
        after_.pos_t[place_++] = place_of(change);
        ++grown[change.col];
      } else {
        ++from;
        --grown[change.col];
      }
      correct(change);
    }
    copy_run(from, before_.crow_t[cols_]);
    int32_t sum = 0;
    for (int64_t j = 0; j <= cols_; ++j) {
      after_.crow_t[j] = before_.crow_t[j] + sum;
      sum += grown[j];
    }
  }

  // Place in row order of a block that the change brought.
  int32_t place_of(const Change& change) const {
    const Col* col = static_cast<const Col*>(after_.col);
    return static_cast<int32_t>(
        std::lower_bound(col + after_.crow[change.row], col + after_.crow[change.row + 1], change.col) - col);
  }

  // Columns are done in order: behind this one, the blocks of the changed row lie one place further, or one less far.
  void correct(const Change& change) { moved_[change.row] += change.kept ? 1 : -1; }

  int64_t rows_, cols_;
  const BlockLists& before_;
  const BlockLists& after_;
  std::vector<Change> changes_;
  std::vector<int32_t> moved_;  // per block row: places that its blocks, from the column at hand on, moved by
  int64_t place_ = 0;
};

// Calls body with a zero of the types of block columns and block rows.
template <typename Body>
void with_id_types(const BlockLists& lists, const Body& body) {
  const auto rows = [&](auto col) { lists.narrow_row ? body(col, uint16_t{0}) : body(col, int32_t{0}); };
  lists.narrow_col ? rows(uint16_t{0}) : rows(int32_t{0});
}

// A score as an unsigned number of the same order; both zeros give the same.
template <typename T>
auto key_of(T score) {
  using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr int kTop = sizeof(T) * 8 - 1;
  const T positive_zero = score + T(0);
  Key bits;
  std::memcpy(&bits, &positive_zero, sizeof bits);
  return bits ^ ((Key(0) - (bits >> kTop)) | (Key(1) << kTop));
}

template <typename Key>
struct Threshold {
  Key key;       // the keep-th highest
  int64_t ties;  // how many keys equal it
  int64_t keep;  // how many of those belong to the `keep` highest
};

// By 11 bits at a time, from the top, among the keys that agree so far.
template <typename Key>
Threshold<Key> find_threshold(const Key* keys, int64_t count, int64_t keep) {
  constexpr int kDigit = 11, kSets = 4;
  std::vector<int32_t> histogram(kSets << kDigit);
  std::vector<Key> candidates;
  Key prefix = 0;
  for (int top = sizeof(Key) * 8; top > 0;) {
    const int shift = std::max(0, top - kDigit);
    const Key digits = (Key(1) << (top - shift)) - 1;
    std::fill(histogram.begin(), histogram.end(), 0);
    // Four sets of counters: neighbours often fall on one counter, which then waits for itself.
    int64_t i = 0;
    for (; i + kSets <= count; i += kSets) {
      for (int q = 0; q < kSets; ++q) ++histogram[(keys[i + q] >> shift & digits) * kSets + q];
    }
    for (; i < count; ++i) ++histogram[(keys[i] >> shift & digits) * kSets];
    int64_t digit = static_cast<int64_t>(digits);
    for (;; --digit) {
      int64_t here = 0;
      for (int q = 0; q < kSets; ++q) here += histogram[digit * kSets + q];
      if (here >= keep) break;
      keep -= here;
    }
    prefix |= static_cast<Key>(digit) << shift;
    std::vector<Key> agreeing(static_cast<size_t>(count + 1));  // every key is written before it counts
    int64_t kept = 0;
    for (i = 0; i < count; ++i) {
      agreeing[kept] = keys[i];
      kept += (keys[i] >> shift & digits) == static_cast<Key>(digit);
    }
    candidates.swap(agreeing);
    keys = candidates.data();
    count = kept;
    top = shift;
  }
  return {prefix, count, keep};
}

template <typename T>
void select(const T* scores, int64_t count, int64_t keep, uint8_t* kept) {
  std::vector<decltype(key_of(T()))> keys(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) keys[i] = key_of(scores[i]);
  const auto threshold = find_threshold(keys.data(), count, keep);
  for (int64_t i = 0; i < count; ++i) kept[i] = keys[i] >= threshold.key;
  for (int64_t i = count, drop = threshold.ties - threshold.keep; drop > 0;) {
    if (keys[--i] == threshold.key) kept[i] = 0, --drop;
  }
}

float wide(float value) { return value; }
float wide(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

// Sum: float, or double where a block has so many elements that one float would lose the last of them.
template <typename Sum, typename T>
void dots(const T* a, const T* e, int64_t n, int64_t k, int64_t r, int64_t c, int64_t b0, int64_t b1, float* sums) {
  const int64_t cols = (k + c - 1) / c;
  std::vector<Sum> line(static_cast<size_t>(cols));
  for (int64_t b = b0; b < b1; ++b) {
    std::fill(line.begin(), line.end(), Sum(0));
    for (int64_t i = b * r; i < std::min(n, (b + 1) * r); ++i) {
      const T *of_a = a + i * k, *of_e = e + i * k;
      if (c == 1) {
        for (int64_t j = 0; j < k; ++j) line[j] += wide(of_a[j]) * wide(of_e[j]);
        continue;
      }
      for (int64_t j = 0; j < cols; ++j) {
        Sum sum(0);
        for (int64_t q = j * c; q < std::min(k, (j + 1) * c); ++q) sum += wide(of_a[q]) * wide(of_e[q]);
        line[j] += sum;
      }
    }
    std::copy(line.begin(), line.end(), sums + b * cols);
  }
}

constexpr int64_t kFloatSums = 4096;  // elements of a block

template <typename T>
void any_dots(const T* a, const T* e, int64_t n, int64_t k, int64_t r, int64_t c, int64_t b0, int64_t b1, float* sums) {
  std::min(n, r) * std::min(k, c) <= kFloatSums ? dots<float>(a, e, n, k, r, c, b0, b1, sums)
                                                : dots<double>(a, e, n, k, r, c, b0, b1, sums);
}

template <typename T>
void mask_rows(const T* weight, int64_t n, int64_t k, int64_t r, int64_t c, const uint8_t* bits, T* to) {
  const int64_t cols = (k + c - 1) / c;
  std::vector<T> kept(static_cast<size_t>(cols * c));  // of the block row at hand, per input: all bits or none
  for (int64_t b = 0; b * r < n; ++b) {
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t place = b * cols + j;
      const T flag = static_cast<T>(0) - static_cast<T>(bits[place / 8] >> (place % 8) & 1);
      for (int64_t q = 0; q < c; ++q) kept[j * c + q] = flag;
    }
    for (int64_t i = b * r; i < std::min(n, (b + 1) * r); ++i) {
      for (int64_t j = 0; j < k; ++j) to[i * k + j] = weight[i * k + j] & kept[j];
    }
  }
}

}  // namespace

int64_t count_blocks(const uint8_t* mask, int64_t rows, int64_t cols, uint8_t* bits, int32_t* crow) {
  pack_bits(mask, rows * cols, bits);
  crow[0] = 0;
  for (int64_t b = 0; b < rows; ++b) crow[b + 1] = crow[b] + sum_bytes(mask + b * cols, cols);
  return crow[rows];
}

void build_lists(const uint8_t* mask, int64_t rows, int64_t cols, const BlockLists& lists) {
  with_id_types(lists, [&](auto col, auto row) { build<decltype(col), decltype(row)>(mask, rows, cols, lists); });
}

int64_t count_changes(const uint8_t* before, const uint8_t* after, int64_t rows, int64_t cols, int64_t limit) {
  int64_t count = 0;
  differences(before, after, rows * cols, [&](int64_t) { return ++count < limit; });
  return count;
}

void update_lists(int64_t rows, int64_t cols, const BlockLists& before, const BlockLists& after) {
  with_id_types(after,
                [&](auto col, auto row) { Update<decltype(col), decltype(row)>(rows, cols, before, after).run(); });
}

void mask_weight(const void* weight, int64_t n, int64_t k, int64_t r, int64_t c, const uint8_t* bits,
                 size_t element_bytes, void* to) {
  with_bits(element_bytes, [&](auto zero) {
    using T = decltype(zero);
    mask_rows(static_cast<const T*>(weight), n, k, r, c, bits, static_cast<T*>(to));
  });
}

void block_dots(const float* a, const float* e, int64_t n, int64_t k, int64_t r, int64_t c, int64_t b0, int64_t b1,
                float* sums) {
  any_dots(a, e, n, k, r, c, b0, b1, sums);
}
void block_dots(const Bf16* a, const Bf16* e, int64_t n, int64_t k, int64_t r, int64_t c, int64_t b0, int64_t b1,
                float* sums) {
  any_dots(a, e, n, k, r, c, b0, b1, sums);
}

void select_highest(const float* scores, int64_t count, int64_t keep, uint8_t* kept) {
  select(scores, count, keep, kept);
}
void select_highest(const double* scores, int64_t count, int64_t keep, uint8_t* kept) {
  select(scores, count, keep, kept);
}

}  // namespace sp
