// Checks that every implementation of an operator makes before it reads memory. The public functions have checked
// their arguments in the user's own terms before; these guard direct calls of the operators.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "rank_group.h"

namespace rlaif {

// The dtype of what is computed of logits.
inline at::ScalarType wide_type(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_optional(const char* name, const std::optional<at::Tensor>& x, at::IntArrayRef shape,
                           at::ScalarType dtype, const at::Tensor& like) {
  if (x.has_value()) {
    TORCH_CHECK_VALUE(x->sizes() == shape, name, " must be ", shape, "; got ", x->sizes());
    TORCH_CHECK_TYPE(x->scalar_type() == dtype, name, " must be ", dtype, "; got ", x->scalar_type());
    TORCH_CHECK_VALUE(x->device() == like.device(), name, " must be on ", like.device(), "; got ", x->device());
  }
}

inline void check_rank_penalty(const at::Tensor& scores, const at::Tensor& oracle_ranks,
                               const std::optional<at::Tensor>& judged, const std::optional<at::Tensor>& weights) {
  TORCH_CHECK_VALUE(scores.dim() == 2, "scores must be (N, G); got ", scores.sizes());
  TORCH_CHECK_VALUE(scores.size(1) >= 1 && scores.size(1) <= kMaxGroup, "scores must have between 1 and ", kMaxGroup,
                    " responses a group; got ", scores.size(1));
  TORCH_CHECK_VALUE(oracle_ranks.sizes() == scores.sizes(), "oracle_ranks must have the shape of scores, ",
                    scores.sizes(), "; got ", oracle_ranks.sizes());
  TORCH_CHECK_TYPE(scores.scalar_type() == at::kFloat || scores.scalar_type() == at::kDouble,
                   "scores must be float32 or float64; got ", scores.scalar_type());
  TORCH_CHECK_TYPE(oracle_ranks.scalar_type() == scores.scalar_type(), "oracle_ranks must have the dtype of scores, ",
                   scores.scalar_type(), "; got ", oracle_ranks.scalar_type());
  TORCH_CHECK_VALUE(oracle_ranks.device() == scores.device(), "oracle_ranks must be on ", scores.device(), "; got ",
                    oracle_ranks.device());
  check_optional("judged", judged, scores.sizes(), at::kBool, scores);
  check_optional("weights", weights, scores.sizes().slice(0, 1), scores.scalar_type(), scores);
}

}  // namespace rlaif
