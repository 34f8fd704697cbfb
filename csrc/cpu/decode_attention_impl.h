// The attention of a decode step for the instruction set that CPU_CAPABILITY names; included by row_kernels_impl.h alone.
//
// The queries of a key head are the lanes of a vector: a key's number is broadcast and met by all of them at once, so
// that keys and values are read as they lie, nothing is added up across lanes, and the softmax is elementwise.

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "row_kernels.h"

namespace rlaif {
namespace {

constexpr int64_t kTile = 256;  // columns whose scores stay in the first-level cache while the values are added up

using FloatVec = at::vec::Vectorized<float>;

// Rows of the other operand that one loop keeps sums of: 8 sums a loop hide the latency of a multiply-add.
template <int64_t kVectors>
constexpr int64_t kSums = kVectors == 1 ? 8 : 4;

// One lane chunk of one key head: kVectors vectors of queries.
template <int64_t kVectors>
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
    std::fill_n(most_, kVectors, FloatVec(-std::numeric_limits<float>::infinity()));
    int64_t j = 0;
    for (; j + kSums<kVectors> <= count_; j += kSums<kVectors>) {
      score<kSums<kVectors>>(j, masks);
    }
    for (; j < count_; ++j) {
      score<1>(j, masks);
    }
    std::fill_n(total_, kVectors, FloatVec(0.0f));
    for (int64_t d = 0; d < args_.D; ++d) {
      for (int64_t v = 0; v < kVectors; ++v) {
        FloatVec(0.0f).store(out_ + d * lanes_ + v * FloatVec::size());
      }
    }
    for (int64_t begin = 0; begin < count_; begin += kTile) {
      const int64_t end = std::min(count_, begin + kTile);
      weigh(begin, end);
      int64_t d = 0;
      for (; d + kSums<kVectors> <= args_.D; d += kSums<kVectors>) {
        add_values<kSums<kVectors>>(begin, end, d);
      }
      for (; d < args_.D; ++d) {
        add_values<1>(begin, end, d);
      }
    }
    for (int64_t d = 0; d < args_.D; ++d) {
      for (int64_t v = 0; v < kVectors; ++v) {
        float* at = out_ + d * lanes_ + v * FloatVec::size();
        (FloatVec::loadu(at) / total_[v]).store(at);
      }
    }
  }

 private:
  int64_t column(int64_t j) const { return columns_[j] >> 1; }

  // Scores of the columns j .. j + kHere - 1, and their running maxima.
  template <int64_t kHere>
  void score(int64_t j, const float* masks) {
    const float* key[kHere];
    FloatVec sums[kHere][kVectors];
    for (int64_t c = 0; c < kHere; ++c) {
      key[c] = keys_ + column(j + c) * args_.D;
      std::fill_n(sums[c], kVectors, FloatVec(0.0f));
    }
    for (int64_t d = 0; d < args_.D; ++d) {
      FloatVec query[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) {
        query[v] = FloatVec::loadu(query_ + d * lanes_ + v * FloatVec::size());
      }
      for (int64_t c = 0; c < kHere; ++c) {
        const FloatVec number(key[c][d]);
        for (int64_t v = 0; v < kVectors; ++v) {
          sums[c][v] = at::vec::fmadd(query[v], number, sums[c][v]);
        }
      }
    }
    for (int64_t c = 0; c < kHere; ++c) {
      for (int64_t v = 0; v < kVectors; ++v) {
        FloatVec sum = sums[c][v];
        if (columns_[j + c] & 1) {
          sum = sum + FloatVec::loadu(masks + column(j + c) * lanes_ + v * FloatVec::size());
        }
        most_[v] = at::vec::maximum(most_[v], sum);
        sum.store(scores_ + (j + c) * lanes_ + v * FloatVec::size());
      }
    }
  }

  // Scores to unnormalised probabilities.
  void weigh(int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t v = 0; v < kVectors; ++v) {
        float* at = scores_ + j * lanes_ + v * FloatVec::size();
        const FloatVec weight = (FloatVec::loadu(at) - most_[v]).exp();
        weight.store(at);
        total_[v] = total_[v] + weight;
      }
    }
  }

  // Adds the columns' values, numbers d .. d + kHere - 1 of each.
  template <int64_t kHere>
  void add_values(int64_t begin, int64_t end, int64_t d) {
    FloatVec sums[kHere][kVectors];
    for (int64_t i = 0; i < kHere; ++i) {
      for (int64_t v = 0; v < kVectors; ++v) {
        sums[i][v] = FloatVec::loadu(out_ + (d + i) * lanes_ + v * FloatVec::size());
      }
    }
    for (int64_t j = begin; j < end; ++j) {
      const float* value = values_ + column(j) * args_.D + d;
      FloatVec weight[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) {
        weight[v] = FloatVec::loadu(scores_ + j * lanes_ + v * FloatVec::size());
      }
      for (int64_t i = 0; i < kHere; ++i) {
        const FloatVec number(value[i]);
        for (int64_t v = 0; v < kVectors; ++v) {
          sums[i][v] = at::vec::fmadd(weight[v], number, sums[i][v]);
        }
      }
    }
    for (int64_t i = 0; i < kHere; ++i) {
      for (int64_t v = 0; v < kVectors; ++v) {
        sums[i][v].store(out_ + (d + i) * lanes_ + v * FloatVec::size());
      }
    }
  }

  const DecodeAttentionArgs& args_;
  const int64_t lanes_;
  const int32_t* columns_;
  const int64_t count_;
  const float *keys_, *values_, *query_;
  float *scores_, *out_;
  FloatVec most_[kVectors], total_[kVectors];
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
    for (int64_t lane = 0; lane < lanes;) {
      if (lane + 2 * vector <= lanes) {
        LaneChunk<2>(args, pair, &query[lane], &scores[lane], &out[lane]).run(masks + lane);
        lane += 2 * vector;
      } else {
        LaneChunk<1>(args, pair, &query[lane], &scores[lane], &out[lane]).run(masks + lane);
        lane += vector;
      }
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
