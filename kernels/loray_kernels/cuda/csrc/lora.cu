// Gathered LoRA (MBGMV) for tokens whose adapter has few of them in the step: rows are read in place from the pool.
//
// An item is (adapter, first token, number of tokens up to TOKENS). Each token's sums have the same elements in the same
// order whatever its neighbours. h = A x is fp32 between the two kernels.
#include "device.cuh"

constexpr int TOKENS = 4;   // of one adapter, which share the reading of its rows
constexpr int WARPS = 4;    // shrink: one row of A for each
constexpr int THREADS = 64; // expand: two columns for each
constexpr int RANKS = 64;   // expand: rows whose h is in shared memory at once
// On a multiprocessor, at least: up to 64 registers, of which none is spilled. Without them the compiler takes fewer.
constexpr int SHRINK_BLOCKS = 8, EXPAND_BLOCKS = 16;

// h[t, column] = sum_k x[t, k] · A[row, k], by one warp.
template <class T>
__device__ void shrink_row(const T *x, i64 x_stride, const T *pool, const i64 *item, i64 row, const i64 *offsets,
                           i64 num_rows, const i64 *segments, i64 num_segments, i64 column, float *h, i64 h_stride) {
  const int lane = threadIdx.x % 32, count = static_cast<int>(item[2]);
  float sum[TOKENS] = {};
  for (i64 s = 0; s < num_segments; s++) {
    const T *from = x + item[1] * x_stride + segments[2 * s];
    const i64 at = offsets[s * num_rows + row], width = segments[2 * s + 1];
    if (at >= 0) {
      add_products(pool + at, from, x_stride, width, count, sum);
    } else { // a row that is not in the pool, see ops.py
      const i64 period = ~at >> 32;
      for (i64 k = (~at & 0xffffffff) + lane * period; k < width; k += 32 * period)
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
          if (t < count) sum[t] += to_float(from[t * x_stride + k]);
    }
  }
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const float total = warp_sum(sum[t]);
    if (lane == 0 && t < count) h[(item[1] + t) * h_stride + column] = total;
  }
}

// Rows of an adapter: all modules of the input, one after the other.
// Grid (items, ceil(most rows of an adapter / WARPS)), WARPS × 32 threads.
template <class T>
__device__ void shrink(const T *x, i64 x_stride, const T *pool, const i64 *items, const i64 *row_start,
                       const i64 *offsets, i64 num_rows, const i64 *segments, i64 num_segments, const i64 *column,
                       float *h, i64 h_stride) {
  const i64 *item = items + 3 * blockIdx.x;
  const i64 row = row_start[item[0]] + blockIdx.y * WARPS + threadIdx.x / 32;
  if (row >= row_start[item[0] + 1]) return;
  shrink_row(x, x_stride, pool, item, row, offsets, num_rows, segments, num_segments, column[row], h, h_stride);
}

