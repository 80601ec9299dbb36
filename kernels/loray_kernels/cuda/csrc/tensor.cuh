// Decode attention on tensor cores, for bf16 and fp16: heads of D = 64 or 128, blocks of a multiple of 16 positions.
//
// A warp takes 16 keys at a time, with a softmax of its own (online, as FlashAttention-2 has it); the block's four warps
// are merged at the end. Products are mma.m16n8k16: its 16 rows are GROUP heads and zeros, so that the weights of the
// keys, as the first product leaves them in registers, are what the second takes. Which element of a head is which k
// of the first product, and which column of the second, is free: chosen so that each thread reads 16 bytes at once and
// nothing passes through shared memory before the end.
#pragma once
#include "splits.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int KEYS = 16; // of a warp at a time

#define LORAY_MMA(type)                                                                                                \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "   \
               "{%0,%1,%2,%3};"                                                                                        \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                        \
               : "r"(a0), "r"(0), "r"(a2), "r"(0), "r"(b0), "r"(b1))

// c += a · b, where rows 8 to 15 of a are zero: a (heads, 16 k) in two registers, b (16 k, 8) in two.
template <class T> __device__ inline void multiply(float (&c)[4], unsigned a0, unsigned a2, unsigned b0, unsigned b1) {
#ifdef LORAY_SHIM
  shim::multiply<T>(c, {a0, 0, a2, 0, b0, b1});
#else
  if constexpr (is_bf16(T{}))
    LORAY_MMA("bf16");
  else
    LORAY_MMA("f16");
#endif
}

template <class T> __device__ inline unsigned pack(float low, float high) {
  T pair[2];
  store(&pair[0], low), store(&pair[1], high);
  return pair[0].bits | static_cast<unsigned>(pair[1].bits) << 16;
}
// The element of index `odd` of two words: (of a, of b).
__device__ inline unsigned pair(unsigned a, unsigned b, int odd) {
  return odd ? a >> 16 | (b & 0xffff0000u) : (a & 0xffffu) | b << 16;
}

template <class T> __device__ inline uint4 eight(const T *p, bool wide) {
  if (wide) return *reinterpret_cast<const uint4 *>(p);
  unsigned word[4];
#pragma unroll
  for (int i = 0; i < 4; i++) word[i] = p[2 * i].bits | static_cast<unsigned>(p[2 * i + 1].bits) << 16;
  return uint4{word[0], word[1], word[2], word[3]};
}

