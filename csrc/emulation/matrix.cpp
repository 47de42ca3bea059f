// ldmatrix and mma.sync: register layouts as in the PTX ISA, "Warp level matrix instructions".
//
// Sums are accumulated in double and rounded once: in which order and precision a tensor core adds is not documented.
#include <string.h>

#include "emulation/state.h"

namespace sp::emulation {

// Lane i of each eight
// supplies the address of a row of 16 bytes; matrix j comes from lanes 8j .. 8j + 7. Transposed: lane l gets the
// elements of rows 2 (l % 4) and 2 (l % 4) + 1 in column l / 4.
void ldmatrix_trans(const void* site, uint32_t address, uint32_t* out, int matrices) {
  struct Operand {
    uint32_t address;
    uint32_t* out;
  } mine{address, out};
  warp_meets(site, &mine, [site, matrices](void* const* lanes) {
    unsigned char* rows[kWarp];
    std::vector<uintptr_t> offsets;
    for (int i = 0; i < 8 * matrices; ++i) {
      const uint32_t at = static_cast<Operand*>(lanes[i])->address;
      if (at % 16 != 0 || at + 16 > shared_bytes_now) {
        fault(site, "ldmatrix: row address outside shared memory or not a multiple of 16");
        return;
      }
      rows[i] = shared_memory_now + at;
      offsets.push_back(at);
#if defined(SP_EMULATION_TRACE)
      for (unsigned shift : {0u, 1u}) {  // a row goes to many lanes: no lane may have written it unsynchronised
        check_race(regions[0], reinterpret_cast<uintptr_t>(rows[i]), 16, site, false, shift);
      }
#endif
    }
    counted.shared_wavefronts += wavefronts(offsets, 16);
    counted.shared_ideal += static_cast<uint64_t>(matrices);
    for (int l = 0; l < static_cast<int>(kWarp); ++l) {
      for (int j = 0; j < matrices; ++j) {
        uint16_t low, high;
        memcpy(&low, rows[8 * j + 2 * (l % 4)] + 2 * (l / 4), 2);
        memcpy(&high, rows[8 * j + 2 * (l % 4) + 1] + 2 * (l / 4), 2);
        static_cast<Operand*>(lanes[l])->out[j] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

void mma(const void* site, Matrix kind, float (*widen)(uint16_t), float* d, const uint32_t* a, const uint32_t* b) {
  struct Operand {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  warp_meets(site, &mine, [kind, widen](void* const* lanes) {
    const auto at = [&](int lane) -> const Operand& { return *static_cast<const Operand*>(lanes[lane]); };
    const int depth = kind == Matrix::k16816 ? 16 : 8;
    ++(kind == Matrix::k16816 ? counted.mma_16816 : kind == Matrix::k1688 ? counted.mma_1688 : counted.mma_tf32);
    const auto tf32 = [](uint32_t bits) {
      bits &= 0xffffe000u;
      float f;
      memcpy(&f, &bits, 4);
      return f;
    };
    const auto half = [&](uint32_t word, int which) { return widen(static_cast<uint16_t>(word >> 16 * which)); };
    double left[16][16], right[16][8];
    for (int k = 0; k < depth; ++k) {
      for (int row = 0; row < 16; ++row) {
        left[k][row] = kind == Matrix::kTf32 ? tf32(at(row % 8 * 4 + k % 4).a[row / 8 + k / 4 * 2])
                                             : half(at(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], k % 2);
      }
      for (int column = 0; column < 8; ++column) {
        right[k][column] = kind == Matrix::kTf32 ? tf32(at(column * 4 + k % 4).b[k / 4])
                                                 : half(at(column * 4 + k % 8 / 2).b[k / 8], k % 2);
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        float& sum = at(row % 8 * 4 + column / 2).d[row / 8 * 2 + column % 2];
        double exact = sum;
        for (int k = 0; k < depth; ++k) exact += left[k][row] * right[k][column];
        sum = static_cast<float>(exact);
      }
    }
  });
}

}  // namespace sp::emulation
