// Elements of a tensor as plain bits, by their size.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sp {

// Calls call(zero) with a zero of the unsigned type of `bytes` bytes: 2, 4 or 8.
template <typename Call>
void with_bits(size_t bytes, const Call& call) {
  switch (bytes) {
    case 2:
      return call(uint16_t{0});
    case 4:
      return call(uint32_t{0});
    case 8:
      return call(uint64_t{0});
  }
}

}  // namespace sp
