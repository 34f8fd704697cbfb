// Vectors that stay in registers, for the instruction set that CPU_CAPABILITY names.
//
// GCC keeps an array in registers only where every index is a constant before it looks at loops: an array that is
// declared first and filled later is filled with zeros by a loop, and nested loops are unrolled too late.

#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/Unroll.h>

#include <array>
#include <type_traits>
#include <utility>

namespace rlaif {
namespace {

using FloatVec = at::vec::Vectorized<float>;

template <int kCount>
using Vectors = std::array<FloatVec, kCount>;

template <typename Make, int... kIndices>
inline Vectors<sizeof...(kIndices)> vectors(const Make& make, std::integer_sequence<int, kIndices...>) {
  return {make(std::integral_constant<int, kIndices>{})...};
}

// make(0) .. make(kCount - 1).
template <int kCount, typename Make>
inline Vectors<kCount> vectors(const Make& make) {
  return vectors(make, std::make_integer_sequence<int, kCount>{});
}

// Calls body(0) .. body(kCount - 1), with constants.
template <int kCount, typename Body>
inline void for_each(const Body& body) {
  c10::ForcedUnroll<kCount>{}(body);
}

}  // namespace
}  // namespace rlaif
