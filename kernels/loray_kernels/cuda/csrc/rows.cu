// Rows: norms, SwiGLU, RoPE with new keys and values into the cache, embedding rows of adapters, host pages into blocks,
// scales of outputs, activations to int8 and float8 and sums of integers back.
#include "device.cuh"

constexpr int THREADS = 128;
constexpr int NORM_THREADS = 256;

// As the value is when it has been stored.
template <class T> __device__ inline float rounded(float v) {
  T there;
  store(&there, v);
  return to_float(there);
}

// x / rms(x) · weight, of rows of `width` elements, `num_heads` of each token; the normalised value is rounded before it
// is multiplied, as in the reference; with an `offset` the weight is offset + weight, and only the product is rounded.
// Where `added` is given, x + added takes the place of x, and is written to `total`.
// A token's `own_row` is −1, or the row of the pool that is its weight; null: no token has one. A row has `lanes` threads,
// a warp or all. Grid (rows by blocks), NORM_THREADS threads.
template <class T>
__device__ void rms_norm(const T *x, i64 x_stride, const T *added, i64 added_stride, T *total, const T *weight, T *y,
                         i64 num_rows, i64 num_heads, i64 width, float eps, float offset, i64 lanes, const T *pool,
                         const i64 *own_row, const i64 *offsets, i64 num_own, const i64 *segments, i64 num_segments) {
  __shared__ float sums[NORM_THREADS / 32];
  const i64 row = blockIdx.x * (NORM_THREADS / lanes) + threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const i64 token = row / num_heads, at = row % num_heads * width;
  const bool is_there = row < num_rows;
  const T *from = x + token * x_stride + at;
  float sum = 0.0f;
  if (is_there) {
#pragma unroll 4
    for (i64 i = lane; i < width; i += lanes) {
      float value = to_float(from[i]);
      if (added) {
        value = rounded<T>(value + to_float(added[token * added_stride + at + i]));
        store(total + row * width + i, value);
      }
      sum += value * value;
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (lanes > 32) {
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < NORM_THREADS / 32; w++) sum += sums[w];
  }
  if (!is_there) return;
  const float factor = 1.0f / sqrtf(sum / static_cast<float>(width) + eps);
  if (added) from = total + row * width;
  const i64 own = own_row ? own_row[token] : -1;
  for (i64 s = 0; s < (own < 0 ? 1 : num_segments); s++) {
    const i64 start = own < 0 ? 0 : segments[2 * s], columns = own < 0 ? width : segments[2 * s + 1];
    const T *w = own < 0 ? weight : pool + offsets[s * num_own + own];
#pragma unroll 4
    for (i64 i = lane; i < columns; i += lanes) {
      const float normal = to_float(from[start + i]) * factor, own_weight = to_float(w[i]);
      store(y + row * width + start + i,
            offset != 0.0f ? (offset + own_weight) * normal : own_weight * rounded<T>(normal));
    }
  }
}

// g σ(g) · up of the gate g, or GELU's approximation by tanh, which is g σ(2a) · up with a = √(2/π) (g + 0.044715 g³);
// the first factor rounded as in the reference. Grid (tokens, tiles of 8 · THREADS columns).
template <bool IS_GELU, class T> __device__ void gated(const T *gate_up, i64 stride, T *y, i64 width) {
  const T *gate = gate_up + blockIdx.x * stride;
#pragma unroll
  for (int n = 0; n < 8; n++) {
    const i64 i = (blockIdx.y * 8 + n) * static_cast<i64>(THREADS) + threadIdx.x;
    if (i >= width) return;
    const float value = to_float(gate[i]);
    const float argument = IS_GELU ? 1.5957691216f * (value + 0.044715f * value * value * value) : value;
    const float activated = rounded<T>(value / (1.0f + expf(-argument)));
    store(y + blockIdx.x * width + i, activated * to_float(gate[width + i]));
  }
}

// float8_e4m3fn of a value up to 448, to nearest even.
__device__ inline unsigned to_float8(float v) {
  const unsigned bits = __float_as_uint(v), sign = bits >> 24 & 0x80, u = bits & 0x7fffffff;
  if (u < 0x3c800000) return sign | static_cast<unsigned>(rintf(__uint_as_float(u) * 512.0f)); // below 2⁻⁶: steps of 2⁻⁹
  const unsigned rounded = u + 0x7ffff + (u >> 20 & 1);
  return sign | ((rounded >> 23) - 120) << 3 | (rounded >> 20 & 7);
}

// q and scales of rows, as `quantize_rows` of reference.py has them: int8 with `most` 127, float8_e4m3fn with 448. Grid
// (rows), NORM_THREADS threads.
template <class T>
__device__ void quantize_rows(const T *x, i64 x_stride, i64 width, float most, unsigned char *q, float *scales) {
  __shared__ unsigned largest[NORM_THREADS / 32];
  const T *from = x + blockIdx.x * x_stride;
  unsigned bits = 0; // of |x|, which are in the order of the values, and those that are not finite above all
  for (i64 i = threadIdx.x; i < width; i += NORM_THREADS)
    bits = max(bits, __float_as_uint(to_float(from[i])) & 0x7fffffffu);
#pragma unroll
  for (int lane = 16; lane; lane >>= 1) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, lane));
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = bits;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < NORM_THREADS / 32; w++) bits = max(bits, largest[w]);
  const bool is_finite = bits < 0x7f800000u;
  const float value = __uint_as_float(bits), inverse = is_finite && value >= 1e-30f ? most / value : 0.0f;
  for (i64 i = threadIdx.x; i < width; i += NORM_THREADS) {
    const float scaled = is_finite ? max(-most, min(most, to_float(from[i]) * inverse)) : 0.0f;
    q[blockIdx.x * width + i] = most == 127.0f ? static_cast<int>(rintf(scaled)) & 0xff : to_float8(scaled);
  }
  if (threadIdx.x == 0) scales[blockIdx.x] = is_finite ? value / most : __uint_as_float(0x7fc00000u);
}

