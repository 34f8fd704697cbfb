// The row kernels for the instruction set "avx2".

#include "row_kernels_impl.h"

namespace rlaif {

const RowKernels& row_kernels_avx2() {
  static constexpr RowKernels kernels{"avx2", FloatVec::size(), &stats, &grad, &loss, &thin_matmul, &decode_attention};
  return kernels;
}

}  // namespace rlaif
