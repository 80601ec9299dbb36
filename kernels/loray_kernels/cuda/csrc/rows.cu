// Rows: RoPE, new keys and values into the cache, embedding rows of adapters, host pages into blocks, DoRA's scales.
#include "device.cuh"

constexpr int THREADS = 128;

// As the value is when it has been stored.
template <class T> __device__ inline float rounded(float v) {
  T there;
  store(&there, v);
  return to_float(there);
}

// y = q and cache[slot, K] = k, their halves rotated: x · cos + (−x₂, x₁) · sin, each product rounded as in the
// reference; cache[slot, V] = v. A negative slot is padding. A warp for a head: those of queries, then those of keys with
// their values. Grid (tokens, tiles of heads), THREADS threads.
template <class T>
__device__ void rope_kv(const T *q, i64 q_stride, i64 num_q, T *y, const T *k, i64 k_stride, const T *v, i64 v_stride,
                        i64 num_kv, const T *cos, const T *sin, i64 half, T *pool, i64 block_stride, i64 block_tokens,
                        const i64 *slots) {
  const i64 token = blockIdx.x, head = blockIdx.y * (THREADS / 32) + threadIdx.x / 32, d = 2 * half;
  const int lane = threadIdx.x % 32;
  if (head >= num_q + num_kv) return;
  const T *from = q + token * q_stride + head * d;
  T *to = y + (token * num_q + head) * d;
  if (head >= num_q) {
    const i64 slot = slots[token], at = (head - num_q) * d, width = num_kv * d;
    if (slot < 0) return;
    from = k + token * k_stride + at;
    to = pool + slot / block_tokens * block_stride + slot % block_tokens * width + at;
    for (i64 i = lane; i < d; i += 32) to[block_tokens * width + i] = v[token * v_stride + at + i];
  }
  cos += token * d, sin += token * d;
  for (i64 i = lane; i < half; i += 32) {
    const float first = to_float(from[i]), second = to_float(from[i + half]);
    const float left = rounded<T>(__fmul_rn(first, to_float(cos[i])));
    const float right = rounded<T>(__fmul_rn(second, to_float(cos[i + half])));
    store(to + i, __fadd_rn(left, -rounded<T>(__fmul_rn(second, to_float(sin[i])))));
    store(to + i + half, __fadd_rn(right, rounded<T>(__fmul_rn(first, to_float(sin[i + half])))));
  }
}

// y[tokens[n]] = row n of the pool; a negative offset is skipped. Grid (rows, segments), THREADS threads.
template <class T>
__device__ void take_rows(T *y, i64 y_stride, const i64 *tokens, const T *pool, const i64 *offsets, i64 num_rows,
                          const i64 *segments) {
  const i64 at = offsets[blockIdx.y * num_rows + blockIdx.x];
  if (at < 0) return;
  const T *from = pool + at;
  T *to = y + tokens[blockIdx.x] * y_stride + segments[2 * blockIdx.y];
  for (i64 i = threadIdx.x; i < segments[2 * blockIdx.y + 1]; i += THREADS) to[i] = from[i];
}

// pool[to : to + length] = pages[from : from + length] for each piece (from, to, length); pieces do not overlap. `pages`
// is memory of the device or pinned memory of the host. Grid (pieces), THREADS threads.
template <class T> __device__ void place_pages(T *pool, const T *pages, const i64 *pieces) {
  const i64 *piece = pieces + 3 * blockIdx.x;
  const T *from = pages + piece[0];
  T *to = pool + piece[1];
  const i64 whole = aligned(from, 16) && aligned(to, 16) ? piece[2] * sizeof(T) / 16 : 0;
  for (i64 i = threadIdx.x; i < whole; i += THREADS)
    reinterpret_cast<uint4 *>(to)[i] = reinterpret_cast<const uint4 *>(from)[i];
  for (i64 i = whole * 16 / sizeof(T) + threadIdx.x; i < piece[2]; i += THREADS) to[i] = from[i];
}

// y[t, o] += row[o] · (y[t, o] − bias[o]) in recorded steps. `rows` as in vera.cu; `bias` may be null. A tile is (word,
// first column in the row's segment, first column in y, columns). Grid (tokens, tiles), THREADS threads.
template <class T>
__device__ void scale_recorded(T *y, i64 y_stride, const T *bias, const T *pool, const i64 *rows, i64 num_tokens,
                               const i64 *tiles) {
  const i64 token = blockIdx.x, *tile = tiles + 4 * blockIdx.y, at = rows[tile[0] * num_tokens + token];
  if (at < 0) return;
  for (i64 c = threadIdx.x; c < tile[3]; c += THREADS) {
    T *to = y + token * y_stride + tile[2] + c;
    const float value = to_float(*to), plain = bias ? value - to_float(bias[tile[2] + c]) : value;
    store(to, value + to_float(pool[at + tile[1] + c]) * plain);
  }
}

#define LORAY_DEFINE(suffix, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      rope_kv_##suffix(const T *q, i64 q_stride, i64 num_q, T *y, const T *k, i64 k_stride, const T *v, i64 v_stride,  \
                       i64 num_kv, const T *cos, const T *sin, i64 half, T *pool, i64 block_stride,                    \
                       i64 block_tokens, const i64 *slots) {                                                           \
    rope_kv<T>(q, q_stride, num_q, y, k, k_stride, v, v_stride, num_kv, cos, sin, half, pool, block_stride,            \
               block_tokens, slots);                                                                                   \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      take_rows_##suffix(T *y, i64 y_stride, const i64 *tokens, const T *pool, const i64 *offsets, i64 num_rows,       \
                         const i64 *segments) {                                                                        \
    take_rows<T>(y, y_stride, tokens, pool, offsets, num_rows, segments);                                              \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      place_pages_##suffix(T *pool, const T *pages, const i64 *pieces) {                                               \
    place_pages<T>(pool, pages, pieces);                                                                               \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      scale_recorded_##suffix(T *y, i64 y_stride, const T *bias, const T *pool, const i64 *rows, i64 num_tokens,       \
                              const i64 *tiles) {                                                                      \
    scale_recorded<T>(y, y_stride, bias, pool, rows, num_tokens, tiles);                                               \
  }                                                                                                                    \
  LORAY_EXPORT(rope_kv_##suffix)                                                                                       \
  LORAY_EXPORT(take_rows_##suffix)                                                                                     \
  LORAY_EXPORT(place_pages_##suffix)                                                                                   \
  LORAY_EXPORT(scale_recorded_##suffix)

LORAY_DEFINE(bf16, bf16)
LORAY_DEFINE(fp16, fp16)
LORAY_DEFINE(fp32, float)
