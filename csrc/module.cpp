// The operators' schemas and shape functions, and a small module that says how the extension was built.
// rank_penalty and row_loss_ have CPU and CUDA implementations, the others CPU ones (Triton serves CUDA devices).

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include "checks.h"
#include "options.h"

namespace rlaif {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rank_penalty_meta(
    const Tensor& scores, const Tensor& oracle_ranks, const OptionalTensor&, const OptionalTensor&, c10::string_view,
    double, c10::string_view) {
  const auto matrix = scores.sym_sizes();
  const auto column = c10::SymIntArrayRef(matrix.data(), 1);
  const auto options = scores.options();
  return {at::empty_symint(matrix, options), at::empty_symint(matrix, options),
          at::empty_symint(column, options), at::empty_symint(column, options),
          at::empty_symint(column, options.dtype(at::kBool)), at::empty_symint(column, options)};
}

std::tuple<Tensor, Tensor, Tensor> row_stats_meta(const Tensor& logits, const Tensor& token_ids, double,
                                                  const OptionalTensor&, std::optional<double>, double) {
  const auto options = logits.options().dtype(wide_type(logits));
  const auto rows = token_ids.sym_sizes();
  return {at::empty_symint(rows, options), at::empty_symint(rows, options), at::empty_symint(rows, options)};
}

void row_grad_out_meta(const Tensor&, const Tensor&, double, const OptionalTensor&, std::optional<double>, double,
                       const Tensor&, const Tensor&, const Tensor&,
                       const OptionalTensor&, Tensor&) {}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_loss_meta(
    Tensor& logits, const Tensor& token_ids, double, const OptionalTensor&, std::optional<double>, double,
    const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, RLAIF_LOSS_PARAMETERS) {
  const auto options = logits.options().dtype(wide_type(logits));
  const auto rows = token_ids.sym_sizes();
  const auto make = [&] { return at::empty_symint(rows, options); };
  return {make(), make(), make(), make(), make()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_loss_meta(
    const Tensor& logps, const OptionalTensor& entropy, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    RLAIF_LOSS_PARAMETERS) {
  const auto grid = logps.sym_sizes();
  const auto options = logps.options();
  return {at::empty({}, options), at::empty_symint(c10::SymIntArrayRef(grid.data(), 1), options),
          at::empty({kStats}, options), at::empty_symint(grid, options),
          entropy.has_value() ? at::empty_symint(grid, options) : at::empty({0}, options)};
}

}  // namespace

TORCH_LIBRARY(rlaif_fast, m) {
  m.def("rank_penalty(" RLAIF_RANK_INPUTS ", " RLAIF_RANK_OPTIONS
        ") -> (Tensor advantages, Tensor penalties, Tensor ndcg, Tensor kendall_tau, Tensor has_signal, "
        "Tensor top1_agreement)");
  m.def("token_loss(Tensor logps, Tensor? entropy, " RLAIF_TOKEN_INPUTS ", " RLAIF_LOSS_OPTIONS
        ") -> (Tensor loss, Tensor advantages, Tensor stats, Tensor grad_logps, Tensor grad_entropy)");
  m.def("row_stats(Tensor logits, Tensor token_ids, " RLAIF_SCALING ") -> (Tensor logps, Tensor lse, Tensor entropy)");
  m.def("row_grad_out(Tensor logits, Tensor token_ids, " RLAIF_SCALING
        ", Tensor lse, Tensor entropy, Tensor grad_logps, Tensor? grad_entropy, Tensor(a!) out) -> ()");
  m.def("row_loss_(Tensor(a!) logits, Tensor token_ids, " RLAIF_SCALING
        ", Tensor advantages, Tensor weights, Tensor? old_logps, Tensor? ref_logps, "
        "Tensor? sampling_ratio, Tensor? entropy_weights, " RLAIF_LOSS_OPTIONS
        ") -> (Tensor logps, Tensor lse, Tensor entropy, Tensor grad_logps, Tensor grad_entropy)");
  m.def("compact_rows_(Tensor(a!) rows, Tensor keep) -> int");
  m.def("row_instruction_set() -> str");
  m.def("decode_layer_(Tensor(a!) hidden, Tensor cos, Tensor sin, Tensor(b!) keys, Tensor(c!) values, Tensor bias, "
        "Tensor slots, Tensor columns, Tensor[] projections, Tensor?[] biases, Tensor?[] norms, float eps, "
        "float scale) -> ()");
}

TORCH_LIBRARY_IMPL(rlaif_fast, Meta, m) {
  m.impl("rank_penalty", &rank_penalty_meta);
  m.impl("token_loss", &token_loss_meta);
  m.impl("row_stats", &row_stats_meta);
  m.impl("row_grad_out", &row_grad_out_meta);
  m.impl("row_loss_", &row_loss_meta);
}

}  // namespace rlaif

#define RLAIF_TEXT(x) RLAIF_TEXT_OF(x)
#define RLAIF_TEXT_OF(x) #x

PYBIND11_MODULE(_C, m) {
  m.doc() = "How the extension of rlaif_fast was built; importing it registers the operators.";
  m.def("build_info", [] {
    pybind11::dict info;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
    info["compiler"] = "gcc " __VERSION__;
#else
    info["compiler"] = "unknown";
#endif
    info["cpp_standard"] = static_cast<long>(__cplusplus);
    info["torch"] = TORCH_VERSION;
#if defined(RLAIF_WITH_CUDA)
    info["cuda"] = RLAIF_TEXT(RLAIF_CUDA_VERSION);
    info["cuda_architectures"] = RLAIF_TEXT(RLAIF_CUDA_ARCHITECTURES);
#else
    info["cuda"] = pybind11::none();
    info["cuda_architectures"] = pybind11::none();
#endif
#if defined(RLAIF_X86_KERNELS)
    info["instruction_sets"] = "default avx2 avx512";
#else
    info["instruction_sets"] = "default";
#endif
    return info;
  });
}
