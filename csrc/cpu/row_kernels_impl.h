// The row kernels for the instruction set that CPU_CAPABILITY names; only row_kernels_*.cpp include it.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <limits>
#include <type_traits>

#include "decode_attention_impl.h"
#include "row_kernels.h"
#include "thin_matmul_impl.h"

namespace rlaif {
namespace {

using at::vec::Vectorized;

// Logits are read a block at a time: bfloat16 and float16 are widened into a buffer that stays in the first-level
// cache, and a sum over a block stays short enough for float before it is added to a double.
constexpr int64_t kBlock = 2048;

inline Vectorized<float> fast_exp(Vectorized<float> x) { return x.exp_u20(); }
inline Vectorized<double> fast_exp(Vectorized<double> x) { return x.exp(); }

// What statistics of logits of type T are made in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
constexpr bool kNarrow = !std::is_same_v<T, Wide<T>>;

template <typename T>
inline void widen(const T* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + Vectorized<T>::size() <= count; i += Vectorized<T>::size()) {
    const auto [low, high] = at::vec::convert_to_float<T>(Vectorized<T>::loadu(from + i));
    low.store(to + i);
    high.store(to + i + Vectorized<float>::size());
  }
  for (; i < count; ++i) {
    to[i] = static_cast<float>(from[i]);
  }
}

template <typename T>
inline void narrow(const float* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + Vectorized<T>::size() <= count; i += Vectorized<T>::size()) {
    const auto low = Vectorized<float>::loadu(from + i);
    const auto high = Vectorized<float>::loadu(from + i + Vectorized<float>::size());
    at::vec::convert_from_float<T>(low, high).store(to + i);
  }
  for (; i < count; ++i) {
    to[i] = static_cast<T>(from[i]);
  }
}

// What happens to a logit before the softmax: cap tanh(scale x / cap), or nothing, and one factor for what is left.
template <typename W>
struct Scaling {
  W cap;     // infinity where there is none
  W inner;   // scale / cap
  W factor;  // 1 / temperature, times the scale where there is no cap

  bool capped() const { return cap < std::numeric_limits<W>::infinity(); }
  W operator()(W x) const { return capped() ? cap * std::tanh(x * inner) : x; }
};

template <typename W>
inline void cap_block(const W* from, W* to, int64_t count, const Scaling<W>& scaling) {
  using Vec = Vectorized<W>;
  const Vec inner(scaling.inner), cap(scaling.cap);
  int64_t i = 0;
  for (; i + Vec::size() <= count; i += Vec::size()) {
    ((Vec::loadu(from + i) * inner).tanh() * cap).store(to + i);
  }
  for (; i < count; ++i) {
    to[i] = scaling(from[i]);
  }
}

// Calls body(block, first, count) over a row, with the block in the wide type and capped.
template <typename T, typename Body>
inline void for_blocks(const T* row, int64_t V, const Scaling<Wide<T>>& scaling, Body body) {
  using W = Wide<T>;
  for (int64_t first = 0; first < V; first += kBlock) {
    const int64_t count = V - first < kBlock ? V - first : kBlock;
    if constexpr (kNarrow<T>) {
      alignas(64) float buffer[kBlock];
      widen(row + first, buffer, count);
      if (scaling.capped()) {
        cap_block(buffer, buffer, count, scaling);
      }
      body(static_cast<const float*>(buffer), first, count);
    } else if (scaling.capped()) {
      alignas(64) W buffer[kBlock];
      cap_block(row + first, buffer, count, scaling);
      body(static_cast<const W*>(buffer), first, count);
    } else {
      body(row + first, first, count);
    }
  }
}

template <typename W>
inline W sum_lanes(Vectorized<W> x) {
  alignas(64) W lanes[Vectorized<W>::size()];
  x.store(lanes);
  W total = 0;
  for (int i = 0; i < Vectorized<W>::size(); ++i) {
    total += lanes[i];
  }
  return total;
}

// NaN in, NaN out, unlike std::max.
template <typename W>
inline W maximum(W a, W b) {
  return (a > b || std::isnan(a)) ? a : b;
}

template <typename T>
inline Wide<T> row_max(const T* row, int64_t V, const Scaling<Wide<T>>& scaling) {
  using W = Wide<T>;
  using Vec = Vectorized<W>;
  constexpr int64_t step = Vec::size();
  W most = -std::numeric_limits<W>::infinity();
  for_blocks(row, V, scaling, [&](const W* x, int64_t, int64_t count) {
    Vec a(most), b(most), c(most), d(most);
    int64_t i = 0;
    for (; i + 4 * step <= count; i += 4 * step) {
      a = at::vec::maximum(a, Vec::loadu(x + i));
      b = at::vec::maximum(b, Vec::loadu(x + i + step));
      c = at::vec::maximum(c, Vec::loadu(x + i + 2 * step));
      d = at::vec::maximum(d, Vec::loadu(x + i + 3 * step));
    }
    alignas(64) W lanes[step];
    at::vec::maximum(at::vec::maximum(a, b), at::vec::maximum(c, d)).store(lanes);
    for (int64_t lane = 0; lane < step; ++lane) {
      most = maximum(most, lanes[lane]);
    }
    for (; i < count; ++i) {
      most = maximum(most, x[i]);
    }
  });
  return most;
}

