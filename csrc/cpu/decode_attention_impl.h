// The attention of a decode step for the instruction set that CPU_CAPABILITY names. Only row_kernels_impl.h includes
// this file.
//
// The queries of a key head are the lanes of a vector: each number of a key is broadcast to all of them, so that keys
// and values are read in their memory order, nothing is summed across lanes, and the softmax is elementwise.

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "row_kernels.h"
#include "vectors_impl.h"

namespace rlaif {
namespace {

constexpr int64_t kTile = 128;  // columns whose scores and values stay in the first-level cache

// Rows of the other operand that one loop keeps sums of, which hide the latency of a multiply-add. A vector of 16 comes
// with 32 registers.
constexpr int kKeySums = 8;
constexpr int kValueSums = FloatVec::size() == 16 ? 16 : 8;

// A vector of queries of one key head.
class LaneChunk {
 public:
  // query (D, lanes), scores (columns, lanes) and out (D, lanes) begin at the chunk.
  LaneChunk(const DecodeAttentionArgs& args, int64_t pair, const float* query, float* scores, float* out)
      : args_(args),
        lanes_(args.lanes),
        columns_(args.columns + pair / args.K * args.C),
        count_(args.counts[pair / args.K]),
        keys_(args.keys + pair * args.L * args.D),
        values_(args.values + pair * args.L * args.D),
        query_(query),
        scores_(scores),
        out_(out) {}

  // `masks` (C, lanes) of the group, from the chunk on.
  void run(const float* masks) {
    most_ = FloatVec(-std::numeric_limits<float>::infinity());
    int64_t j = 0;
    for (; j + kKeySums <= count_; j += kKeySums) {
      score<kKeySums>(j, masks);
    }
    for (; j < count_; ++j) {
      score<1>(j, masks);
    }
    total_ = FloatVec(0.0f);
    for (int64_t d = 0; d < args_.D; ++d) {
      FloatVec(0.0f).store(out_ + d * lanes_);
    }
    for (int64_t begin = 0; begin < count_; begin += kTile) {
      const int64_t end = std::min(count_, begin + kTile);
      weigh(begin, end);
      int64_t d = 0;
      for (; d + kValueSums <= args_.D; d += kValueSums) {
        add_values<kValueSums>(begin, end, d);
      }
      for (; d < args_.D; ++d) {
        add_values<1>(begin, end, d);
      }
    }
    for (int64_t d = 0; d < args_.D; ++d) {
      float* at = out_ + d * lanes_;
      (FloatVec::loadu(at) / total_).store(at);
    }
  }

 private:
  int64_t column(int64_t j) const { return columns_[j] >> 1; }

  // Scores of the columns j .. j + kHere - 1, and their running maxima.
  template <int kHere>
  void score(int64_t j, const float* masks) {
    std::array<const float*, kHere> key;
    for_each<kHere>([&](auto c) { key[c] = keys_ + column(j + c) * args_.D; });
    auto sums = vectors<kHere>([](auto) { return FloatVec(0.0f); });
    for (int64_t d = 0; d < args_.D; ++d) {
      const FloatVec query = FloatVec::loadu(query_ + d * lanes_);
      for_each<kHere>([&](auto c) { sums[c] = at::vec::fmadd(query, FloatVec(key[c][d]), sums[c]); });
    }
    for_each<kHere>([&](auto c) {
      FloatVec sum = sums[c];
      if (columns_[j + c] & 1) {
        sum = sum + FloatVec::loadu(masks + column(j + c) * lanes_);
      }
      most_ = at::vec::maximum(most_, sum);
      sum.store(scores_ + (j + c) * lanes_);
    });
  }

  // Scores to unnormalised probabilities.
  void weigh(int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      float* at = scores_ + j * lanes_;
      const FloatVec weight = (FloatVec::loadu(at) - most_).exp();
      weight.store(at);
      total_ = total_ + weight;
    }
  }

  // Adds the columns' values, numbers d .. d + kHere - 1 of each.
  template <int kHere>
  void add_values(int64_t begin, int64_t end, int64_t d) {
    auto sums = vectors<kHere>([&](auto i) { return FloatVec::loadu(out_ + (d + i) * lanes_); });
    for (int64_t j = begin; j < end; ++j) {
      const float* value = values_ + column(j) * args_.D + d;
      const FloatVec weight = FloatVec::loadu(scores_ + j * lanes_);
      for_each<kHere>([&](auto i) { sums[i] = at::vec::fmadd(weight, FloatVec(value[i]), sums[i]); });
    }
    for_each<kHere>([&](auto i) { sums[i].store(out_ + (d + i) * lanes_); });
  }

  const DecodeAttentionArgs& args_;
  const int64_t lanes_;
  const int32_t* columns_;
  const int64_t count_;
  const float *keys_, *values_, *query_;
  float *scores_, *out_;
  FloatVec most_, total_;
};

void decode_attention(const DecodeAttentionArgs& args, int64_t begin, int64_t end) {
  const int64_t lanes = args.lanes, D = args.D, Q = args.Q, vector = FloatVec::size();
  std::vector<float> query(D * lanes), out(D * lanes), scores(args.C * lanes);
  for (int64_t pair = begin; pair < end; ++pair) {
    for (int64_t q = 0; q < Q; ++q) {
      for (int64_t d = 0; d < D; ++d) {
        query[d * lanes + q] = args.query[(pair * Q + q) * D + d];
      }
    }
    const float* masks = args.masks + pair / args.K * args.C * lanes;
    for (int64_t lane = 0; lane < lanes; lane += vector) {
      LaneChunk(args, pair, &query[lane], &scores[lane], &out[lane]).run(masks + lane);
    }
    for (int64_t q = 0; q < Q; ++q) {
      for (int64_t d = 0; d < D; ++d) {
        args.out[(pair * Q + q) * D + d] = out[d * lanes + q];
      }
    }
  }
}

}  // namespace
}  // namespace rlaif
