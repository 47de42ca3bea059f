// strips_pack and strips_linear.
#include <sys/mman.h>

#include "tests/cuda/prove.h"

namespace sp::prove {
namespace {

const char* name_of(Dtype dtype) { return dtype == Dtype::kFloat ? "f32" : dtype == Dtype::kHalf ? "f16" : "bf16"; }

// The strips as a dense matrix again, by the words of kernels.h; `wrong` tells what is against them.
std::vector<double> unpack(const Packed& packed, const Weight& w, std::string& wrong) {
  const cuda::Strips& s = packed.strips;
  std::vector<double> dense(static_cast<size_t>(w.n) * w.k, 0.0);
  std::vector<uint8_t> seen(dense.size(), 0);
  const size_t bytes = cuda::size_of(w.dtype);
  for (int list = 0; list < s.strips * s.chunks; ++list) {
    for (int o = s.begin[list]; o < s.begin[list + 1]; ++o) {
      for (int slot = 0; slot < 8; ++slot) {
        const int id = s.ids[o * 8 + slot], k = list % s.chunks * cuda::kChunk + id;
        if (id >= cuda::kChunk || k >= w.k) return wrong = "an id is out of range", dense;
        for (int i = 0; i < s.p; ++i) {
          const int lane = i % 8 * 4 + (bytes == 2 ? slot / 2 : slot % 4), inner = bytes == 2 ? slot % 2 : slot / 4;
          const size_t at = ((static_cast<size_t>(o) * 32 + static_cast<size_t>(lane)) * (s.p / 8) + i / 8) * 2 + inner;
          uint32_t bits = 0;
          memcpy(&bits, static_cast<const char*>(s.values) + at * bytes, bytes);
          const double value = from_bits(w.dtype, bits);
          const int n = list / s.chunks * s.p + i;
          if (n >= w.n) {
            if (value != 0) wrong = "a value beyond the last output is not zero";
            continue;
          }
          double& cell = dense[static_cast<size_t>(n) * w.k + k];
          if (value != 0 && cell != 0) wrong = "an input occurs twice in a list";
          if (value != 0) cell = value;
        }
      }
    }
  }
  return dense;
}

// Octets of full lists that do not gather without conflict although their residues would allow it.
bool dealt_evenly(const Packed& packed) {
  const cuda::Strips& s = packed.strips;
  for (int list = 0; list < s.strips * s.chunks; ++list) {
    const int octets = s.begin[list + 1] - s.begin[list];
    std::vector<int> of_residue(8, 0);
    for (int o = s.begin[list]; o < s.begin[list + 1]; ++o) {
      std::vector<std::vector<int>> here(8);
      for (int slot = 0; slot < 8; ++slot) {
        const int id = s.ids[o * 8 + slot];
        auto& same = here[static_cast<size_t>(cuda::bank_of(id))];
        if (std::find(same.begin(), same.end(), id) == same.end()) same.push_back(id);
      }
      for (size_t q = 0; q < 8; ++q) of_residue[q] += static_cast<int>(here[q].size());
    }
    for (int o = s.begin[list]; o < s.begin[list + 1]; ++o) {
      std::vector<std::vector<int>> here(8);
      for (int slot = 0; slot < 8; ++slot) {
        const int id = s.ids[o * 8 + slot];
        auto& same = here[static_cast<size_t>(cuda::bank_of(id))];
        if (std::find(same.begin(), same.end(), id) == same.end()) same.push_back(id);
      }
      for (size_t q = 0; q < 8; ++q) {
        if (static_cast<int>(here[q].size()) > (of_residue[q] + octets - 1) / octets) return false;
      }
    }
  }
  return true;
}

struct Case {
  int64_t m;
  int n, k, r, c, p, tile_m;
  double density;
  Dtype dtype;
  bool narrow, indirect;
  Activation activation;
  bool bias, residual;
  int slack;      // elements between the rows of x
  int shift = 0;  // elements by which x, bias and residual begin behind an aligned address
};

std::string describe(const Case& one) {
  char text[240];
  snprintf(text, sizeof text, "linear %s P%d M%ld N%d K%d %dx%d density %.2f tile %d%s%s%s%s act %d stride +%d%s",
           name_of(one.dtype), one.p, static_cast<long>(one.m), one.n, one.k, one.r, one.c, one.density, one.tile_m,
           one.narrow ? "" : " wide", one.indirect ? " pos" : "", one.bias ? " bias" : "",
           one.residual ? " residual" : "", static_cast<int>(one.activation), one.slack,
           one.shift > 0 ? " misaligned" : "");
  return text;
}

bool check(const Case& one) {
  Weight w(one.n, one.k, one.r, one.c, one.density, one.dtype, one.narrow, one.indirect);
  Packed packed(w, one.p);
  const int64_t stride = one.k + one.slack;
  Tensor x(one.dtype, static_cast<size_t>(one.m > 0 ? (one.m - 1) * stride + one.k : 0), "x", Access::kRead,
           static_cast<size_t>(one.shift));
  for (int64_t m = 0; m < one.m; ++m) {
    for (int k = 0; k < one.k; ++k) x.fill(static_cast<size_t>(m * stride + k));
  }
  // Rows that are not finite reach the block rows that keep their inputs, and no other.
  if (one.m > 2 && one.k > 2 && one.p <= one.r && one.c == 1) {
    x.set(static_cast<size_t>(stride + 1), kNan);
    if (one.activation == Activation::kNone) x.set(static_cast<size_t>(2 * stride), kInfinity);
  }
  Tensor bias(one.dtype, static_cast<size_t>(one.n), "bias", Access::kRead, static_cast<size_t>(one.shift));
  for (int n = 0; n < one.n; ++n) bias.fill(static_cast<size_t>(n));
  const size_t outputs = static_cast<size_t>(one.m) * one.n;
  Tensor residual(one.dtype, outputs, "residual", Access::kRead, static_cast<size_t>(one.shift));
  for (size_t i = 0; i < outputs; ++i) residual.fill(i);
  Tensor y(one.dtype, outputs, "y", Access::kWrite);
  cuda::LinearArgs args{};
  args.weight = packed.strips;
  args.x = x.data();
  args.x_stride = stride;
  args.bias = one.bias ? bias.data() : nullptr;
  args.residual = one.residual ? residual.data() : nullptr;
  args.y = y.data();
  args.m = one.m;
  args.activation = one.activation;
  args.tile_m = one.tile_m;
  const char* error = cuda::linear(args, one.dtype, 3, nullptr);

  // Sums of K products, each exact in float for 16-bit operands; floats keep 22 bits of each operand. The activations
  // have slopes up to 1.13 and errors of their own.
  const double rounding = one.k * 0x1p-24 + (one.dtype == Dtype::kFloat ? 0x1p-20 : 0);
  std::vector<double> want(outputs), bound(outputs);
  for (int64_t m = 0; m < one.m; ++m) {
    for (int n = 0; n < one.n; ++n) {
      double sum = one.bias ? bias.get(static_cast<size_t>(n)) : 0, magnitude = fabs(sum);
      for (int k = 0; k < one.k; ++k) {
        if (!w.keeps(n, k)) continue;
        const double product = w.dense[static_cast<size_t>(n) * one.k + k] * x.get(static_cast<size_t>(m * stride + k));
        sum += product;
        magnitude += fabs(product);
      }
      const size_t i = static_cast<size_t>(m * one.n + n);
      if (!std::isfinite(sum)) sum = kNan;  // infinity times the zero of a filler is NaN
      want[i] = activated(one.activation, sum) + (one.residual ? residual.get(i) : 0);
      bound[i] = 1.13 * magnitude * rounding + (1 + fabs(sum)) * 1e-6 + (fabs(want[i]) + 1e-6) * epsilon(one.dtype);
    }
  }
  return report(describe(one), error, compare(y, want, bound, one.n, "y"));
}

// Row 2^28 of 8 inputs and 8 outputs: offsets beyond 2^31 elements, in memory of which a few pages are touched.
bool check_far() {
  constexpr Dtype kType = Dtype::kBf16;
  constexpr int64_t kRows = (int64_t{1} << 28) + 40, kFirst = int64_t{1} << 28;
  constexpr size_t kBytes = static_cast<size_t>(kRows) * 8 * 2;
  Weight w(8, 8, 8, 1, 1.0, kType, true, false, false, false);
  Packed packed(w, 8);
  void *x = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0),
       *y = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (x == MAP_FAILED || y == MAP_FAILED) return report("linear beyond 2^31 elements", "no address space", "");
  uint16_t* from = static_cast<uint16_t*>(x) + kFirst * 8;
  for (int64_t i = 0; i < (kRows - kFirst) * 8; ++i) from[i] = static_cast<uint16_t>(to_bits(kType, uniform()));
  cuda::LinearArgs args{};
  args.weight = packed.strips;
  args.x = x;
  args.x_stride = 8;
  args.y = y;
  args.m = kRows;
  args.tile_m = 64;
  emulation::skip_blocks(static_cast<uint64_t>(kFirst / args.tile_m));
  const char* error = cuda::linear(args, kType, 1, nullptr);
  emulation::skip_blocks(0);
  std::string wrong;
  for (int64_t m = kFirst; m < kRows; ++m) {
    for (int n = 0; n < 8; ++n) {
      double sum = 0;
      for (int k = 0; k < 8; ++k) {
        sum += w.dense[static_cast<size_t>(n * 8 + k)] * from_bits(kType, from[(m - kFirst) * 8 + k]);
      }
      const double got = from_bits(kType, static_cast<uint16_t*>(y)[m * 8 + n]);
      if (!(fabs(got - sum) <= 0.01 * (1 + fabs(sum)))) wrong = "y beyond 2^31 elements is wrong";
    }
  }
  munmap(x, kBytes);
  munmap(y, kBytes);
  return report("linear beyond 2^31 elements", error, wrong);
}

// All inputs kept: nothing keeps the gathers and the transposing stores from every bank at once.
bool check_conflicts(int tile_m, Dtype dtype) {
  Weight w(16, 512, 8, 1, 1.0, dtype, true, false);
  Packed packed(w, 8);
  Tensor x(dtype, static_cast<size_t>(tile_m) * 512, "x", Access::kRead);
  Tensor y(dtype, static_cast<size_t>(tile_m) * 16, "y", Access::kWrite);
  for (size_t i = 0; i < x.count; ++i) x.set(i, 0);
  cuda::LinearArgs args{};
  args.weight = packed.strips;
  args.x = x.data();
  args.x_stride = 512;
  args.y = y.data();
  args.m = args.tile_m = tile_m;
  emulation::take_counters();
  const char* error = cuda::linear(args, dtype, 1, nullptr);
  const emulation::Counters counted = emulation::take_counters();
  std::string wrong;
  if (counted.shared_wavefronts > counted.shared_ideal) {
    wrong = "bank conflicts: " + std::to_string(counted.shared_wavefronts) + " wavefronts; want " +
            std::to_string(counted.shared_ideal);
  }
  return report(std::string("linear ") + name_of(dtype) + " without bank conflicts, tile " + std::to_string(tile_m),
                error, wrong);
}

}  // namespace