template <typename W>
struct Stats {
  W logp;
  W lse;
  W entropy;
};

// y = (logit - max) / temperature; sums exp(y) and exp(y) * y. A logit of -inf counts 0 in both.
template <typename T>
inline Stats<Wide<T>> row_stats(const T* row, int64_t V, int64_t id, const Scaling<Wide<T>>& scaling) {
  using W = Wide<T>;
  using Vec = Vectorized<W>;
  constexpr int64_t step = Vec::size();
  const W floor = std::numeric_limits<W>::lowest();
  const W inv_temperature = scaling.factor;
  const W most = row_max(row, V, scaling);
  const Vec shift(most), scale(inv_temperature), lowest(floor);
  double total = 0;
  double moment = 0;
  for_blocks(row, V, scaling, [&](const W* x, int64_t, int64_t count) {
    Vec s0(0), s1(0), m0(0), m1(0);
    int64_t i = 0;
    for (; i + 2 * step <= count; i += 2 * step) {
      const Vec y0 = at::vec::maximum((Vec::loadu(x + i) - shift) * scale, lowest);
      const Vec y1 = at::vec::maximum((Vec::loadu(x + i + step) - shift) * scale, lowest);
      const Vec e0 = fast_exp(y0);
      const Vec e1 = fast_exp(y1);
      s0 = s0 + e0;
      s1 = s1 + e1;
      m0 = at::vec::fmadd(e0, y0, m0);
      m1 = at::vec::fmadd(e1, y1, m1);
    }
    W s = sum_lanes(s0 + s1);
    W m = sum_lanes(m0 + m1);
    for (; i < count; ++i) {
      const W y = maximum((x[i] - most) * inv_temperature, floor);
      const W e = std::exp(y);
      s += e;
      m += e * y;
    }
    total += s;
    moment += m;
  });
  const double log_total = std::log(total);
  const double shifted = static_cast<double>(most) * inv_temperature;
  const W none = std::numeric_limits<W>::quiet_NaN();
  const bool known = id >= 0 && id < V;
  const double logit = scaling(static_cast<W>(row[known ? id : 0]));
  const double own = known ? (logit - most) * inv_temperature : none;
  return {static_cast<W>(own - log_total), static_cast<W>(shifted + log_total),
          static_cast<W>(log_total - moment / total)};
}

// out_v = grad_logp * dlogp/dlogits_v + grad_entropy * dH/dlogits_v.
template <typename T>
inline void row_grad(const T* row, T* out, int64_t V, int64_t id, const Scaling<Wide<T>>& scaling, Wide<T> lse,
                     Wide<T> entropy, Wide<T> grad_logp, Wide<T> grad_entropy) {
  using W = Wide<T>;
  using Vec = Vectorized<W>;
  constexpr int64_t step = Vec::size();
  if (grad_logp == 0 && grad_entropy == 0) {
    std::fill_n(out, V, T(0));
    return;
  }
  const W inv_temperature = scaling.factor;
  // -p * (grad_logp + grad_entropy * (log p + H)) / temperature, with the constants folded.
  const W floor = -1000;  // exp of it is 0, also in double, and its product with any gradient finite
  const W slope = -grad_entropy * inv_temperature;
  const W base = -(grad_logp + grad_entropy * entropy) * inv_temperature;
  const W own = grad_logp * inv_temperature;
  const bool known = id >= 0 && id < V;
  const Vec scale(inv_temperature), shift(-lse), lowest(floor), slope_v(slope), base_v(base);
  for_blocks(row, V, scaling, [&](const W* x, int64_t first, int64_t count) {
    alignas(64) W buffer[kNarrow<T> ? kBlock : 1];
    W* to;
    if constexpr (kNarrow<T>) {
      to = buffer;
    } else {
      to = out + first;
    }
    int64_t i = 0;
    for (; i + 2 * step <= count; i += 2 * step) {
      const Vec l0 = at::vec::maximum(at::vec::fmadd(Vec::loadu(x + i), scale, shift), lowest);
      const Vec l1 = at::vec::maximum(at::vec::fmadd(Vec::loadu(x + i + step), scale, shift), lowest);
      (fast_exp(l0) * at::vec::fmadd(l0, slope_v, base_v)).store(to + i);
      (fast_exp(l1) * at::vec::fmadd(l1, slope_v, base_v)).store(to + i + step);
    }
    for (; i < count; ++i) {
      const W l = maximum(x[i] * inv_temperature - lse, floor);
      to[i] = std::exp(l) * (l * slope + base);
    }
    if (known && id >= first && id < first + count) {
      to[id - first] += own;
    }
    if (scaling.capped()) {  // d (cap tanh(u)) / du = 1 - tanh^2
      const W slope_of_cap = scaling.inner * scaling.cap;
      for (int64_t k = 0; k < count; ++k) {
        const W t = x[k] / scaling.cap;
        to[k] *= slope_of_cap * (W(1) - t * t);
      }
    }
    if constexpr (kNarrow<T>) {
      narrow(buffer, out + first, count);
    }
  });
}

