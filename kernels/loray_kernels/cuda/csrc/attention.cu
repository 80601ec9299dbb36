// Paged attention for sequences with one query (split-K flash decoding, Dao et al., 2023) over the pool's KV blocks:
// `attention_decode` for any type, head and block, `attention_int8` for keys and values that are int8, `attention_tensor64`
// and `128` on tensor cores. Once for all layers
// of a step `attention_plan` writes which splits there are, so that no block is launched for one that is not there.
#include "splits.cuh"
#include "tensor.cuh"

constexpr int HEAD = 256; // largest head dimension; multiples of 8
constexpr int LANES = 8;  // that share a key
// Blocks on a multiprocessor, at least: of up to 96 registers, of which none is spilled; for Blackwell the compiler takes more.
#if __CUDA_ARCH__ >= 1000
constexpr int DECODE_BLOCKS = 4;
#else
constexpr int DECODE_BLOCKS = 5;
#endif
constexpr int TENSOR_BLOCKS = 2; // likewise: up to 255

// `v`, of which the compiler knows nothing: it computes what follows from it where that is used. Without it, it holds in
// registers through all splits what is equal for them, and spills others; not so for sm_100, where it is the reverse.
__device__ inline int opaque(int v) {
#if !defined(LORAY_SHIM) && __CUDA_ARCH__ < 1000
  asm volatile("" : "+r"(v));
#endif
  return v;
}

// One split. Grid (any, KV heads × ceil(group / GROUP)). Of a sequence of one split `out` is final; else partial sums,
// their maxima and weights go to `partial` (place, head, d + 2) in fp32, where each thread adds to its own columns, and
// the last block to come merges them.
template <class T, class Q>
__device__ void decode(const T *q, i64 q_stride, T *out, const Q *pool, Cache cache, i64 group, const i64 *items,
                       const i64 *context_len, const i64 *table_start, const i64 *blocks, Scoring scoring,
                       float *partial, int *arrived, Split split) {
  __shared__ float q_shared[GROUP][HEAD];
  __shared__ float score[GROUP][SPLIT];
  __shared__ float top[GROUP], weight[GROUP], factor[GROUP]; // factor: of what has been summed before
  __shared__ float part[THREADS * 4];
  const i64 sequence = items[2 * split.sequence], token = items[2 * split.sequence + 1];
  const int context = static_cast<int>(context_len[sequence]), size = positions_of_a_split(context);
  const int stop = min((split.number + 1) * size, context), start = max(split.number * size, scoring.first(context));
  const int count = stop - start;
  const int d = static_cast<int>(cache.head_dim), num_kv = static_cast<int>(cache.num_kv_heads);
  const int kv_head = blockIdx.y % num_kv, first = blockIdx.y / num_kv * GROUP, of_kv = static_cast<int>(group);
  const int heads = min(GROUP, of_kv - first), num_heads = num_kv * of_kv, head = kv_head * of_kv + first;
  const int tid = opaque(threadIdx.x);
  const bool whole = context <= SPLIT;
  blocks += table_start[sequence];

  for (int i = tid; i < heads * d; i += THREADS)
    q_shared[i / d][i % d] = to_float(q[token * q_stride + head * d + i]) * scoring.scale;
  __syncthreads();

  const bool wide = aligned(pool, 16) && d % 8 == 0 && cache.block_stride * sizeof(Q) % 16 == 0;
  int done = 0; // positions of this split
  do {
    const int n = min(SPLIT, count - done), begin = start + done;
    for (int j0 = 0; j0 < n; j0 += THREADS / LANES) { // all lanes of a warp take part in every turn, for the shuffles
      const int j = j0 + tid / LANES, lane = tid % LANES;
      float sum[GROUP] = {};
      if (j < n) {
        const Q *k = pool + cache.at(blocks, begin + j, kv_head);
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
        if (lane == 0 && j < n && g < heads)
          score[g][j] = scoring.capped(sum[g] * cache.scale(pool, blocks, begin + j, kv_head, false));
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
        const Q *v = pool + cache.at(blocks, begin + j, kv_head) + cache.values() + c;
        const float scale = cache.scale(pool, blocks, begin + j, kv_head, true);
        float value[4];
        load(v, 4, wide, value);
#pragma unroll
        for (int i = 0; i < 4; i++) value[i] *= scale;
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
      const int row = opaque(head + g);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 4; i++) part[tid * 4 + i] = sum[g][i];
      __syncthreads();
      for (int e = tid; e < d; e += THREADS) {
        float total = 0.0f;
        for (int t = 0; t < turns; t++) total += part[t * d + e];
        if (whole) {
          store(out + (token * num_heads + row) * d + e, n > 0 ? total / weight[g] : 0.0f);
        } else {
          float *own = partial + (split.place * num_heads + row) * (d + 2);
          own[e] = done ? own[e] * factor[g] + total : total;
          if (e == 0) own[d] = top[g], own[d + 1] = weight[g];
        }
      }
    }
    done += SPLIT;
  } while (done < count);
  const int behind = splits_behind(context, scoring), num = num_splits(context) - behind;
  if (whole || !is_last(arrived + split.sequence * gridDim.y + blockIdx.y, num)) return;
  partial += ((split.place - split.number + behind) * num_heads + head) * (d + 2);
  merge(out + (token * num_heads + head) * d, partial, num, num_heads * (d + 2), heads, d);
}

