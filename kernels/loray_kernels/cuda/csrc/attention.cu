// Paged attention for sequences with one query (split-K flash decoding, Dao et al., 2023) over the pool's KV blocks.
//
// A sequence's keys are split every SPLIT positions in any batch, so its result does not depend on other sequences.
// GROUP query heads of one KV head share the reading of its keys and values. K and V of a position are in one block of
// the pool: (K or V, position, KV head, d) within the layer's share.
#include "device.cuh"

constexpr int THREADS = 128;
constexpr int SPLIT = 256;
constexpr int GROUP = 8;
constexpr int HEAD = 256; // largest head dimension; multiples of 8
constexpr int LANES = 8;  // that share a key
constexpr int DECODE_BLOCKS = 5; // on a multiprocessor, at least: up to 96 registers, of which none is spilled

struct Cache {
  i64 block_stride, block_tokens, num_kv_heads, head_dim;
  __device__ i64 at(const i64 *blocks, i64 position, i64 kv_head) const {
    const i64 row = blocks[position / block_tokens] * block_stride;
    return row + (position % block_tokens * num_kv_heads + kv_head) * head_dim;
  }
  __device__ i64 values() const { return block_tokens * num_kv_heads * head_dim; }
};

// Grid (sequences, KV heads × ceil(group / GROUP), splits). With one split `out` is final; else partial sums, their
// maxima and weights go to `partial` (sequence, split, head, d + 2) in fp32.
template <class T>
__device__ void decode(const T *q, i64 q_stride, T *out, const T *pool, Cache cache, i64 group, const i64 *items,
                       const i64 *context_len, const i64 *table_start, const i64 *blocks, float scale,
                       float *partial) {
  __shared__ float q_shared[GROUP][HEAD];
  __shared__ float score[GROUP][SPLIT];
  __shared__ float top[GROUP], weight[GROUP];
  __shared__ float part[THREADS * 4];
  const i64 sequence = items[2 * blockIdx.x], token = items[2 * blockIdx.x + 1];
  const i64 context = context_len[sequence], begin = static_cast<i64>(blockIdx.z) * SPLIT;
  const i64 kv_head = blockIdx.y % cache.num_kv_heads, first = blockIdx.y / cache.num_kv_heads * GROUP;
  const int d = static_cast<int>(cache.head_dim), n = static_cast<int>(min(static_cast<i64>(SPLIT), context - begin));
  const int heads = static_cast<int>(min(static_cast<i64>(GROUP), group - first)), tid = threadIdx.x;
  const i64 num_heads = cache.num_kv_heads * group, head = kv_head * group + first;
  const bool whole = context <= SPLIT;
  if (n <= 0 && !(context == 0 && begin == 0)) return;
  blocks += table_start[sequence];

  for (int i = tid; i < heads * d; i += THREADS)
    q_shared[i / d][i % d] = to_float(q[token * q_stride + head * d + i]) * scale;
  __syncthreads();

  const bool wide = aligned(pool, 16) && d % 8 == 0 && cache.block_stride * sizeof(T) % 16 == 0;
  for (int j0 = 0; j0 < n; j0 += THREADS / LANES) { // all lanes of a warp take part in every turn, for the shuffles
    const int j = j0 + tid / LANES, lane = tid % LANES;
    float sum[GROUP] = {};
    if (j < n) {
      const T *k = pool + cache.at(blocks, begin + j, kv_head);
      for (int c = lane * 8; c < d; c += LANES * 8) {
        float key[8];
        load(k + c, d - c, wide, key);
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
          if (g < heads) {
#pragma unroll
            for (int i = 0; i < 8; i++) sum[g] += q_shared[g][c + i] * key[i];
          }
        }
      }
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      for (int mask = LANES / 2; mask; mask >>= 1) sum[g] += __shfl_xor_sync(0xffffffffu, sum[g], mask);
      if (lane == 0 && j < n && g < heads) score[g][j] = sum[g];
    }
  }
  __syncthreads();

  for (int g = tid / 32; g < heads; g += THREADS / 32) {
    float largest = LOWEST, sum = 0.0f;
    for (int j = tid % 32; j < n; j += 32) largest = fmaxf(largest, score[g][j]);
    largest = warp_max(largest);
    for (int j = tid % 32; j < n; j += 32) {
      score[g][j] = expf(score[g][j] - largest);
      sum += score[g][j];
    }
    sum = warp_sum(sum);
    if (tid % 32 == 0) top[g] = largest, weight[g] = sum;
  }
  __syncthreads();

  // Each thread has four columns of V; threads with the same columns divide the positions among them.
  const int columns = d / 4, turns = THREADS / columns, turn = tid / columns, c = tid % columns * 4;
  float sum[GROUP][4] = {};
  if (turn < turns) {
    for (int j = turn; j < n; j += turns) {
      const T *v = pool + cache.at(blocks, begin + j, kv_head) + cache.values() + c;
      float value[4];
      load(v, 4, wide, value);
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
        if (g < heads) {
#pragma unroll
          for (int i = 0; i < 4; i++) sum[g][i] += score[g][j] * value[i];
        }
      }
    }
  }
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    if (g >= heads) break;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) part[tid * 4 + i] = sum[g][i];
    __syncthreads();
    for (int e = tid; e < d; e += THREADS) {
      float total = 0.0f;
      for (int t = 0; t < turns; t++) total += part[t * d + e];
      if (whole) {
        store(out + (token * num_heads + head + g) * d + e, n > 0 ? total / weight[g] : 0.0f);
      } else {
        float *own = partial + ((blockIdx.x * static_cast<i64>(gridDim.z) + blockIdx.z) * num_heads + head + g) * (d + 2);
        own[e] = total;
        if (e == 0) own[d] = top[g], own[d + 1] = weight[g];
      }
    }
  }
}

