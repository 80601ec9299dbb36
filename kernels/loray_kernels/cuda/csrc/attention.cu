// Paged attention for sequences with one query (split-K flash decoding, Dao et al., 2023) over the pool's KV blocks:
// `attention_decode` for any type, head and block, `attention_tensor64` and `128` on tensor cores.
#include "splits.cuh"
#include "tensor.cuh"

constexpr int HEAD = 256; // largest head dimension; multiples of 8
constexpr int LANES = 8;  // that share a key
constexpr int DECODE_BLOCKS = 5; // on a multiprocessor, at least: up to 96 registers, of which none is spilled
constexpr int TENSOR_BLOCKS = 2; // likewise: up to 255

// Grid (sequences, KV heads × ceil(group / GROUP), splits). With one split `out` is final; else partial sums, their
// maxima and weights go to `partial` (sequence, split, head, d + 2) in fp32, where each thread adds to its own columns.
template <class T>
__device__ void decode(const T *q, i64 q_stride, T *out, const T *pool, Cache cache, i64 group, const i64 *items,
                       const i64 *context_len, const i64 *table_start, const i64 *blocks, float scale,
                       float *partial) {
  __shared__ float q_shared[GROUP][HEAD];
  __shared__ float score[GROUP][SPLIT];
  __shared__ float top[GROUP], weight[GROUP], factor[GROUP]; // factor: of what has been summed before
  __shared__ float part[THREADS * 4];
  const i64 sequence = items[2 * blockIdx.x], token = items[2 * blockIdx.x + 1];
  const int context = static_cast<int>(context_len[sequence]), size = positions_of_a_split(context);
  const int start = static_cast<int>(blockIdx.z) * size, count = min(size, context - start);
  const int d = static_cast<int>(cache.head_dim), num_kv = static_cast<int>(cache.num_kv_heads), tid = threadIdx.x;
  const int kv_head = blockIdx.y % num_kv, first = blockIdx.y / num_kv * GROUP, of_kv = static_cast<int>(group);
  const int heads = min(GROUP, of_kv - first), num_heads = num_kv * of_kv, head = kv_head * of_kv + first;
  const bool whole = context <= SPLIT;
  if (count <= 0 && !(context == 0 && start == 0)) return;
  blocks += table_start[sequence];

  for (int i = tid; i < heads * d; i += THREADS)
    q_shared[i / d][i % d] = to_float(q[token * q_stride + head * d + i]) * scale;
  __syncthreads();

  const bool wide = aligned(pool, 16) && d % 8 == 0 && cache.block_stride * sizeof(T) % 16 == 0;
  int done = 0; // positions of this split
  do {
    const int n = min(SPLIT, count - done), begin = start + done;
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
      const float before = done ? top[g] : largest;
      largest = fmaxf(largest, before);
      for (int j = tid % 32; j < n; j += 32) {
        score[g][j] = expf(score[g][j] - largest);
        sum += score[g][j];
      }
      sum = warp_sum(sum);
      if (tid % 32 == 0) {
        factor[g] = expf(before - largest);
        weight[g] = done ? weight[g] * factor[g] + sum : sum;
        top[g] = largest;
      }
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
          const i64 place = (blockIdx.x * static_cast<i64>(gridDim.z) + blockIdx.z) * num_heads + head + g;
          float *own = partial + place * (d + 2);
          own[e] = done ? own[e] * factor[g] + total : total;
          if (e == 0) own[d] = top[g], own[d + 1] = weight[g];
        }
      }
    }
    done += SPLIT;
  } while (done < count);
}

// Merges the splits of sequences that have several. Grid (sequences, heads).
template <class T>
__device__ void combine(T *out, const float *partial, i64 max_splits, i64 head_dim, const i64 *items,
                        const i64 *context_len) {
  const i64 token = items[2 * blockIdx.x + 1], stride = gridDim.y * (head_dim + 2);
  const int context = static_cast<int>(context_len[items[2 * blockIdx.x]]);
  const int size = positions_of_a_split(context), num_splits = (context + size - 1) / size;
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

#define LORAY_DEFINE_TENSOR(D, suffix, T)                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS, TENSOR_BLOCKS) attention_tensor##D##_##suffix(                 \
      const T *q, i64 q_stride, T *out, const T *pool, i64 block_stride, i64 block_tokens, i64 num_kv_heads,           \
      i64 head_dim, i64 group, const i64 *items, const i64 *context_len, const i64 *table_start, const i64 *blocks,    \
      float scale, float *partial) {                                                                                   \
    decode_by_tensors<T, D>(q, q_stride, out, pool, Cache{block_stride, block_tokens, num_kv_heads, head_dim}, group,  \
                            items, context_len, table_start, blocks, scale, partial);                                  \
  }                                                                                                                    \
  LORAY_EXPORT(attention_tensor##D##_##suffix)

LORAY_DEFINE(bf16, bf16)
LORAY_DEFINE(fp16, fp16)
LORAY_DEFINE(fp32, float)
LORAY_DEFINE_TENSOR(64, bf16, bf16)
LORAY_DEFINE_TENSOR(128, bf16, bf16)
LORAY_DEFINE_TENSOR(64, fp16, fp16)
LORAY_DEFINE_TENSOR(128, fp16, fp16)
