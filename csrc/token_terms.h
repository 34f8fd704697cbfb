// One token of the loss and its derivative, shared by the token loss and the row kernels.
//
//   clip   = min(min(rho, delta) * A, clip(rho, 1 - eps_low, 1 + eps_high) * A),   rho = exp(log_ratio)
//            and at least dual_clip * A where A < 0
//   cispo  = stop_gradient(min(rho, clip_high)) * A * logp
//   sapo   = A * 4 / tau * sigmoid(tau (rho - 1)),   tau by the sign of A
//   kl     = k1: -x,  k2: x * x / 2,  k3: exp(x) - x - 1,   x = ref_logp - logp; within +-kl_clamp, times rho where
//            it is to be unbiased
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define RLAIF_TERM __host__ __device__ inline
#else
#define RLAIF_TERM inline
#endif

namespace rlaif {

// The same as `LOG_RATIO_LIMIT` in rlaif_fast/loss/options.py.
constexpr double kLogRatioLimit = 20.0;

enum class Kl : int64_t { K1 = 1, K2 = 2, K3 = 3 };
enum class Surrogate { Clip, Cispo, Sapo };

template <typename T>
struct TokenOptions {
  T clip_low;
  T clip_high;
  T delta;      // this and the next two: infinity where there is none
  T dual_clip;
  T beta;
  T kl_clamp;
  T entropy_coef;
  T sapo_positive;
  T sapo_negative;
  Kl kl;
  bool unbiased_kl;
  Surrogate surrogate;

  template <typename U>
  TokenOptions<U> to() const {
    return {U(clip_low), U(clip_high),     U(delta),         U(dual_clip),  U(beta), U(kl_clamp),
            U(entropy_coef), U(sapo_positive), U(sapo_negative), kl, unbiased_kl, surrogate};
  }
};

template <typename T>
struct PolicyTerm {
  T value;
  T slope;        // d value / d log_ratio; of cispo d value / d logp
  T ratio;
  T ratio_slope;  // d ratio / d log_ratio
};

template <typename T>
struct KlTerm {
  T value;
  T slope;  // d value / d logp
};

// std::clamp and std::min would drop a NaN; these keep it.
template <typename T>
RLAIF_TERM T at_most(T x, T limit) {
  return x > limit ? limit : x;
}

template <typename T>
RLAIF_TERM T at_least(T x, T limit) {
  return x < limit ? limit : x;
}

template <typename T>
RLAIF_TERM PolicyTerm<T> policy_term(T log_ratio, T logp, T advantage, const TokenOptions<T>& options) {
  const T limit = T(kLogRatioLimit);
  const bool moves = !(log_ratio > limit || log_ratio < -limit);
  const T ratio = std::exp(at_least(at_most(log_ratio, limit), -limit));
  const T own_slope = moves ? ratio : T(0);

  if (options.surrogate == Surrogate::Cispo) {
    const T slope = at_most(ratio, options.clip_high) * advantage;
    return {slope * logp, slope, ratio, own_slope};
  }
  if (options.surrogate == Surrogate::Sapo) {
    const T tau = advantage > 0 ? options.sapo_positive : options.sapo_negative;
    const T gate = T(1) / (T(1) + std::exp(-tau * (ratio - T(1))));
    return {T(4) / tau * gate * advantage, T(4) * gate * (T(1) - gate) * advantage * own_slope, ratio, own_slope};
  }
  const T bounded = at_most(ratio, options.delta) * advantage;
  const T clipped = at_least(at_most(ratio, options.clip_high), options.clip_low) * advantage;
  const T bounded_slope = ratio > options.delta ? T(0) : own_slope * advantage;
  const bool inside = !(ratio > options.clip_high || ratio < options.clip_low);
  const T clipped_slope = inside ? own_slope * advantage : T(0);
  PolicyTerm<T> term{bounded, bounded_slope, ratio, own_slope};
  if (clipped < bounded) {
    term.value = clipped;
    term.slope = clipped_slope;
  } else if (clipped == bounded) {
    term.slope = (bounded_slope + clipped_slope) / 2;
  }
  if (advantage < 0 && term.value < options.dual_clip * advantage) {
    term.value = options.dual_clip * advantage;
    term.slope = 0;
  }
  return term;
}

template <typename T>
RLAIF_TERM KlTerm<T> kl_estimate(T x, Kl estimator) {
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

template <typename T>
RLAIF_TERM KlTerm<T> kl_term(T x, const PolicyTerm<T>& policy, const TokenOptions<T>& options) {
  KlTerm<T> term = kl_estimate(x, options.kl);
  if (term.value > options.kl_clamp || term.value < -options.kl_clamp) {
    term = {at_least(at_most(term.value, options.kl_clamp), -options.kl_clamp), T(0)};
  }
  if (options.unbiased_kl) {
    term = {term.value * policy.ratio, term.slope * policy.ratio + term.value * policy.ratio_slope};
  }
  return term;
}

}  // namespace rlaif