// Merges the splits of sequences that have several. Grid (sequences, heads).
template <class T>
__device__ void combine(T *out, const float *partial, i64 max_splits, i64 head_dim, const i64 *items,
                        const i64 *context_len) {
  const i64 context = context_len[items[2 * blockIdx.x]], token = items[2 * blockIdx.x + 1];
  const i64 num_splits = (context + SPLIT - 1) / SPLIT, stride = gridDim.y * (head_dim + 2);
  if (num_splits < 2) return;
  partial += blockIdx.x * max_splits * stride + blockIdx.y * (head_dim + 2);
  float top = LOWEST;
  for (i64 s = 0; s < num_splits; s++) top = fmaxf(top, partial[s * stride + head_dim]);
  for (i64 e = threadIdx.x; e < head_dim; e += THREADS) {
    float sum = 0.0f, weight = 0.0f;
    for (i64 s = 0; s < num_splits; s++) {
      const float factor = expf(partial[s * stride + head_dim] - top);
      sum += factor * partial[s * stride + e];
      weight += factor * partial[s * stride + head_dim + 1];
    }
    store(out + (token * gridDim.y + blockIdx.y) * head_dim + e, sum / weight);
  }
}

#define LORAY_DEFINE(suffix, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS, DECODE_BLOCKS) attention_decode_##suffix(                      \
      const T *q, i64 q_stride, T *out, const T *pool, i64 block_stride, i64 block_tokens, i64 num_kv_heads,           \
      i64 head_dim, i64 group, const i64 *items, const i64 *context_len, const i64 *table_start, const i64 *blocks,    \
      float scale, float *partial) {                                                                                   \
    decode<T>(q, q_stride, out, pool, Cache{block_stride, block_tokens, num_kv_heads, head_dim}, group, items,         \
              context_len, table_start, blocks, scale, partial);                                                       \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      attention_combine_##suffix(T *out, const float *partial, i64 max_splits, i64 head_dim, const i64 *items,         \
                                 const i64 *context_len) {                                                             \
    combine<T>(out, partial, max_splits, head_dim, items, context_len);                                                \
  }                                                                                                                    \
  LORAY_EXPORT(attention_decode_##suffix)                                                                              \
  LORAY_EXPORT(attention_combine_##suffix)

LORAY_DEFINE(bf16, bf16)
LORAY_DEFINE(fp16, fp16)
LORAY_DEFINE(fp32, float)
