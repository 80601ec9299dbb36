// What the kernels of paged attention with one query share: where keys and values are, how they are split, which block
// computes which split, and how the splits of a sequence are merged.
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

  // The scale of a key, or of a value; fp32 behind keys and values that are int8, each (KV head, position).
  template <class Q> __device__ float scale(const Q *, const i64 *, i64, i64, bool) const { return 1.0f; }
  __device__ float scale(const signed char *pool, const i64 *blocks, i64 position, i64 kv_head, bool of_value) const {
    const signed char *scales = pool + blocks[position / block_tokens] * block_stride + 2 * values();
    const i64 row = of_value ? num_kv_heads + kv_head : kv_head;
    return reinterpret_cast<const float *>(scales)[row * block_tokens + position % block_tokens];
  }
};

// How a score becomes what the softmax takes. A query sees the last `window` keys up to its own, or all (0); a score s,
// scaled, is cap · tanh(s / cap), where there is a cap.
struct Scoring {
  float scale;
  i64 window;
  float cap;
  __device__ float capped(float scaled) const { return cap > 0.0f ? cap * tanhf(scaled / cap) : scaled; }
  __device__ int first(int context) const { return window ? max(0, context - static_cast<int>(window)) : 0; }
};

__device__ inline int positions_of_a_split(int context) {
  int size = SPLIT;
  while (size * MAX_SPLITS < context) size *= 2;
  return size;
}
__device__ inline int num_splits(int context) {
  const int size = positions_of_a_split(context);
  return max(1, (context + size - 1) / size);
}

// Splits of a sequence that are wholly behind the window, and are not there.
__device__ inline int splits_behind(int context, const Scoring &scoring) {
  return scoring.first(context) / positions_of_a_split(context);
}

// The splits that a launch computes, in each of its blocks of the same blockIdx.y once: splits[starts[0]] to
// splits[starts[1]], as `plan` has written them: sequence · MAX_SPLITS + split, those of a sequence one after another.
// Places of partial sums are counted from `first`.
struct Work {
  const i64 *starts, *splits;
  i64 first;
};
struct Split {
  i64 sequence;
  int number;
  i64 place;
};

// Calls compute(Split) for this block's share of the work.
template <class Compute> __device__ inline void for_each_split(const Work &work, Compute compute) {
  for (i64 w = work.starts[0] + blockIdx.x; w < work.starts[1]; w += gridDim.x) {
    const int word = static_cast<int>(work.splits[w]);
    compute(Split{word / MAX_SPLITS, word % MAX_SPLITS, w - work.first});
    __syncthreads(); // the next one uses the same shared memory
  }
}

// Whether this block is the last of `num` that have written partial sums of a sequence, which it may read then. Counts
// in `arrived`, which is zero before and afterwards.
__device__ inline bool is_last(int *arrived, int num) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(arrived, 1) == num - 1;
    if (last) *arrived = 0;
  }
  __syncthreads();
  __threadfence();
  return last;
}

// out (heads, d) of partial sums, `stride` from split to split: for each head d sums, their maximum and their weight.
template <class T>
__device__ inline void merge(T *out, const float *partial, int num, i64 stride, int heads, int d) {
  for (int i = threadIdx.x; i < heads * d; i += THREADS) {
    const float *own = partial + i / d * (d + 2);
    const int column = i % d;
    float top = LOWEST, sum = 0.0f, weight = 0.0f;
    for (int s = 0; s < num; s++) top = fmaxf(top, own[s * stride + d]);
    for (int s = 0; s < num; s++) {
      const float factor = expf(own[s * stride + d] - top);
      sum += factor * own[s * stride + column];
      weight += factor * own[s * stride + d + 1];
    }
    store(out + i, sum / weight);
  }
}