// y[t, o] += scale · sum_r h[t, h_column + r] · B[r, o], rounded once, for the columns of one tile, see `expand`.
// `offsets`: of the adapter's `rank` rows of B in the tile's segment.
template <class T>
__device__ void expand_tile(T *y, i64 stride, const float *h, i64 h_stride, i64 h_column, const T *pool,
                            const i64 *item, const i64 *tile, const i64 *offsets, int rank, float s) {
  __shared__ float h_shared[TOKENS][RANKS];
  __shared__ i64 at[RANKS];
  const i64 first = item[1];
  const int count = static_cast<int>(item[2]), column = 2 * threadIdx.x;
  float sum[TOKENS][2] = {};
  for (int r0 = 0; r0 < rank; r0 += RANKS) {
    const int n = min(RANKS, rank - r0);
    __syncthreads();
    for (int r = threadIdx.x; r < n; r += THREADS) {
      at[r] = offsets[r0 + r] + tile[2];
      for (int t = 0; t < count; t++) h_shared[t][r] = h[(first + t) * h_stride + h_column + r0 + r];
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

// The results of the up to three modules of an input.
template <class T> struct Outputs {
  T *y0, *y1, *y2;
  i64 stride0, stride1, stride2;
  __device__ T *of(i64 module) const { return module == 0 ? y0 : module == 1 ? y1 : y2; }
  __device__ i64 stride(i64 module) const { return module == 0 ? stride0 : module == 1 ? stride1 : stride2; }
};

// A tile is (module, where its rows' offsets start, first column in the segment, first column in y, columns).
// Grid (items, tiles of all modules of the input), THREADS threads.
template <class T>
__device__ void expand(Outputs<T> y, const float *h, i64 h_stride, const T *pool, const i64 *items, const i64 *tiles,
                       const i64 *offsets, const i64 *rank_start, i64 num_adapters, const float *scale,
                       const i64 *h_column) {
  const i64 *item = items + 3 * blockIdx.x, *tile = tiles + 5 * blockIdx.y;
  const i64 adapter = item[0], module = tile[0];
  const i64 *start = rank_start + module * (num_adapters + 1) + adapter;
  const int rank = static_cast<int>(start[1] - start[0]);
  if (rank == 0) return;
  expand_tile(y.of(module), y.stride(module), h, h_stride, h_column[module], pool, item, tile,
              offsets + tile[1] + start[0], rank, scale[module * num_adapters + adapter]);
}

// Decode steps that are captured once and replayed: which adapters a step has stands in device memory only. An item is
// (where its adapter's descriptor begins in `directory`, first token, tokens); padding has no tokens. A descriptor has
// at `field` where a layer's block for one input begins, from the descriptor's start, or 0. A block has, for each module
// of the input, its rank; then each scale, a float's bits; then the offsets of all rows of A, segment by segment; then
// those of B, module by module and segment by segment.
__device__ inline const i64 *block_of(const i64 *directory, const i64 *item, i64 field) {
  const i64 *record = directory + item[0];
  return item[2] && record[field] ? record + record[field] : nullptr;
}

// Row r of the adapter goes to column r of h. Grid (items, any), WARPS × 32 threads: warps take further rows by turns.
template <class T>
__device__ void recorded_shrink(const T *x, i64 x_stride, const T *pool, const i64 *items, const i64 *directory,
                                i64 field, i64 num_modules, const i64 *segments, i64 num_segments, float *h,
                                i64 h_stride) {
  const i64 *item = items + 3 * blockIdx.x, *block = block_of(directory, item, field);
  if (!block) return;
  i64 num_rows = 0;
  for (i64 m = 0; m < num_modules; m++) num_rows += block[m];
  const i64 *offsets = block + 2 * num_modules;
  for (i64 row = blockIdx.y * WARPS + threadIdx.x / 32; row < num_rows; row += gridDim.y * WARPS)
    shrink_row(x, x_stride, pool, item, row, offsets, num_rows, segments, num_segments, row, h, h_stride);
}

// A tile is (module, number of the segment in it, first column in the segment, first column in y, columns).
// `module_segments`: of each module's B. Grid (items, tiles), THREADS threads.
template <class T>
__device__ void recorded_expand(Outputs<T> y, const float *h, i64 h_stride, const T *pool, const i64 *items,
                                const i64 *tiles, const i64 *directory, i64 field, i64 num_modules, i64 num_segments,
                                const i64 *module_segments) {
  const i64 *item = items + 3 * blockIdx.x, *tile = tiles + 5 * blockIdx.y, *block = block_of(directory, item, field);
  if (!block) return;
  const i64 module = tile[0], rank = block[module];
  if (rank == 0) return;
  i64 num_rows = 0, h_column = 0, at = tile[1] * rank;
  for (i64 m = 0; m < num_modules; m++) {
    num_rows += block[m];
    if (m < module) h_column += block[m], at += module_segments[m] * block[m];
  }
  const float scale = __uint_as_float(static_cast<unsigned>(block[num_modules + module]));
  expand_tile(y.of(module), y.stride(module), h, h_stride, h_column, pool, item, tile,
              block + 2 * num_modules + num_segments * num_rows + at, static_cast<int>(rank), scale);
}

#define LORAY_DEFINE(suffix, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(WARPS * 32, SHRINK_BLOCKS) lora_shrink_##suffix(                        \
      const T *x, i64 x_stride, const T *pool, const i64 *items, const i64 *row_start, const i64 *offsets,             \
      i64 num_rows, const i64 *segments, i64 num_segments, const i64 *column, float *h, i64 h_stride) {                \
    shrink<T>(x, x_stride, pool, items, row_start, offsets, num_rows, segments, num_segments, column, h, h_stride);    \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS, EXPAND_BLOCKS) lora_expand_##suffix(                           \
      T *y0, T *y1, T *y2, i64 stride0, i64 stride1, i64 stride2, const float *h, i64 h_stride, const T *pool,         \
      const i64 *items, const i64 *tiles, const i64 *offsets, const i64 *rank_start, i64 num_adapters,                 \
      const float *scale, const i64 *h_column) {                                                                       \
    expand<T>({y0, y1, y2, stride0, stride1, stride2}, h, h_stride, pool, items, tiles, offsets, rank_start,           \
              num_adapters, scale, h_column);                                                                          \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(WARPS * 32, SHRINK_BLOCKS) lora_recorded_shrink_##suffix(               \
      const T *x, i64 x_stride, const T *pool, const i64 *items, const i64 *directory, i64 field, i64 num_modules,     \
      const i64 *segments, i64 num_segments, float *h, i64 h_stride) {                                                 \
    recorded_shrink<T>(x, x_stride, pool, items, directory, field, num_modules, segments, num_segments, h, h_stride);  \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS, EXPAND_BLOCKS) lora_recorded_expand_##suffix(                  \
      T *y0, T *y1, T *y2, i64 stride0, i64 stride1, i64 stride2, const float *h, i64 h_stride, const T *pool,         \
      const i64 *items, const i64 *tiles, const i64 *directory, i64 field, i64 num_modules, i64 num_segments,          \
      const i64 *module_segments) {                                                                                    \
    recorded_expand<T>({y0, y1, y2, stride0, stride1, stride2}, h, h_stride, pool, items, tiles, directory, field,     \
                       num_modules, num_segments, module_segments);                                                    \
  }                                                                                                                    \
  LORAY_EXPORT(lora_shrink_##suffix)                                                                                   \
  LORAY_EXPORT(lora_expand_##suffix)                                                                                   \
  LORAY_EXPORT(lora_recorded_shrink_##suffix)                                                                          \
  LORAY_EXPORT(lora_recorded_expand_##suffix)

LORAY_DEFINE(bf16, bf16)
LORAY_DEFINE(fp16, fp16)
LORAY_DEFINE(fp32, float)
