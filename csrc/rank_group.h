// The mathematics of one group of ranked responses, shared by the CPU and the CUDA implementation.
//
// Position k (0-based) is worth the gain g(k) = relevance(k) * discount(k) = 1 / (1 + k) * 1 / log2(2 + k);
// responses that tie over positions k..k+m-1 get the mean over them each.
// Source: arXiv 2510.02561 (GRPO_rank).
//
// Letters: G responses in the group, u gain in the oracle's order, v gain in the policy's order.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RLAIF_HD __host__ __device__ __forceinline__
#else
#define RLAIF_HD inline
#endif

namespace rlaif {

constexpr int kMaxGroup = 64;
constexpr int kMinRanked = 2;  // judged responses from which a group says something

// The same order as `KINDS` in rlaif_fast/loss/options.py.
enum class Kind : int64_t { Directed = 0, Oracle = 1, Paper = 2, PaperSwapped = 3, ZScore = 4 };

constexpr double kScaleEps = 1e-6;   // added to the root mean square of a group
constexpr double kZScoreEps = 1e-4;  // added to the standard deviation of a group

// 1 / log2(2 + k) for k = 0..63.
#define RLAIF_DISCOUNTS \
  {1.0, 0.6309297535714575, 0.5, 0.43067655807339306, 0.38685280723454163, 0.3562071871080222, \
   0.3333333333333333, 0.31546487678572877, 0.3010299956639812, 0.2890648263178879, \
   0.27894294565112987, 0.27023815442731974, 0.26264953503719357, 0.2559580248098155, 0.25, \
   0.24465054211822604, 0.23981246656813146, 0.23540891336663824, 0.23137821315975915, \
   0.227670248696953, 0.22424382421757544, 0.22106472945750374, 0.21810429198553155, \
   0.21533827903669653, 0.21274605355336318, 0.2103099178571525, 0.20801459767650948, \
   0.20584683246043448, 0.2037950470905062, 0.20184908658209985, 0.2, 0.19823986317056053, \
   0.1965616322328226, 0.1949590218937863, 0.19342640361727081, 0.19195872000656014, \
   0.1905514124267734, 0.18920035951687003, 0.18790182470910757, 0.18665241123894338, \
   0.1854490234153689, 0.18428883314870617, 0.18316925091363362, 0.18208790046993825, \
   0.1810425967800402, 0.18003132665669264, 0.17905223175104137, 0.1781035935540111, \
   0.17718382013555792, 0.17629143438888212, 0.17542506358195453, 0.17458343004804494, \
   0.17376534287144002, 0.1729696904450771, 0.17219543379409813, 0.17144160057391347, \
   0.17070727966372012, 0.16999161628691403, 0.16929380759878143, 0.1686130986895011, \
   0.16794877895704194, 0.16730017881017412, 0.16666666666666666, 0.16604764621593782}

// What each position is worth.
template <typename T>
struct Tables {
  T relevance[kMaxGroup];
  T discount[kMaxGroup];
  T gain[kMaxGroup];
};

template <typename T>
constexpr Tables<T> make_tables() {
  constexpr double discount[kMaxGroup] = RLAIF_DISCOUNTS;
  Tables<T> tables{};
  for (int k = 0; k < kMaxGroup; ++k) {
    tables.relevance[k] = T(1.0 / (1 + k));
    tables.discount[k] = T(discount[k]);
    tables.gain[k] = T(discount[k] / (1 + k));
  }
  return tables;
}

// Where a response stands: it ties with count - 1 others over positions first..first + count - 1.
struct Place {
  int first;
  int count;
};

// Three-way comparison; the product of two of them says whether a pair is concordant.
template <typename T>
RLAIF_HD int sign_of(T a, T b) {
  return (a > b ? 1 : 0) - (a < b ? 1 : 0);
}

// Counts another response, or the response itself, into a place: `sign` compares the own key with the other's, and the
// lower key is the better one.
RLAIF_HD void meet(Place& place, int sign) {
  place.first += sign > 0 ? 1 : 0;
  place.count += sign == 0 ? 1 : 0;
}

// Mean worth of the positions that a response shares.
template <typename T>
RLAIF_HD T tie_mean(const T* worth, Place place) {
  T total = worth[place.first];
  if (place.count == 1) {
    return total;
  }
  for (int k = 1; k < place.count; ++k) {
    total += worth[place.first + k];
  }
  return total / T(place.count);
}

template <typename T>
RLAIF_HD T penalty_of(Kind kind, T u, T v) {
  if (kind == Kind::Paper) {
    return T(1) - v / u;
  }
  if (kind == Kind::PaperSwapped) {
    return T(1) - u / v;
  }
  return u == v ? T(0) : T(1) - (u < v ? u / v : v / u);
}

RLAIF_HD bool follows_paper(Kind kind) { return kind == Kind::Paper || kind == Kind::PaperSwapped; }

}  // namespace rlaif