bool prove_pack(bool quick) {
  bool passed = true;
  struct Shape {
    int n, k, r, c;
  };
  const std::vector<Shape> shapes = {{64, 96, 8, 1},    {30, 517, 8, 1}, {129, 600, 16, 1}, {72, 70, 4, 4},
                                     {96, 1030, 32, 1}, {20, 33, 64, 3}, {8, 1, 8, 1},      {5, 40, 1, 1}};
  for (const Shape& shape : shapes) {
    for (int p : {8, 16, 32}) {
      if (quick && p > 16 && shape.n != 129) continue;
      for (Dtype dtype : {Dtype::kBf16, Dtype::kFloat}) {
        for (int variant = 0; variant < 3; ++variant) {
          if (quick && variant > 0 && shape.n != 30) continue;
          Weight w(shape.n, shape.k, shape.r, shape.c, variant == 2 ? 0.5 : 0.75, dtype, variant != 1, variant == 1,
                   variant == 2);
          Packed packed(w, p);
          std::string wrong;
          if (unpack(packed, w, wrong) != w.dense && wrong.empty()) wrong = "the strips hold another matrix";
          if (wrong.empty() && !dealt_evenly(packed)) wrong = "octets conflict where they need not";
          char name[120];
          snprintf(name, sizeof name, "pack %s N%d K%d %dx%d P%d%s", name_of(dtype), shape.n, shape.k, shape.r, shape.c,
                   p,
                   variant == 1   ? " wide pos"
                   : variant == 2 ? " from dense"
                                  : "");
          passed &= report(name, nullptr, wrong);
        }
      }
    }
  }
  {  // more lists than the running sum takes at a time
    Weight w(9000, 9, 8, 1, 0.4, Dtype::kBf16, true, false);
    Packed packed(w, 8);
    std::string wrong;
    if (unpack(packed, w, wrong) != w.dense && wrong.empty()) wrong = "the strips hold another matrix";
    passed &= report("pack 1125 lists", nullptr, wrong);
  }
  {  // more octets than there is room for: counted, nothing written past the end, all lists empty
    Weight w(64, 600, 8, 1, 1.0, Dtype::kBf16, true, false);
    Packed packed(w, 8, 100);
    std::string wrong = packed.needed == 8 * 75 ? "" : "the octets needed are miscounted";
    for (int i = 0; i <= 16; ++i) wrong = packed.strips.begin[i] == 0 ? wrong : "a list is not empty after an overflow";
    passed &= report("pack overflow", nullptr, wrong);
  }
  return passed;
}

