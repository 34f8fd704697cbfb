// Rows of logits: statistics and gradients; a matmul of few rows; the attention of a decode step. row_kernels_impl.h is
// compiled once for each instruction set (the files row_kernels_*.cpp) and row_ops.cpp picks one by what this processor
// can do, so one build runs anywhere.
//
// With z = cap tanh(scale logits / cap) / temperature, or scale logits / temperature where there is no cap,
// lse = logsumexp z, p = exp(z - lse), H = lse - sum p z:
//   d logp / d z_v = 1[v = y] - p_v,   d H / d z_v = -p_v * (z_v - lse + H)
#pragma once

#include <cstdint>

#include "../token_terms.h"

namespace rlaif {

enum class Dtype { Float, Double, BFloat16, Half };

// M rows of V logits. Statistics are float, or double for double logits.
struct RowArgs {
  const void* logits;  // (M, V)
  int64_t row_stride;  // elements between rows
  int64_t V;
  const int64_t* token_ids;  // (M,); an id outside [0, V) gives NaN and is never read through
  double temperature;
  const void* temperatures;  // (M,) in its place, or null
  double cap;                // infinity where there is none
  double scale;
  void* logps;    // (M,)
  void* lse;      // (M,)
  void* entropy;  // (M,)
};

struct RowGradArgs {
  RowArgs rows;                // lse and entropy are read
  const void* grad_logps;     // (M,)
  const void* grad_entropy;   // (M,) or null
  void* out;                  // (M, V); may be the logits
  int64_t out_stride;
};

// The loss of rows whose advantage is known: statistics, then the logits overwritten by their gradient.
struct RowLossArgs {
  RowArgs rows;
  const void* advantages;      // (M,)
  const void* weights;         // (M,) what the row counts in the aggregate
  const void* old_logps;       // (M,) or null: on-policy
  const void* ref_logps;       // (M,) or null
  const void* sampling_ratio;  // (M,) or null
  const void* entropy_weights;  // (M,) what the row's entropy counts; null is `weights`
  TokenOptions<double> options;
  void* grad_logps;    // (M,)
  void* grad_entropy;  // (M,)
};

// out = x weight^T, or that added to out, for the columns [begin, end) of out. For few rows: the weight is read once,
// in its memory order, where a library that packs it first would read it twice.
struct ThinMatmulArgs {
  const float* x;       // (M, H)
  const float* weight;  // (O, H)
  float* out;           // (M, O)
  int64_t M;
  int64_t H;
  int64_t O;
  bool add;
};

// Attention of the Q queries of each of N K key heads to the columns of their group's buffer.
struct DecodeAttentionArgs {
  const float* query;  // (N K, Q, D), scaled
  const float* keys;   // (N K, L, D)
  const float* values;
  const int32_t* columns;  // (N, C): 2 c for a column c that every query sees, 2 c + 1 for one that some see, no others
  const int64_t* counts;   // (N,) how many of them
  const float* masks;      // (N, C, lanes) additive, read where some see a column
  float* out;              // (N K, Q, D)
  int64_t K;
  int64_t L;
  int64_t C;
  int64_t Q;
  int64_t D;
  int64_t lanes;  // Q, rounded up to whole vectors
};

struct RowKernels {
  const char* name;
  int64_t vector;  // floats of one
  void (*stats)(Dtype, const RowArgs&, int64_t begin, int64_t end);
  void (*grad)(Dtype, const RowGradArgs&, int64_t begin, int64_t end);
  void (*loss)(Dtype, const RowLossArgs&, int64_t begin, int64_t end);
  void (*thin_matmul)(const ThinMatmulArgs&, int64_t begin, int64_t end);
  void (*decode_attention)(const DecodeAttentionArgs&, int64_t begin, int64_t end);  // of the N K key heads
};

// Those of the instruction set that ATen chose, so ATEN_CPU_CAPABILITY governs both.
const RowKernels& row_kernels();

const RowKernels& row_kernels_default();
#if defined(RLAIF_X86_KERNELS)
const RowKernels& row_kernels_avx2();
const RowKernels& row_kernels_avx512();
#endif

}  // namespace rlaif
