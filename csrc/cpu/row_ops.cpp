// The row kernels as operators: checks, the choice of an instruction set, and parallel loops over rows.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <limits>

#include "../checks.h"
#include "../options.h"
#include "row_kernels.h"

namespace rlaif {

const RowKernels& row_kernels() {
  static const RowKernels& chosen = []() -> const RowKernels& {
#if defined(RLAIF_X86_KERNELS)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") {
      return row_kernels_avx512();
    }
    if (capability == "AVX2") {
      return row_kernels_avx2();
    }
#endif
    return row_kernels_default();
  }();
  return chosen;
}

namespace {

constexpr int64_t kGrainElements = 32768;  // logits a thread takes at least

Dtype dtype_of(const at::Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kFloat:
      return Dtype::Float;
    case at::kDouble:
      return Dtype::Double;
    case at::kBFloat16:
      return Dtype::BFloat16;
    case at::kHalf:
      return Dtype::Half;
    default:
      TORCH_CHECK_TYPE(false, "logits must be float32, float64, bfloat16 or float16; got ", logits.scalar_type());
  }
}

void check_rows(const at::Tensor& logits, const at::Tensor& token_ids, double temperature) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) >= 1, "logits must be (M, V) with V of at least 1; got ",
                    logits.sizes());
  TORCH_CHECK_VALUE(logits.size(0) == 0 || logits.size(1) == 1 || logits.stride(1) == 1,
                    "the rows of logits must be contiguous; got strides ", logits.strides());
  TORCH_CHECK_TYPE(token_ids.scalar_type() == at::kLong, "token_ids must be int64; got ", token_ids.scalar_type());
  TORCH_CHECK_VALUE(token_ids.dim() == 1 && token_ids.size(0) == logits.size(0) && token_ids.is_contiguous(),
                    "token_ids must be a contiguous (", logits.size(0), ",); got ", token_ids.sizes());
  TORCH_CHECK_VALUE(temperature > 0, "temperature must be above 0; got ", temperature);
}

const void* row_data(const char* name, const std::optional<at::Tensor>& x, const at::Tensor& logits) {
  if (!x.has_value()) {
    return nullptr;
  }
  TORCH_CHECK_TYPE(x->scalar_type() == wide_type(logits), name, " must be ", wide_type(logits), "; got ",
                   x->scalar_type());
  TORCH_CHECK_VALUE(x->dim() == 1 && x->size(0) == logits.size(0) && x->is_contiguous(), name,
                    " must be a contiguous (", logits.size(0), ",); got ", x->sizes());
  return x->const_data_ptr();
}

struct Scale {
  double temperature;
  const std::optional<at::Tensor>& temperatures;  // (M,)
  std::optional<double> softcap;
  double scale;
};

RowArgs row_args(const at::Tensor& logits, const at::Tensor& token_ids, const Scale& scale, const at::Tensor& logps,
                 const at::Tensor& lse, const at::Tensor& entropy) {
  return {logits.const_data_ptr(),
          logits.stride(0),
          logits.size(1),
          token_ids.const_data_ptr<int64_t>(),
          scale.temperature,
          row_data("temperatures", scale.temperatures, logits),
          scale.softcap.value_or(std::numeric_limits<double>::infinity()),
          scale.scale,
          logps.defined() ? logps.data_ptr() : nullptr,
          lse.data_ptr(),
          entropy.data_ptr()};
}

template <typename Body>
void for_rows(const at::Tensor& logits, Body body) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / logits.size(1));
  at::parallel_for(0, logits.size(0), grain, body);
}

using Stats = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Stats row_stats(const at::Tensor& logits, const at::Tensor& token_ids, double temperature,
                const std::optional<at::Tensor>& temperatures, std::optional<double> softcap, double logit_scale) {
  check_rows(logits, token_ids, temperature);
  const auto options = logits.options().dtype(wide_type(logits));
  auto logps = at::empty({logits.size(0)}, options);
  auto lse = at::empty({logits.size(0)}, options);
  auto entropy = at::empty({logits.size(0)}, options);
  const Scale scaling{temperature, temperatures, softcap, logit_scale};
  const RowArgs args = row_args(logits, token_ids, scaling, logps, lse, entropy);
  const Dtype dtype = dtype_of(logits);
  for_rows(logits, [&](int64_t begin, int64_t end) { row_kernels().stats(dtype, args, begin, end); });
  return {logps, lse, entropy};
}

