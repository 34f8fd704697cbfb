// The row kernels for the instruction set "default".

#include "row_kernels_impl.h"

namespace rlaif {

const RowKernels& row_kernels_default() {
  static constexpr RowKernels kernels{"default", FloatVec::size(), &stats, &grad, &loss, &thin_matmul, &decode_attention};
  return kernels;
}

}  // namespace rlaif