// y = sum · column's scale · row's scale + bias, in this order; `bias` may be null. Grid (rows, tiles of 8 · THREADS
// columns), THREADS threads.
template <class T>
__device__ void scale_sums(const int *sums, const float *of_columns, const float *of_rows, const T *bias, T *y,
                           i64 width) {
  const float of_row = of_rows[blockIdx.x];
#pragma unroll
  for (int n = 0; n < 8; n++) {
    const i64 i = (blockIdx.y * 8 + n) * static_cast<i64>(THREADS) + threadIdx.x;
    if (i >= width) return;
    const float scaled = __fmul_rn(__fmul_rn(static_cast<float>(sums[blockIdx.x * width + i]), of_columns[i]), of_row);
    store(y + blockIdx.x * width + i, bias ? __fadd_rn(scaled, to_float(bias[i])) : scaled);
  }
}

// The scale of a head's elements, which each(put) gives to put(i, value), a part of them in each lane of a warp; and
// `to`, these rounded, as `quantize_rows` of reference.py has both.
template <class Each> __device__ float quantize_head(Each each, signed char *to) {
  unsigned bits = 0; // as in quantize_rows
  each([&](i64, float v) { bits = max(bits, __float_as_uint(v) & 0x7fffffffu); });
#pragma unroll
  for (int lane = 16; lane; lane >>= 1) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, lane));
  const bool is_finite = bits < 0x7f800000u;
  const float value = __uint_as_float(bits), inverse = is_finite && value >= 1e-30f ? 127.0f / value : 0.0f;
  each([&](i64 i, float v) { to[i] = is_finite ? static_cast<signed char>(rintf(v * inverse)) : 0; });
  return is_finite ? value / 127.0f : __uint_as_float(0x7fc00000u);
}

