// Element types, conversions and loads that the kernels share.
//
// No toolkit headers: NVRTC compiles these files alone, and the tests' shim runs them on a CPU.
// Every integer argument of a kernel is 64 bits wide, because CuPy passes Python's integers so.
#pragma once
#ifdef LORAY_SHIM
#include "shim.h"
#else
#define LORAY_EXPORT(kernel)
#endif

typedef long long i64;

constexpr float LOWEST = -3.402823466e38f; // INFINITY is in a toolkit header

struct bf16 {
  unsigned short bits;
};
struct fp16 {
  unsigned short bits;
};

__device__ constexpr bool is_bf16(bf16) { return true; }
__device__ constexpr bool is_bf16(fp16) { return false; }

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(signed char v) { return v; }
__device__ inline float to_float(bf16 v) { return __uint_as_float(static_cast<unsigned>(v.bits) << 16); }
__device__ inline float to_float(fp16 v) {
#ifdef LORAY_SHIM
  return shim::half_to_float(v.bits);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
#endif
}

// Rounds to nearest even, as torch does.
__device__ inline void store(float *p, float v) { *p = v; }
__device__ inline void store(bf16 *p, float v) {
  unsigned u = __float_as_uint(v);
  p->bits = v != v ? 0x7fff : static_cast<unsigned short>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
__device__ inline void store(fp16 *p, float v) {
#ifdef LORAY_SHIM
  p->bits = shim::float_to_half(v);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(v));
#endif
}

template <class T> __device__ inline bool aligned(const T *p, int bytes) {
  return (reinterpret_cast<unsigned long long>(p) & (bytes - 1)) == 0;
}

__device__ inline float unpack(const unsigned *words, int i, float) { return __uint_as_float(words[i]); }
__device__ inline float unpack(const unsigned *words, int i, signed char) {
  return static_cast<signed char>(words[i / 4] >> (8 * (i % 4)) & 0xff);
}
template <class T> __device__ inline float unpack(const unsigned *words, int i, T) {
  return to_float(T{static_cast<unsigned short>(words[i / 2] >> (16 * (i % 2)))});
}

// N elements, of which `valid` exist; the others are zero. `wide`: p is aligned to N elements or to 16 bytes. `wide`
// decides how many elements are loaded at once, not which thread has which element, so sums do not depend on alignment.
template <int N, class T> __device__ inline void load(const T *p, i64 valid, bool wide, float (&out)[N]) {
  constexpr int WORDS = N * sizeof(T) / 4;
  if (wide && valid >= N) {
    unsigned words[WORDS];
    if constexpr (WORDS == 1) {
      words[0] = *reinterpret_cast<const unsigned *>(p);
    } else if constexpr (WORDS == 2) {
      const uint2 w = *reinterpret_cast<const uint2 *>(p);
      words[0] = w.x, words[1] = w.y;
    } else {
#pragma unroll
      for (int i = 0; i < WORDS; i += 4) {
        const uint4 w = *reinterpret_cast<const uint4 *>(p + i * 4 / sizeof(T));
        words[i] = w.x, words[i + 1] = w.y, words[i + 2] = w.z, words[i + 3] = w.w;
      }
    }
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = unpack(words, i, T{});
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = i < valid ? to_float(p[i]) : 0.0f;
  }
}

// sum[t] += Σ_k a[k] · x[t · x_stride + k] over the elements that a lane of a warp has, for the first `count` tokens.
template <int TOKENS, class T>
__device__ inline void add_products(const T *a, const T *x, i64 x_stride, i64 width, int count, float (&sum)[TOKENS]) {
  const bool wide_a = aligned(a, 16), wide_x = aligned(x, 16) && x_stride * sizeof(T) % 16 == 0;
  for (i64 k = threadIdx.x % 32 * 8; k < width; k += 256) {
    float weight[8];
    load(a + k, width - k, wide_a, weight);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      if (t < count) {
        float value[8];
        load(x + t * x_stride + k, width - k, wide_x, value);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[t] += value[i] * weight[i];
      }
    }
  }
}

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int lane = 16; lane; lane >>= 1) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}
__device__ inline float warp_max(float v) {
#pragma unroll
  for (int lane = 16; lane; lane >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lane));
  return v;
}