bool prove_linear(bool quick) {
  constexpr Activation kNone = Activation::kNone;
  constexpr Dtype kBf16 = Dtype::kBf16, kHalf = Dtype::kHalf, kFloat = Dtype::kFloat;
  std::vector<Case> cases = {
      // m, n, k, r, c, p, tile, density, dtype, narrow, pos, activation, bias, residual, slack
      {16, 64, 64, 8, 1, 8, 16, .75, kBf16, true, false, kNone, false, false, 0},
      {1, 40, 96, 8, 1, 8, 16, .8, kBf16, true, false, Activation::kRelu, true, false, 0},
      {7, 130, 1100, 8, 1, 16, 16, .7, kHalf, true, true, Activation::kSilu, true, true, 4},
      {5, 64, 200, 64, 1, 32, 16, .75, kBf16, true, false, kNone, true, false, 0},
      {70, 272, 96, 8, 1, 8, 64, .75, kBf16, true, false, Activation::kGelu, true, true, 8},
      {65, 70, 33, 16, 1, 16, 64, .75, kHalf, false, true, Activation::kTanh, true, false, 0},
      {64, 96, 600, 32, 1, 32, 64, .7, kBf16, true, false, kNone, false, true, 1},
      {3, 129, 70, 64, 1, 32, 64, .75, kBf16, true, false, kNone, true, false, 0},
      {130, 136, 64, 8, 1, 8, 128, .75, kBf16, true, false, kNone, true, false, 0},
      {129, 100, 530, 16, 1, 16, 128, .75, kHalf, true, false, Activation::kRelu, true, true, 6},
      {17, 72, 40, 8, 1, 8, 64, .75, kFloat, true, false, Activation::kTanh, true, true, 0},
      {9, 64, 530, 16, 1, 16, 16, .75, kFloat, true, true, Activation::kGelu, true, false, 3},
      // few rows, more inputs than the tile holds at a time
      {3, 16, 4600, 8, 1, 8, 16, .7, kBf16, true, false, kNone, true, false, 0},
      {9, 32, 2600, 32, 1, 32, 16, .7, kFloat, true, false, kNone, true, true, 0},
      // 16-byte accesses are not aligned
      {5, 16, 64, 8, 1, 8, 16, .7, kBf16, true, false, kNone, true, true, 0, 1},
      {40, 64, 64, 8, 1, 8, 64, .7, kBf16, true, false, kNone, true, true, 0, 1},
      {20, 64, 96, 16, 1, 16, 64, .7, kFloat, true, false, kNone, true, true, 0, 1},
      // edges: no block, all blocks, no rows, one output, one input
      {20, 32, 48, 8, 1, 8, 64, 0.0, kBf16, true, false, kNone, true, false, 0},
      {20, 32, 48, 8, 1, 8, 64, 1.0, kBf16, true, false, kNone, true, false, 0},
      {0, 32, 48, 8, 1, 8, 16, .75, kBf16, true, false, kNone, true, false, 0},
      {3, 1, 9, 8, 1, 8, 16, .75, kHalf, true, false, kNone, true, false, 0},
      {3, 9, 1, 8, 1, 8, 16, 1.0, kBf16, true, false, kNone, false, false, 0},
      // 8x1 as strips of 16 (union of two block rows), and blocks that are no vectors
      {33, 64, 100, 8, 1, 16, 64, .7, kBf16, true, false, kNone, true, false, 0},
      {33, 40, 64, 4, 4, 8, 64, .7, kBf16, true, false, kNone, true, false, 0},
  };
  if (!quick) {
    for (Dtype dtype : {kBf16, kHalf, kFloat}) {
      for (int p : {8, 16, 32}) {
        for (int tile : {16, 64, 128}) {
          if (dtype == kFloat && tile == 128) continue;
          for (int64_t m : {1, 8, 17, 140}) {
            for (int k : {64, 1000}) {
              cases.push_back(
                  {m, 300, k, p, 1, p, tile, .7, dtype, true, false, kNone, true, m == 17, k == 64 ? 0 : 8});
            }
          }
        }
      }
    }
    for (Activation activation : {kNone, Activation::kRelu, Activation::kGelu, Activation::kSilu, Activation::kTanh}) {
      cases.push_back({20, 60, 70, 8, 1, 8, 64, .8, kFloat, true, false, activation, true, true, 2});
      cases.push_back({20, 60, 70, 8, 1, 8, 64, .8, kBf16, true, false, activation, true, true, 2});
    }
  }
  bool passed = true;
  for (const Case& one : cases) passed &= check(one);
  passed &= check_far();
  for (const int tile : {64, 128}) passed &= check_conflicts(tile, kBf16);
  return check_conflicts(64, kFloat) && passed;
}

}  // namespace sp::prove