// y = q and cache[slot, K] = k, the halves of the first 2 · `half` elements of each head, of d, rotated: x · cos +
// (−x₂, x₁) · sin, each product rounded as in the reference; cache[slot, V] = v. A negative slot is padding. A warp for a
// head: those of queries, then those of keys with their values; in a cache of int8, which has scales, see KvLayout, then
// those of values. Grid (tokens, tiles of heads), THREADS threads.
template <class T, class Q>
__device__ void rope_kv(const T *q, i64 q_stride, i64 num_q, T *y, const T *k, i64 k_stride, const T *v, i64 v_stride,
                        i64 num_kv, const T *cos, const T *sin, i64 half, i64 d, Q *pool, i64 block_stride,
                        i64 block_tokens, const i64 *slots) {
  constexpr bool IS_INT8 = sizeof(Q) == 1;
  const i64 token = blockIdx.x, head = blockIdx.y * (THREADS / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (head >= num_q + (IS_INT8 ? 2 : 1) * num_kv) return;
  cos += token * 2 * half, sin += token * 2 * half;
  const auto each_turned = [&](const T *from, auto put) {
    for (i64 i = lane; i < half; i += 32) {
      const float first = to_float(from[i]), second = to_float(from[i + half]);
      const float left = rounded<T>(__fmul_rn(first, to_float(cos[i])));
      const float right = rounded<T>(__fmul_rn(second, to_float(cos[i + half])));
      put(i, __fadd_rn(left, -rounded<T>(__fmul_rn(second, to_float(sin[i])))));
      put(i + half, __fadd_rn(right, rounded<T>(__fmul_rn(first, to_float(sin[i + half])))));
    }
    for (i64 i = 2 * half + lane; i < d; i += 32) put(i, to_float(from[i]));
  };
  const T *from = q + token * q_stride + head * d;
  T *to = y + (token * num_q + head) * d;
  if (head >= num_q) {
    const i64 slot = slots[token], row = head - num_q, width = num_kv * d;
    if (slot < 0) return;
    const i64 number = slot / block_tokens, position = slot - number * block_tokens;
    if constexpr (IS_INT8) {
      const bool is_value = row >= num_kv;
      const i64 at = (is_value ? row - num_kv : row) * d;
      Q *const block = pool + number * block_stride;
      float *const scales = reinterpret_cast<float *>(block + 2 * block_tokens * width) + row * block_tokens;
      from = is_value ? v + token * v_stride + at : k + token * k_stride + at;
      if (is_value) half = 0;
      const auto each = [&](auto put) {
        each_turned(from, [&](i64 i, float x) { put(i, rounded<T>(x)); });
      };
      const float scale = quantize_head(each, block + (is_value ? block_tokens + position : position) * width + at);
      if (lane == 0) scales[position] = scale;
      return;
    } else {
      from = k + token * k_stride + row * d;
      to = pool + number * block_stride + position * width + row * d;
      for (i64 i = lane; i < d; i += 32) to[block_tokens * width + i] = v[token * v_stride + row * d + i];
    }
  }
  each_turned(from, [&](i64 i, float x) { store(to + i, x); });
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

// y[t, o] += row[o] · (y[t, o] − bias[o]) in captured steps, without the bias, or RoAd's pairs, as the word of a token's
// descriptor says: words[starts[t]], see descriptors.py. `rows` as in vera.cu; `bias` may be null. A tile is (word of the
// scales, first column in the row's segment, first column in y, columns), and then, of the module, (the words of the
// first segments of scales and turns, the columns of a segment, the first column in the module). Grid (tokens, tiles),
// THREADS threads.
template <class T>
__device__ void scale_recorded(T *y, i64 y_stride, const T *bias, const T *pool, const i64 *rows, i64 num_tokens,
                               const i64 *tiles, const i64 *words, const i64 *starts) {
  const i64 token = blockIdx.x, *tile = tiles + 8 * blockIdx.y, at = rows[tile[0] * num_tokens + token];
  if (at < 0) return;
  const i64 scaling = words[starts[token]];
  T *const to = y + token * y_stride + tile[2];
  if (scaling <= 0) {
    for (i64 c = threadIdx.x; c < tile[3]; c += THREADS) {
      const float value = to_float(to[c]);
      const float plain = bias && scaling == 0 ? value - to_float(bias[tile[2] + c]) : value;
      store(to + c, value + to_float(pool[at + tile[1] + c]) * plain);
    }
    return;
  }
  // The thread of the first of a pair computes both, so that none reads what another has written.
  const auto of = [&](i64 word, i64 column) {
    return to_float(pool[rows[(word + column / tile[6]) * num_tokens + token] + column % tile[6]]);
  };
  for (i64 c = threadIdx.x; c < tile[3]; c += THREADS) {
    const i64 a = tile[7] + c, b = a + scaling;
    if (a / scaling % 2) continue;
    const float ya = to_float(to[c]), yb = to_float(to[c + scaling]);
    store(to + c, ya + of(tile[4], a) * ya + of(tile[5], a) * yb);
    store(to + c + scaling, yb + of(tile[4], b) * yb + of(tile[5], b) * ya);
  }
}

#define LORAY_DEFINE(suffix, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(NORM_THREADS)                                                           \
      rms_norm_##suffix(const T *x, i64 x_stride, const T *added, i64 added_stride, T *total, const T *weight, T *y,   \
                        i64 num_rows, i64 num_heads, i64 width, float eps, float offset, i64 lanes, const T *pool,     \
                        const i64 *own_row, const i64 *offsets, i64 num_own, const i64 *segments, i64 num_segments) {  \
    rms_norm<T>(x, x_stride, added, added_stride, total, weight, y, num_rows, num_heads, width, eps, offset, lanes,    \
                pool, own_row, offsets, num_own, segments, num_segments);                                              \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      silu_mul_##suffix(const T *gate_up, i64 stride, T *y, i64 width) {                                               \
    gated<false, T>(gate_up, stride, y, width);                                                                        \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      gelu_mul_##suffix(const T *gate_up, i64 stride, T *y, i64 width) {                                               \
    gated<true, T>(gate_up, stride, y, width);                                                                         \
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
                              const i64 *tiles, const i64 *words, const i64 *starts) {                                 \
    scale_recorded<T>(y, y_stride, bias, pool, rows, num_tokens, tiles, words, starts);                                \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(NORM_THREADS)                                                           \
      quantize_rows_##suffix(const T *x, i64 x_stride, i64 width, float most, unsigned char *q, float *scales) {       \
    quantize_rows<T>(x, x_stride, width, most, q, scales);                                                             \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      scale_sums_##suffix(const int *sums, const float *of_columns, const float *of_rows, const T *bias, T *y,         \
                          i64 width) {                                                                                 \
    scale_sums<T>(sums, of_columns, of_rows, bias, y, width);                                                          \
  }                                                                                                                    \
  LORAY_EXPORT(quantize_rows_##suffix)                                                                                 \
  LORAY_EXPORT(scale_sums_##suffix)                                                                                    \
  LORAY_EXPORT(rms_norm_##suffix)                                                                                      \
  LORAY_EXPORT(silu_mul_##suffix)                                                                                      \
  LORAY_EXPORT(gelu_mul_##suffix)                                                                                      \
  LORAY_EXPORT(take_rows_##suffix)                                                                                     \
  LORAY_EXPORT(place_pages_##suffix)                                                                                   \
  LORAY_EXPORT(scale_recorded_##suffix)

#define LORAY_DEFINE_ROPE_KV(kind, suffix, T, Q)                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      rope_kv##kind##_##suffix(const T *q, i64 q_stride, i64 num_q, T *y, const T *k, i64 k_stride, const T *v,        \
                               i64 v_stride, i64 num_kv, const T *cos, const T *sin, i64 half, i64 d, Q *pool,         \
                               i64 block_stride, i64 block_tokens, const i64 *slots) {                                 \
    rope_kv<T, Q>(q, q_stride, num_q, y, k, k_stride, v, v_stride, num_kv, cos, sin, half, d, pool, block_stride,      \
                  block_tokens, slots);                                                                                \
  }                                                                                                                    \
  LORAY_EXPORT(rope_kv##kind##_##suffix)

LORAY_DEFINE(bf16, bf16)
LORAY_DEFINE(fp16, fp16)
LORAY_DEFINE(fp32, float)
LORAY_DEFINE_ROPE_KV(, bf16, bf16, bf16)
LORAY_DEFINE_ROPE_KV(, fp16, fp16, fp16)
LORAY_DEFINE_ROPE_KV(, fp32, float, float)
LORAY_DEFINE_ROPE_KV(_int8, bf16, bf16, signed char)
LORAY_DEFINE_ROPE_KV(_int8, fp16, fp16, signed char)
LORAY_DEFINE_ROPE_KV(_int8, fp32, float, signed char)