// Reduces over the four threads that have the same head.
__device__ inline float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// Grid, `out` and `partial` as of `decode`. The pool and its strides are aligned to 16 bytes.
template <class T, int D>
__device__ void decode_by_tensors(const T *q, i64 q_stride, T *out, const T *pool, Cache cache, i64 group,
                                  const i64 *items, const i64 *context_len, const i64 *table_start, const i64 *blocks,
                                  Scoring scoring, float *partial, int *arrived, Split split) {
  __shared__ float2 sums[WARPS][GROUP][D / 2 + 4]; // as the threads have them; 4 more, so that no bank has two heads
  __shared__ float tops[WARPS][GROUP], weights[WARPS][GROUP];
  const i64 sequence = items[2 * split.sequence], token = items[2 * split.sequence + 1];
  const int context = static_cast<int>(context_len[sequence]), size = positions_of_a_split(context);
  const int stop = min((split.number + 1) * size, context), behind = scoring.first(context);
  const int start = max(split.number * size, behind / KEYS * KEYS);
  const int num_kv = static_cast<int>(cache.num_kv_heads), of_kv = static_cast<int>(group);
  const int kv_head = blockIdx.y % num_kv, first = blockIdx.y / num_kv * GROUP;
  const int heads = min(GROUP, of_kv - first), num_heads = num_kv * of_kv, head = kv_head * of_kv + first;
  const int tid = threadIdx.x, warp = tid / 32, row = tid % 32 / 4, quarter = tid % 4;
  const int block_tokens = static_cast<int>(cache.block_tokens), key_stride = num_kv * D;
  blocks += table_start[sequence];

  uint4 query[D / 32]; // of the thread's head: the elements 32 s + 8 quarter to + 8
  const bool wide = aligned(q, 16) && q_stride % 8 == 0;
#pragma unroll
  for (int s = 0; s < D / 32; s++)
    query[s] = row < heads ? eight(q + token * q_stride + (head + row) * D + 32 * s + 8 * quarter, wide) : uint4{};

  float sum[D / 8][4] = {}, top = LOWEST, weight = 0.0f; // weight: of this thread's keys
  for (int begin = start + warp * KEYS; begin < stop; begin += WARPS * KEYS) {
    const int block = begin / block_tokens, place = begin - block * block_tokens;
    const T *keys = pool + blocks[block] * cache.block_stride + (place * num_kv + kv_head) * D;
    const T *values = keys + cache.values() + 8 * row;
    const int left = stop - begin;

    bool exists[4];
    uint4 key[2][D / 32], value[4][D / 64]; // keys row, row + 8; values of keys 2 quarter, + 1, + 8, + 9
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int s = 0; s < D / 32; s++)
        key[half][s] = *reinterpret_cast<const uint4 *>(keys + (row + 8 * half) * key_stride + 32 * s + 8 * quarter);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int own = 2 * quarter + i % 2 + i / 2 * 8;
      exists[i] = own < left && begin + own >= behind;
#pragma unroll
      for (int t = 0; t < D / 64; t++) // what is behind the last key may be no number
        value[i][t] = exists[i] ? *reinterpret_cast<const uint4 *>(values + own * key_stride + 64 * t) : uint4{};
    }

    __syncwarp();
    float score[2][4] = {}; // of the thread's head: keys 2 quarter, + 1; in the second + 8, + 9
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int s = 0; s < D / 32; s++) {
        multiply<T>(score[half], query[s].x, query[s].y, key[half][s].x, key[half][s].y);
        multiply<T>(score[half], query[s].z, query[s].w, key[half][s].z, key[half][s].w);
      }
    float share[4], largest = top;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      share[i] = exists[i] ? scoring.capped(score[i / 2][i % 2] * scoring.scale) : LOWEST;
      largest = fmaxf(largest, share[i]);
    }
    largest = quad_max(largest);
    const float factor = expf(top - largest);
    weight *= factor;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      share[i] = exists[i] ? expf(share[i] - largest) : 0.0f;
      weight += share[i];
    }
    top = largest;

    const unsigned shares[2] = {pack<T>(share[0], share[1]), pack<T>(share[2], share[3])};
#pragma unroll
    for (int t = 0; t < D / 64; t++) {
      const unsigned word[4][4] = {{value[0][t].x, value[0][t].y, value[0][t].z, value[0][t].w},
                                   {value[1][t].x, value[1][t].y, value[1][t].z, value[1][t].w},
                                   {value[2][t].x, value[2][t].y, value[2][t].z, value[2][t].w},
                                   {value[3][t].x, value[3][t].y, value[3][t].z, value[3][t].w}};
#pragma unroll
      for (int i = 0; i < 8; i++) { // column n of this product is the element 64 t + 8 n + i
        float(&own)[4] = sum[8 * t + i];
        own[0] *= factor, own[1] *= factor;
        multiply<T>(own, shares[0], shares[1], pair(word[0][i / 2], word[1][i / 2], i % 2),
                    pair(word[2][i / 2], word[3][i / 2], i % 2));
      }
    }
  }

  weight = quad_sum(weight);
  if (quarter == 0) tops[warp][row] = top, weights[warp][row] = weight;
  if (row < heads) {
#pragma unroll
    for (int n = 0; n < D / 8; n++) sums[warp][row][4 * n + quarter] = float2{sum[n][0], sum[n][1]};
  }
  __syncthreads();

  for (int e = tid; e < heads * D; e += THREADS) {
    const int g = e / D, column = e % D, place = (column / 64 * 8 + column % 8) * 8 + column % 64 / 8;
    float largest = LOWEST, total = 0.0f, whole = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, tops[w][g]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float factor = expf(tops[w][g] - largest);
      const float2 two = sums[w][g][place / 2];
      total += factor * (place % 2 ? two.y : two.x), whole += factor * weights[w][g];
    }
    if (context <= SPLIT) {
      store(out + (token * num_heads + head + g) * D + column, context ? total / whole : 0.0f);
    } else {
      float *own = partial + (split.place * num_heads + head + g) * (D + 2);
      own[column] = total;
      if (column == 0) own[D] = largest, own[D + 1] = whole;
    }
  }
  const int gone = splits_behind(context, scoring), num = num_splits(context) - gone;
  if (context <= SPLIT || !is_last(arrived + split.sequence * gridDim.y + blockIdx.y, num)) return;
  partial += ((split.place - split.number + gone) * num_heads + head) * (D + 2);
  merge(out + (token * num_heads + head) * D, partial, num, num_heads * (D + 2), heads, D);
}
