// What `sp.env()` asks of the compiled library.
#include <string>

#include "core/pool.h"
#include "torch/check.h"

namespace sp {
namespace {

std::string compiler_op() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "g++ " __VERSION__;
#endif
}

int64_t pool_helpers_op() { return pool_helpers(); }

}  // namespace
}  // namespace sp

STABLE_TORCH_LIBRARY_IMPL(sparse_pathways, CompositeExplicitAutograd, m) {
  m.impl("compiler", TORCH_BOX(&sp::compiler_op));
  m.impl("pool_helpers", TORCH_BOX(&sp::pool_helpers_op));
}
