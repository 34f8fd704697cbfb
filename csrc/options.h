// The options of the loss as the operators receive them: the fields of the dataclasses in rlaif_fast/loss/options.py
// and rlaif_fast/loss/inputs.py, in their order, names as text.
#pragma once

#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>

#include "rank_group.h"
#include "token_terms.h"

#define RLAIF_RANK_INPUTS "Tensor scores, Tensor oracle_ranks, Tensor? judged, Tensor? weights"
#define RLAIF_RANK_OPTIONS "str kind, float penalty_weight, str scale"
#define RLAIF_TOKEN_INPUTS                                                                                       \
  "Tensor? advantages, Tensor? oracle_ranks, Tensor? scores, Tensor? judged, Tensor? weights, Tensor? valid, "   \
  "Tensor? old_logps, Tensor? ref_logps, Tensor? mask, Tensor? sampling_ratio, Tensor? num_items, "              \
  "Tensor? num_tokens"
#define RLAIF_LOSS_OPTIONS                                                                                       \
  RLAIF_RANK_OPTIONS                                                                                             \
  ", str score, float epsilon_low, float epsilon_high, float? delta, float? dual_clip, float beta, str kl, "     \
  "float? kl_clamp, bool unbiased_kl, float entropy_coef, str entropy_aggregate, str loss_type, str empty_rows, " \
  "int? max_completion_length, str importance_sampling_level, str cispo_bound, float sapo_temperature_pos, "     \
  "float sapo_temperature_neg"
#define RLAIF_SCALING "float temperature, Tensor? temperatures, float? softcap, float logit_scale"

// The same fields as parameters of a function, and the call that reads them.
#define RLAIF_LOSS_PARAMETERS                                                                                     \
  c10::string_view kind, double penalty_weight, c10::string_view scale, c10::string_view score,                   \
      double epsilon_low, double epsilon_high, std::optional<double> delta, std::optional<double> dual_clip,      \
      double beta, c10::string_view kl, std::optional<double> kl_clamp, bool unbiased_kl, double entropy_coef,    \
      c10::string_view entropy_aggregate, c10::string_view loss_type, c10::string_view empty_rows,                \
      std::optional<int64_t> max_completion_length, c10::string_view importance_sampling_level,                   \
      c10::string_view cispo_bound, double sapo_temperature_pos, double sapo_temperature_neg
#define RLAIF_LOSS_ARGUMENTS                                                                                      \
  kind, penalty_weight, scale, score, epsilon_low, epsilon_high, delta, dual_clip, beta, kl, kl_clamp,            \
      unbiased_kl, entropy_coef, entropy_aggregate, loss_type, empty_rows, max_completion_length,                 \
      importance_sampling_level, cispo_bound, sapo_temperature_pos, sapo_temperature_neg

namespace rlaif {

constexpr int64_t kStats = 17;  // the length of `STATS` in rlaif_fast/loss/options.py

inline int64_t index_of(const char* name, c10::string_view value, std::initializer_list<const char*> choices) {
  int64_t index = 0;
  for (const char* choice : choices) {
    if (value == choice) {
      return index;
    }
    ++index;
  }
  TORCH_CHECK_VALUE(false, name, " is unknown to this operator; got '", value, "'");
}

struct RankOptions {
  Kind kind;
  double penalty_weight;
  bool scale_group;
};

inline RankOptions rank_options(c10::string_view kind, double penalty_weight, c10::string_view scale) {
  return {static_cast<Kind>(index_of("kind", kind, {"directed", "oracle", "paper", "paper_swapped", "zscore"})),
          penalty_weight, index_of("scale", scale, {"none", "group"}) == 1};
}

// What the sum over the tokens of a response is divided by, besides the number of items.
enum class Aggregate { Responses, Tokens, Constant, Sums };

struct LossOptions {
  RankOptions rank;
  TokenOptions<double> token;
  bool mean_score;
  bool entropy_over_tokens;
  Aggregate aggregate;
  bool skip_empty;
  double max_completion_length;
  bool sequence_level;
};

inline LossOptions loss_options(RLAIF_LOSS_PARAMETERS) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  LossOptions options{};
  options.rank = rank_options(kind, penalty_weight, scale);
  options.mean_score = index_of("score", score, {"mean", "sum"}) == 0;
  options.entropy_over_tokens = index_of("entropy_aggregate", entropy_aggregate, {"loss", "tokens"}) == 1;
  options.skip_empty = index_of("empty_rows", empty_rows, {"count", "skip"}) == 1;
  options.max_completion_length = static_cast<double>(max_completion_length.value_or(1));
  options.sequence_level =
      index_of("importance_sampling_level", importance_sampling_level, {"token", "sequence"}) == 1;

  TokenOptions<double>& token = options.token;
  token = {1 - epsilon_low,
           1 + epsilon_high,
           delta.value_or(infinity),
           dual_clip.value_or(infinity),
           beta,
           kl_clamp.value_or(infinity),
           entropy_coef,
           sapo_temperature_pos,
           sapo_temperature_neg,
           static_cast<Kl>(index_of("kl", kl, {"k1", "k2", "k3"}) + 1),
           unbiased_kl,
           Surrogate::Clip};
  switch (index_of("loss_type", loss_type, {"grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo", "sapo"})) {
    case 0:
      options.aggregate = Aggregate::Responses;
      break;
    case 1:
    case 2:
      options.aggregate = Aggregate::Tokens;
      break;
    case 3:
      options.aggregate = Aggregate::Constant;
      break;
    case 4:
      options.aggregate = Aggregate::Sums;
      break;
    case 5:
      options.aggregate = Aggregate::Tokens;
      token.surrogate = Surrogate::Cispo;
      token.clip_low = 0;
      token.clip_high = epsilon_high + (index_of("cispo_bound", cispo_bound, {"relative", "absolute"}) == 0 ? 1 : 0);
      break;
    default:
      options.aggregate = Aggregate::Responses;
      token.surrogate = Surrogate::Sapo;
      token.clip_low = 0;
      token.clip_high = infinity;
  }
  return options;
}

}  // namespace rlaif
