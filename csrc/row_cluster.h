// How a row of logits is dealt to the threads of a cluster of two blocks: vectors of 16 bytes, the first half to block 0,
// the rest to block 1, and within a block one after the other to its threads in turn. Shared by the kernel and its test,
// which runs on a CPU.
#pragma once

#if defined(__CUDACC__)
#define RLAIF_BOTH __host__ __device__
#else
#define RLAIF_BOTH
#endif

namespace rlaif {

constexpr int kClusterBlocks = 2;
constexpr int kClusterThreads = 1024;
constexpr int kVectorBytes = 16;
constexpr int kMaxSharedBytes = 220 * 1024;  // of a row in one block; the statistics take the rest of 227 KiB

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

// Whether a row fits: whole vectors, at most so many that half of them fit one block.
RLAIF_BOTH constexpr bool row_fits(long long V, int element_bytes) {
  const int per_vector = kVectorBytes / element_bytes;
  return V > 0 && V % per_vector == 0 && (V / per_vector + 1) / kClusterBlocks * kVectorBytes <= kMaxSharedBytes;
}

}  // namespace rlaif
