// VeRA in captured decode steps: y += b ⊙ (B (d ⊙ (A x))), with A and B of a pair that several adapters share, and each
// token's own d and b.
//
// An item is (where the words of a pair are in `directory`, first token, number of tokens up to TOKENS); padding has no
// tokens. A pair's words: where A (rank, row) and B (any, rank) begin in the pool, rank, row. `rows` has for each word
// of a layer's block and each token of the step where that vector is in the layer, or −1. z = A x is fp32.
#include "device.cuh"

constexpr int TOKENS = 4;    // that share the reading of a pair
constexpr int WARPS = 4;     // shrink: one row of A for each
constexpr int THREADS = 128; // expand
constexpr int LANES = 8;     // that share a row of B
constexpr int RANK = 1024;   // the most of a pair

// Grid (items, any), WARPS × 32 threads: warps take further rows by turns. `words`: of each module's d.
template <class T>
__device__ void recorded_shrink(const T *x, i64 x_stride, i64 width, const T *pool, const i64 *items,
                                const i64 *directory, const i64 *rows, i64 num_tokens, const i64 *words,
                                i64 num_modules, float *z, i64 z_stride) {
  const i64 *item = items + 3 * blockIdx.x, *pair = directory + item[0];
  const int count = static_cast<int>(item[2]);
  bool any = false;
  for (i64 m = 0; m < num_modules; m++)
    for (int t = 0; t < count; t++) any = any || rows[words[m] * num_tokens + item[1] + t] >= 0;
  if (!any) return;
  for (i64 row = blockIdx.y * WARPS + threadIdx.x / 32; row < pair[2]; row += gridDim.y * WARPS) {
    float sum[TOKENS] = {};
    add_products(pool + pair[0] + row * pair[3], x + item[1] * x_stride, x_stride, width, count, sum);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const float total = warp_sum(sum[t]);
      if (threadIdx.x % 32 == 0 && t < count) z[(item[1] + t) * z_stride + row] = total;
    }
  }
}

// y[t, o] += b[t, o] · Σ_r B[o, r] · (d[t, r] · z[t, r]), the inner product rounded to T. A tile is (d's word, b's word,
// first column in b's segment, first row of B, first column in y, columns). Grid (items, tiles), THREADS threads.
template <class T>
__device__ void recorded_expand(T *y, i64 y_stride, const float *z, i64 z_stride, const T *pool, const T *layer,
                                const i64 *items, const i64 *directory, const i64 *rows, i64 num_tokens,
                                const i64 *tiles) {
  __shared__ float hidden[TOKENS][RANK];
  const i64 *item = items + 3 * blockIdx.x, *tile = tiles + 6 * blockIdx.y, *pair = directory + item[0];
  const i64 first = item[1], *d_at = rows + tile[0] * num_tokens + first, *b_at = rows + tile[1] * num_tokens + first;
  const int count = static_cast<int>(item[2]);
  bool any = false;
  for (int t = 0; t < count; t++) any = any || d_at[t] >= 0;
  if (!any) return;
  const int rank = static_cast<int>(pair[2]), padded = (rank + 7) / 8 * 8;
  for (int t = 0; t < count; t++) {
    for (int r = threadIdx.x; r < padded; r += THREADS) {
      T rounded = {};
      if (r < rank && d_at[t] >= 0) store(&rounded, z[(first + t) * z_stride + r] * to_float(layer[d_at[t] + r]));
      hidden[t][r] = to_float(rounded);
    }
  }
  __syncthreads();
  const int lane = threadIdx.x % LANES;
  for (int c0 = 0; c0 < tile[5]; c0 += THREADS / LANES) { // all lanes of a warp take part, for the shuffles
    const int c = c0 + threadIdx.x / LANES;
    float sum[TOKENS] = {};
    if (c < tile[5]) {
      const T *row = pool + pair[1] + (tile[3] + c) * rank;
      const bool wide = aligned(row, 16);
      for (int r = lane * 8; r < rank; r += LANES * 8) {
        float weight[8];
        load(row + r, rank - r, wide, weight);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
          if (t < count) {
#pragma unroll
            for (int i = 0; i < 8; i++) sum[t] += hidden[t][r + i] * weight[i];
          }
        }
      }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      for (int mask = LANES / 2; mask; mask >>= 1) sum[t] += __shfl_xor_sync(0xffffffffu, sum[t], mask);
      if (lane == 0 && c < tile[5] && t < count && d_at[t] >= 0) {
        T *to = y + (first + t) * y_stride + tile[4] + c;
        store(to, to_float(*to) + sum[t] * to_float(layer[b_at[t] + tile[2] + c]));
      }
    }
  }
}

#define LORAY_DEFINE(suffix, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) vera_recorded_shrink_##suffix(                              \
      const T *x, i64 x_stride, i64 width, const T *pool, const i64 *items, const i64 *directory, const i64 *rows,     \
      i64 num_tokens, const i64 *words, i64 num_modules, float *z, i64 z_stride) {                                     \
    recorded_shrink<T>(x, x_stride, width, pool, items, directory, rows, num_tokens, words, num_modules, z, z_stride); \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS) vera_recorded_expand_##suffix(                                 \
      T *y, i64 y_stride, const float *z, i64 z_stride, const T *pool, const T *layer, const i64 *items,               \
      const i64 *directory, const i64 *rows, i64 num_tokens, const i64 *tiles) {                                       \
    recorded_expand<T>(y, y_stride, z, z_stride, pool, layer, items, directory, rows, num_tokens, tiles);              \
  }                                                                                                                    \
  LORAY_EXPORT(vera_recorded_shrink_##suffix)                                                                          \
  LORAY_EXPORT(vera_recorded_expand_##suffix)

LORAY_DEFINE(bf16, bf16)
LORAY_DEFINE(fp16, fp16)
LORAY_DEFINE(fp32, float)