// The splits of `num` sequences, by one block, without those behind the window, and zeros for `arrived`. A launch has the
// sequences whose first split is in [launch · most, (launch + 1) · most); its splits begin at starts[launch], and end where
// those of the next begin.
__device__ inline void plan(const i64 *items, const i64 *context_len, i64 num, Scoring scoring, i64 most,
                            i64 num_launches, i64 *starts, i64 *splits, int *arrived, i64 num_arrived) {
  __shared__ int sum[THREADS];
  const int tid = threadIdx.x;
  for (i64 i = tid; i < num_arrived; i += THREADS) arrived[i] = 0;
  i64 before = 0; // splits of earlier sequences
  for (i64 first = 0; first < num; first += THREADS) {
    const i64 sequence = first + tid;
    const int context = sequence < num ? static_cast<int>(context_len[items[2 * sequence]]) : 0;
    const int behind = splits_behind(context, scoring), own = sequence < num ? num_splits(context) - behind : 0;
    sum[tid] = own;
    __syncthreads();
    for (int step = 1; step < THREADS; step *= 2) {
      const int more = tid >= step ? sum[tid - step] : 0;
      __syncthreads();
      sum[tid] += more;
      __syncthreads();
    }
    const i64 stop = before + sum[tid], start = stop - own;
    for (int s = 0; s < own; s++) splits[start + s] = sequence * MAX_SPLITS + behind + s;
    if (own)
      for (i64 launch = start / most + 1; launch * most <= stop; launch++) starts[launch] = stop;
    before += sum[THREADS - 1];
    __syncthreads();
  }
  if (tid) return;
  starts[0] = 0;
  for (i64 launch = before / most + 1; launch <= num_launches; launch++) starts[launch] = before;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_plan_fp32(const i64 *items, const i64 *context_len, i64 num, i64 window, i64 most, i64 num_launches,
                        i64 *starts, i64 *splits, int *arrived, i64 num_arrived) {
  plan(items, context_len, num, Scoring{1.0f, window, 0.0f}, most, num_launches, starts, splits, arrived, num_arrived);
}
LORAY_EXPORT(attention_plan_fp32)

#define LORAY_DEFINE(kind, suffix, T, Q)                                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS, DECODE_BLOCKS) attention_##kind##_##suffix(                    \
      const T *q, i64 q_stride, T *out, const Q *pool, i64 block_stride, i64 block_tokens, i64 num_kv_heads,           \
      i64 head_dim, i64 group, const i64 *items, const i64 *context_len, const i64 *table_start, const i64 *blocks,    \
      float scale, i64 window, float soft_cap, float *partial, const i64 *starts, const i64 *splits, i64 first,        \
      int *arrived) {                                                                                                  \
    for_each_split(Work{starts, splits, first}, [&](Split split) {                                                     \
      decode<T, Q>(q, q_stride, out, pool, Cache{block_stride, block_tokens, num_kv_heads, head_dim}, group, items,    \
                   context_len, table_start, blocks, Scoring{scale, window, soft_cap}, partial, arrived, split);       \
    });                                                                                                                \
  }                                                                                                                    \
  LORAY_EXPORT(attention_##kind##_##suffix)

#define LORAY_DEFINE_TENSOR(D, suffix, T)                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS, TENSOR_BLOCKS) attention_tensor##D##_##suffix(                 \
      const T *q, i64 q_stride, T *out, const T *pool, i64 block_stride, i64 block_tokens, i64 num_kv_heads,           \
      i64 head_dim, i64 group, const i64 *items, const i64 *context_len, const i64 *table_start, const i64 *blocks,    \
      float scale, i64 window, float soft_cap, float *partial, const i64 *starts, const i64 *splits, i64 first,        \
      int *arrived) {                                                                                                  \
    for_each_split(Work{starts, splits, first}, [&](Split split) {                                                     \
      decode_by_tensors<T, D>(q, q_stride, out, pool, Cache{block_stride, block_tokens, num_kv_heads, head_dim},       \
                              group, items, context_len, table_start, blocks, Scoring{scale, window, soft_cap},        \
                              partial, arrived, split);                                                                \
    });                                                                                                                \
  }                                                                                                                    \
  LORAY_EXPORT(attention_tensor##D##_##suffix)

LORAY_DEFINE(decode, bf16, bf16, bf16)
LORAY_DEFINE(decode, fp16, fp16, fp16)
LORAY_DEFINE(decode, fp32, float, float)
LORAY_DEFINE(int8, bf16, bf16, signed char)
LORAY_DEFINE(int8, fp16, fp16, signed char)
LORAY_DEFINE(int8, fp32, float, signed char)
LORAY_DEFINE_TENSOR(64, bf16, bf16)
LORAY_DEFINE_TENSOR(128, bf16, bf16)
LORAY_DEFINE_TENSOR(64, fp16, fp16)
LORAY_DEFINE_TENSOR(128, fp16, fp16)
