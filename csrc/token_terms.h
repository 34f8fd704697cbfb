// One token of the loss and its derivative, shared by the token loss and the row kernels.
//
//   policy = min(min(rho, delta) * A, clip(rho, 1 - eps_low, 1 + eps_high) * A),   rho = exp(log_ratio)
//   kl     = k1: -x,  k2: x * x / 2,  k3: exp(x) - x - 1,   x = ref_logp - logp
#pragma once

#include <cmath>
#include <cstdint>

namespace rlaif {

// The same as `LOG_RATIO_LIMIT` in rlaif_fast/loss/options.py.
constexpr double kLogRatioLimit = 20.0;

enum class Kl : int64_t { K1 = 1, K2 = 2, K3 = 3 };

template <typename T>
struct TokenOptions {
  T clip_low;   // 1 - epsilon_low
  T clip_high;  // 1 + epsilon_high
  T delta;      // infinity where there is none
  T beta;
  T entropy_coef;
  Kl kl;
};

template <typename T>
struct PolicyTerm {
  T value;
  T slope;  // d value / d log_ratio
  T ratio;
};

template <typename T>
struct KlTerm {
  T value;
  T slope;  // d value / d logp
};

// std::clamp and std::min would drop a NaN; these keep it.
template <typename T>
inline T at_most(T x, T limit) {
  return x > limit ? limit : x;
}

template <typename T>
inline T at_least(T x, T limit) {
  return x < limit ? limit : x;
}

template <typename T>
inline PolicyTerm<T> policy_term(T log_ratio, T advantage, const TokenOptions<T>& options) {
  const T limit = T(kLogRatioLimit);
  const bool moves = !(log_ratio > limit || log_ratio < -limit);
  const T ratio = std::exp(at_least(at_most(log_ratio, limit), -limit));
  const T own_slope = moves ? ratio : T(0);

  const T bounded = at_most(ratio, options.delta) * advantage;
  const T clipped = at_least(at_most(ratio, options.clip_high), options.clip_low) * advantage;
  const T bounded_slope = ratio > options.delta ? T(0) : own_slope * advantage;
  const bool inside = !(ratio > options.clip_high || ratio < options.clip_low);
  const T clipped_slope = inside ? own_slope * advantage : T(0);
  if (clipped < bounded) {
    return {clipped, clipped_slope, ratio};
  }
  if (clipped == bounded) {
    return {bounded, (bounded_slope + clipped_slope) / 2, ratio};
  }
  return {bounded, bounded_slope, ratio};
}

template <typename T>
inline KlTerm<T> kl_term(T x, Kl estimator) {
  if (estimator == Kl::K1) {
    return {-x, T(1)};
  }
  if (estimator == Kl::K2) {
    return {x * x / 2, -x};
  }
  const T limit = T(kLogRatioLimit);
  const bool moves = !(x > limit || x < -limit);
  const T y = at_least(at_most(x, limit), -limit);
  const T e = std::exp(y);
  return {e - y - 1, moves ? T(1) - e : T(0)};
}

}  // namespace rlaif
