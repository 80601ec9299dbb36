// What the kernels of paged attention with one query share: where keys and values are, and how they are split.
//
// A sequence's keys are split every SPLIT positions, or every SPLIT · 2^n, so that there are at most MAX_SPLITS. That
// depends on its own context alone, so its result does not depend on other sequences.
// GROUP query heads of one KV head share the reading of its keys and values. K and V of a position are in one block of
// the pool: (K or V, position, KV head, d) within the layer's share.
#pragma once
#include "device.cuh"

constexpr int THREADS = 128;
constexpr int SPLIT = 256; // positions that a block reads at a time
constexpr int MAX_SPLITS = 64;
constexpr int GROUP = 8;

struct Cache {
  i64 block_stride, block_tokens, num_kv_heads, head_dim;
  __device__ i64 at(const i64 *blocks, i64 position, i64 kv_head) const {
    const i64 row = blocks[position / block_tokens] * block_stride;
    return row + (position % block_tokens * num_kv_heads + kv_head) * head_dim;
  }
  __device__ i64 values() const { return block_tokens * num_kv_heads * head_dim; }
};

__device__ inline int positions_of_a_split(int context) {
  int size = SPLIT;
  while (size * MAX_SPLITS < context) size *= 2;
  return size;
}