void row_grad_out(const at::Tensor& logits, const at::Tensor& token_ids, double temperature,
                  const std::optional<at::Tensor>& temperatures, std::optional<double> softcap, double logit_scale,
                  const at::Tensor& lse, const at::Tensor& entropy, const at::Tensor& grad_logps,
                  const std::optional<at::Tensor>& grad_entropy, at::Tensor& out) {
  check_rows(logits, token_ids, temperature);
  check_rows(out, token_ids, temperature);
  TORCH_CHECK_VALUE(out.sizes() == logits.sizes(), "out must have the shape of logits, ", logits.sizes(), "; got ",
                    out.sizes());
  TORCH_CHECK_TYPE(out.scalar_type() == logits.scalar_type(), "out must have the dtype of logits, ",
                   logits.scalar_type(), "; got ", out.scalar_type());
  row_data("lse", lse, logits);
  row_data("entropy", entropy, logits);
  const Scale scaling{temperature, temperatures, softcap, logit_scale};
  const RowGradArgs args{row_args(logits, token_ids, scaling, at::Tensor(), lse, entropy),
                         row_data("grad_logps", grad_logps, logits), row_data("grad_entropy", grad_entropy, logits),
                         out.data_ptr(), out.stride(0)};
  const Dtype dtype = dtype_of(logits);
  for_rows(logits, [&](int64_t begin, int64_t end) { row_kernels().grad(dtype, args, begin, end); });
}

using LossRows = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

LossRows row_loss_(at::Tensor& logits, const at::Tensor& token_ids, double temperature,
                   const std::optional<at::Tensor>& temperatures, std::optional<double> softcap, double logit_scale,
                   const at::Tensor& advantages, const at::Tensor& weights, const std::optional<at::Tensor>& old_logps,
                   const std::optional<at::Tensor>& ref_logps, const std::optional<at::Tensor>& sampling_ratio,
                   const std::optional<at::Tensor>& entropy_weights, RLAIF_LOSS_PARAMETERS) {
  check_rows(logits, token_ids, temperature);
  const auto options = logits.options().dtype(wide_type(logits));
  auto logps = at::empty({logits.size(0)}, options);
  auto lse = at::empty({logits.size(0)}, options);
  auto entropy = at::empty({logits.size(0)}, options);
  auto grad_logps = at::empty({logits.size(0)}, options);
  auto grad_entropy = at::empty({logits.size(0)}, options);
  const Scale scaling{temperature, temperatures, softcap, logit_scale};
  const RowLossArgs args{row_args(logits, token_ids, scaling, logps, lse, entropy),
                         row_data("advantages", advantages, logits),
                         row_data("weights", weights, logits),
                         row_data("old_logps", old_logps, logits),
                         row_data("ref_logps", ref_logps, logits),
                         row_data("sampling_ratio", sampling_ratio, logits),
                         row_data("entropy_weights", entropy_weights, logits),
                         loss_options(RLAIF_LOSS_ARGUMENTS).token,
                         grad_logps.data_ptr(),
                         grad_entropy.data_ptr()};
  const Dtype dtype = dtype_of(logits);
  for_rows(logits, [&](int64_t begin, int64_t end) { row_kernels().loss(dtype, args, begin, end); });
  return {logps, lse, entropy, grad_logps, grad_entropy};
}

// Moves the kept rows to the front, in order, and returns how many there are: the matmuls that follow then skip the
// rows without gradient, and no second buffer is needed.
int64_t compact_rows_(at::Tensor& rows, const at::Tensor& keep) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.is_contiguous(), "rows must be a contiguous matrix; got ", rows.sizes());
  TORCH_CHECK_TYPE(keep.scalar_type() == at::kBool, "keep must be bool; got ", keep.scalar_type());
  TORCH_CHECK_VALUE(keep.dim() == 1 && keep.size(0) == rows.size(0) && keep.is_contiguous(), "keep must be (",
                    rows.size(0), ",); got ", keep.sizes());
  const int64_t bytes = rows.size(1) * static_cast<int64_t>(rows.element_size());
  char* data = static_cast<char*>(rows.data_ptr());
  const bool* kept = keep.const_data_ptr<bool>();
  int64_t count = 0;
  for (int64_t m = 0; m < rows.size(0); ++m) {
    if (kept[m]) {
      if (count != m) {
        std::memcpy(data + count * bytes, data + m * bytes, bytes);
      }
      ++count;
    }
  }
  return count;
}

std::string row_instruction_set() { return row_kernels().name; }

}  // namespace

TORCH_LIBRARY_IMPL(rlaif_fast, CPU, m) {
  m.impl("row_stats", &row_stats);
  m.impl("row_grad_out", &row_grad_out);
  m.impl("row_loss_", &row_loss_);
  m.impl("compact_rows_", &compact_rows_);
}

TORCH_LIBRARY_IMPL(rlaif_fast, CompositeExplicitAutograd, m) {
  m.impl("row_instruction_set", &row_instruction_set);
}

}  // namespace rlaif
