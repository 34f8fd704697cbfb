// One group on the CPU: what the rank penalty and the token loss both need.
#pragma once

#include "../rank_group.h"

namespace rlaif {

template <typename T>
struct GroupResult {
  T ndcg;
  T kendall_tau;
  T top1_agreement;
  bool has_signal;
};

// Fills advantages and penalties (G,) from scores (higher is more likely) and ranks (lower is better; rewards,
// higher is better, for Kind::ZScore).
template <typename T>
GroupResult<T> rank_group(const T* scores, const T* ranks, int G, Kind kind, T penalty_weight, bool scale_group,
                          T* advantages, T* penalties);

}  // namespace rlaif
