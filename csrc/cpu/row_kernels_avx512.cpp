// The row kernels for the instruction set "avx512".

#include "row_kernels_impl.h"

namespace rlaif {

const RowKernels& row_kernels_avx512() {
  static constexpr RowKernels kernels{"avx512", FloatVec::size(), &stats, &grad, &loss, &thin_matmul, &decode_attention};
  return kernels;
}

}  // namespace rlaif
