// One group on the CPU: what the rank penalty and the token loss both need.
#pragma once

#include "../options.h"
#include "../rank_group.h"

namespace rlaif {

template <typename T>
struct GroupResult {
  T ndcg;
  T kendall_tau;
  T top1_agreement;
  bool has_signal;
  int ranked;  // responses that were judged, or 0 where they are too few to say anything
};

// Fills advantages and penalties (G,) from scores (higher is more likely) and ranks (lower is better; rewards,
// higher is better, for Kind::ZScore). Responses that were not judged get 0 and the others are a smaller group;
// `judged` may be null. The advantages are multiplied by `weight`.
template <typename T>
GroupResult<T> rank_group(const T* scores, const T* ranks, const bool* judged, T weight, int G,
                          const RankOptions& options, T* advantages, T* penalties);

}  // namespace rlaif
