// How a row of logits is split over the threads of a cluster of two blocks, and the statistics that a thread keeps. Of
// the vectors of 16 bytes the first half goes to block 0, the rest to block 1, and within a block to its threads in
// turn. Shared by the kernel and its test, which runs on a CPU.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define RLAIF_BOTH __host__ __device__
#else
#define RLAIF_BOTH
#endif

namespace rlaif {

constexpr int kClusterBlocks = 2;
constexpr int kClusterThreads = 1024;
constexpr int kVectorBytes = 16;
constexpr int kOtherSharedBytes = 7 * 1024;  // of a block, for the statistics
constexpr float kFloor = -1e30f;  // below every logit; finite, so that differences and products with 0 are
constexpr float kLeast = -1e3f;  // exp2 of it is 0, and its product with any gradient finite

// The vectors of a row that one block holds.
struct Share {
  int first;
  int count;
};

RLAIF_BOTH constexpr Share share_of(int block, int vectors) {
  const int half = (vectors + 1) / kClusterBlocks;
  return block == 0 ? Share{0, half} : Share{half, vectors - half};
}

// The block that holds a vector, and its place there.
RLAIF_BOTH constexpr int block_of(int vector, int vectors) { return vector < share_of(1, vectors).first ? 0 : 1; }
RLAIF_BOTH constexpr int slot_of(int vector, int vectors) {
  return vector - share_of(block_of(vector, vectors), vectors).first;
}

// The logits of the longest row whose halves fit the shared memory of two blocks.
RLAIF_BOTH constexpr long long longest_row(int shared_bytes, int element_bytes) {
  const int vectors = shared_bytes > kOtherSharedBytes ? (shared_bytes - kOtherSharedBytes) / kVectorBytes : 0;
  return static_cast<long long>(vectors) * kClusterBlocks * (kVectorBytes / element_bytes);
}

// Whether a row fits: whole vectors, at most so many that half of them fit one block.
RLAIF_BOTH constexpr bool row_fits(long long V, int shared_bytes, int element_bytes) {
  return V > 0 && V % (kVectorBytes / element_bytes) == 0 && V <= longest_row(shared_bytes, element_bytes);
}

// Of some logits x: their maximum m, s = sum 2^d and w = sum 2^d d of d = (x - m) scale. The maximum is subtracted
// before the scale is applied: x scale - m scale would keep the rounding of both products, which is not small at large
// logits.
struct Stats {
  float m;
  float s;
  float w;
};

// Moves the maximum up to `top`.
RLAIF_BOTH inline Stats raised(Stats a, float top, float scale) {
  const float shift = fmaxf((a.m - top) * scale, kFloor);  // s is 0 before the first logit, and 0 * -inf is NaN
  const float decay = exp2f(shift);
  return {top, decay * a.s, decay * (a.w + a.s * shift)};
}

// Takes in a logit that is at most the maximum.
RLAIF_BOTH inline void take(Stats& a, float x, float scale) {
  const float d = (x - a.m) * scale;
  const float e = exp2f(d);
  a.s += e;
  a.w += e * fmaxf(d, kFloor);
}

RLAIF_BOTH inline Stats merge(Stats a, Stats b, float scale) {
  const float top = fmaxf(a.m, b.m);
  a = raised(a, top, scale);
  b = raised(b, top, scale);
  return {top, a.s + b.s, a.w + b.w};
}

}  // namespace rlaif
