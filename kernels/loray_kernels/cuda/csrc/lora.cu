// Gathered LoRA (MBGMV) for tokens whose adapter has few of them in the step: rows are read in place from the pool.
//
// An item is (adapter, first token, number of tokens up to TOKENS). Each token's sums have the same elements in the same
// order whatever its neighbours. h = A x is fp32 between the two kernels.
#include "device.cuh"

constexpr int TOKENS = 4;   // of one adapter, which share the reading of its rows
constexpr int WARPS = 4;    // shrink: one row of A for each
constexpr int THREADS = 64; // expand: two columns for each
constexpr int RANKS = 64;   // expand: rows whose h is in shared memory at once

// h[t, column[row]] = sum_k x[t, k] · A[row, k]. Rows of an adapter: all modules of the input, one after the other.
// Grid (items, ceil(most rows of an adapter / WARPS)), WARPS × 32 threads.
template <class T>
__device__ void shrink(const T *x, i64 x_stride, const T *pool, const i64 *items, const i64 *row_start,
                       const i64 *offsets, i64 num_rows, const i64 *segments, i64 num_segments, const i64 *column,
                       float *h, i64 h_stride) {
  const i64 *item = items + 3 * blockIdx.x;
  const int lane = threadIdx.x % 32, count = static_cast<int>(item[2]);
  const i64 row = row_start[item[0]] + blockIdx.y * WARPS + threadIdx.x / 32;
  if (row >= row_start[item[0] + 1]) return;
  float sum[TOKENS] = {};
  for (i64 s = 0; s < num_segments; s++) {
    const i64 width = segments[2 * s + 1];
    const T *a = pool + offsets[s * num_rows + row];
    const T *from = x + item[1] * x_stride + segments[2 * s];
    const bool wide_a = aligned(a, 16), wide_x = aligned(from, 16) && x_stride * sizeof(T) % 16 == 0;
    for (i64 k = lane * 8; k < width; k += 256) {
      float weight[8];
      load(a + k, width - k, wide_a, weight);
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        if (t < count) {
          float value[8];
          load(from + t * x_stride + k, width - k, wide_x, value);
#pragma unroll
          for (int i = 0; i < 8; i++) sum[t] += value[i] * weight[i];
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const float total = warp_sum(sum[t]);
    if (lane == 0 && t < count) h[(item[1] + t) * h_stride + column[row]] = total;
  }
}

// y[t, o] += scale · sum_r h[t, r] · B[r, o], rounded once. A tile is (module, where its rows' offsets start, first
// column in the segment, first column in y, columns). Grid (items, tiles of all modules of the input), THREADS threads.
template <class T>
__device__ void expand(T *y0, T *y1, T *y2, i64 stride0, i64 stride1, i64 stride2, const float *h, i64 h_stride,
                       const T *pool, const i64 *items, const i64 *tiles, const i64 *offsets, const i64 *rank_start,
                       i64 num_adapters, const float *scale, const i64 *h_column) {
  __shared__ float h_shared[TOKENS][RANKS];
  __shared__ i64 at[RANKS];
  const i64 *item = items + 3 * blockIdx.x, *tile = tiles + 5 * blockIdx.y;
  const i64 adapter = item[0], first = item[1], module = tile[0];
  const int count = static_cast<int>(item[2]), column = 2 * threadIdx.x;
  const i64 *start = rank_start + module * (num_adapters + 1) + adapter;
  const int rank = static_cast<int>(start[1] - start[0]);
  if (rank == 0) return;
  float sum[TOKENS][2] = {};
  for (int r0 = 0; r0 < rank; r0 += RANKS) {
    const int n = min(RANKS, rank - r0);
    __syncthreads();
    for (int r = threadIdx.x; r < n; r += THREADS) {
      at[r] = offsets[tile[1] + start[0] + r0 + r] + tile[2];
      for (int t = 0; t < count; t++) h_shared[t][r] = h[(first + t) * h_stride + h_column[module] + r0 + r];
    }
    __syncthreads();
    if (column < tile[4]) {
#pragma unroll 8
      for (int r = 0; r < n; r++) {
        const T *row = pool + at[r] + column;
        float b[2];
        load(row, tile[4] - column, aligned(row, 2 * sizeof(T)), b);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
          if (t < count) {
            sum[t][0] += h_shared[t][r] * b[0];
            sum[t][1] += h_shared[t][r] * b[1];
          }
        }
      }
    }
  }
  const float s = scale[module * num_adapters + adapter];
  T *y = module == 0 ? y0 : module == 1 ? y1 : y2;
  const i64 stride = module == 0 ? stride0 : module == 1 ? stride1 : stride2;
  y += first * stride + tile[3] + column;
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    for (int i = 0; i < 2; i++) {
      if (t < count && column + i < tile[4]) {
        T *to = y + t * stride + i;
        store(to, to_float(*to) + s * sum[t][i]);
      }
    }
  }
}

#define LORAY_DEFINE(suffix, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) lora_shrink_##suffix(                                       \
      const T *x, i64 x_stride, const T *pool, const i64 *items, const i64 *row_start, const i64 *offsets,             \
      i64 num_rows, const i64 *segments, i64 num_segments, const i64 *column, float *h, i64 h_stride) {                \
    shrink<T>(x, x_stride, pool, items, row_start, offsets, num_rows, segments, num_segments, column, h, h_stride);    \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS) lora_expand_##suffix(                                          \
      T *y0, T *y1, T *y2, i64 stride0, i64 stride1, i64 stride2, const float *h, i64 h_stride, const T *pool,         \
      const i64 *items, const i64 *tiles, const i64 *offsets, const i64 *rank_start, i64 num_adapters,                 \
      const float *scale, const i64 *h_column) {                                                                       \
    expand<T>(y0, y1, y2, stride0, stride1, stride2, h, h_stride, pool, items, tiles, offsets, rank_start,             \
              num_adapters, scale, h_column);                                                                          \
  }                                                                                                                    \
  LORAY_EXPORT(lora_shrink_##suffix)                                                                                   \
  LORAY_EXPORT(lora_expand_##suffix)

LORAY_DEFINE(bf16, bf16)
LORAY_DEFINE(fp16, fp16)
LORAY_DEFINE(fp32, float)