template <typename T>
struct Kernels {
  using W = Wide<T>;

  static W at(const void* x, int64_t m) { return static_cast<const W*>(x)[m]; }
  static W& at(void* x, int64_t m) { return static_cast<W*>(x)[m]; }

  static Scaling<W> scaling_of(const RowArgs& args, int64_t m) {
    const double temperature = args.temperatures == nullptr ? args.temperature : at(args.temperatures, m);
    const bool capped = args.cap < std::numeric_limits<double>::infinity();
    return {static_cast<W>(args.cap), static_cast<W>(capped ? args.scale / args.cap : 1.0),
            static_cast<W>((capped ? 1.0 : args.scale) / temperature)};
  }

  static Stats<W> stats_of(const RowArgs& args, int64_t m) {
    const T* row = static_cast<const T*>(args.logits) + m * args.row_stride;
    const Stats<W> s = row_stats(row, args.V, args.token_ids[m], scaling_of(args, m));
    at(args.logps, m) = s.logp;
    at(args.lse, m) = s.lse;
    at(args.entropy, m) = s.entropy;
    return s;
  }

  static void stats(const RowArgs& args, int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      stats_of(args, m);
    }
  }

  static void grad(const RowGradArgs& args, int64_t begin, int64_t end) {
    const RowArgs& rows = args.rows;
    for (int64_t m = begin; m < end; ++m) {
      row_grad(static_cast<const T*>(rows.logits) + m * rows.row_stride,
               static_cast<T*>(args.out) + m * args.out_stride, rows.V, rows.token_ids[m],
               scaling_of(rows, m), W(at(rows.lse, m)), W(at(rows.entropy, m)),
               at(args.grad_logps, m), args.grad_entropy == nullptr ? W(0) : at(args.grad_entropy, m));
    }
  }

  static void loss(const RowLossArgs& args, int64_t begin, int64_t end) {
    const RowArgs& rows = args.rows;
    const TokenOptions<W> options = args.options.template to<W>();
    for (int64_t m = begin; m < end; ++m) {
      const Stats<W> s = stats_of(rows, m);
      const W weight = at(args.weights, m);
      W slope = 0;
      W entropy_slope = 0;
      if (weight != 0) {
        const W log_ratio = args.old_logps == nullptr ? s.logp - s.logp : s.logp - at(args.old_logps, m);
        const PolicyTerm<W> policy = policy_term(log_ratio, s.logp, at(args.advantages, m), options);
        slope = policy.slope;
        if (args.sampling_ratio != nullptr) {
          slope *= at(args.sampling_ratio, m);
        }
        if (options.beta != 0 && args.ref_logps != nullptr) {
          slope -= options.beta * kl_term(at(args.ref_logps, m) - s.logp, policy, options).slope;
        }
        slope *= -weight;
        entropy_slope =
            -options.entropy_coef * (args.entropy_weights == nullptr ? weight : at(args.entropy_weights, m));
      }
      at(args.grad_logps, m) = slope;
      at(args.grad_entropy, m) = entropy_slope;
      T* row = static_cast<T*>(const_cast<void*>(rows.logits)) + m * rows.row_stride;
      row_grad(static_cast<const T*>(row), row, rows.V, rows.token_ids[m], scaling_of(rows, m), s.lse, s.entropy, slope,
               entropy_slope);
    }
  }
};

template <typename Call>
void dispatch(Dtype dtype, Call call) {
  switch (dtype) {
    case Dtype::Float:
      return call(Kernels<float>());
    case Dtype::Double:
      return call(Kernels<double>());
    case Dtype::BFloat16:
      return call(Kernels<c10::BFloat16>());
    case Dtype::Half:
      return call(Kernels<c10::Half>());
  }
}

void stats(Dtype dtype, const RowArgs& args, int64_t begin, int64_t end) {
  dispatch(dtype, [&](auto kernels) { kernels.stats(args, begin, end); });
}

void grad(Dtype dtype, const RowGradArgs& args, int64_t begin, int64_t end) {
  dispatch(dtype, [&](auto kernels) { kernels.grad(args, begin, end); });
}

void loss(Dtype dtype, const RowLossArgs& args, int64_t begin, int64_t end) {
  dispatch(dtype, [&](auto kernels) { kernels.loss(args, begin, end); });
}

}  // namespace
}  // namespace rlaif
