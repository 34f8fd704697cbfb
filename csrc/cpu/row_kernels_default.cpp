// The row kernels for the instruction set "default".

#include "row_kernels_impl.h"

namespace rlaif {

const RowKernels& row_kernels_default() {
  static constexpr RowKernels kernels{"default", &stats, &grad, &loss, &thin_matmul};
  return kernels;
}

}  // namespace rlaif
