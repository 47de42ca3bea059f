// What the emulator counts for one block of strips_linear: input of the roofline model (tests/cuda/model.py).
#include "tests/cuda/prove.h"

namespace sp::prove {
namespace {

struct Case {
  int r, p, k, tile_m;
  double density;
};

// One block over `passes` x 256 outputs; few rows: a block of its own per strips of one pass.
emulation::Counters count(const Case& one, int passes, cuda::Geometry& geometry, double& kept, int& octets) {
  constexpr Dtype kType = Dtype::kBf16;
  const int n = 256 * passes;
  Weight w(n, one.k, one.r, 1, one.density, kType, true, false, false, false);
  Packed packed(w, one.p);
  Tensor x(kType, static_cast<size_t>(one.tile_m) * one.k, "x", Access::kRead);
  Tensor y(kType, static_cast<size_t>(one.tile_m) * n, "y", Access::kWrite);
  for (size_t i = 0; i < x.count; ++i) x.set(i, 0.5);
  cuda::LinearArgs args{};
  args.weight = packed.strips;
  args.x = x.data();
  args.x_stride = one.k;
  args.y = y.data();
  args.m = one.tile_m;
  args.tile_m = one.tile_m;
  geometry = cuda::linear_geometry(args, kType, 1);
  emulation::take_counters();
  emulation::limit_blocks(one.tile_m == 16 ? 0 : 1);
  cuda::linear(args, kType, 0, nullptr);  // a device so small that one block takes all passes
  emulation::limit_blocks(0);
  kept = 0;
  for (uint8_t bit : w.mask) kept += bit;
  kept /= static_cast<double>(w.mask.size());
  octets = packed.strips.begin[packed.strips.strips * packed.strips.chunks];
  const emulation::Counters counted = emulation::take_counters();
  emulation::watch_nothing();
  return counted;
}

}  // namespace

void print_counts() {
  const char* separator = "[";
  for (const int tile : {16, 64, 128}) {
    for (const int k : {512, 2048}) {
      for (const auto& [r, p] : {std::pair{8, 8}, {8, 16}, {16, 16}, {32, 32}, {64, 32}}) {
        for (const double density : {0.5, 0.3, 0.2, 0.1}) {
          printf("%s\n{\"tile_m\": %d, \"k\": %d, \"r\": %d, \"p\": %d, \"density\": %.2f", separator, tile, k, r, p,
                 density);
          separator = ",";
          for (const int passes : {1, 2}) {
            cuda::Geometry geometry{};
            double kept;
            int octets;
            const emulation::Counters c = count({r, p, k, tile, density}, passes, geometry, kept, octets);
            printf(
                ", \"passes%d\": {\"kept\": %.4f, \"octets\": %d, \"blocks\": %lu, \"blocks_y\": %u, "
                "\"threads\": %d, \"shared_bytes\": %zu, \"load_sectors\": %lu, \"store_sectors\": %lu, "
                "\"wavefronts\": %lu, \"ideal_wavefronts\": %lu, \"mma_16816\": %lu, \"mma_1688\": %lu}",
                passes, kept, octets, c.blocks, geometry.blocks_y, geometry.threads, geometry.shared_bytes,
                c.global_load_sectors, c.global_store_sectors, c.shared_wavefronts, c.shared_ideal, c.mma_16816,
                c.mma_1688);
          }
          printf("}");
          fflush(stdout);
        }
      }
    }
  }
  printf("\n]\n");
}

}  // namespace sp::prove
