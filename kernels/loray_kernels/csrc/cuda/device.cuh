// Element types, conversions and loads that the kernels share.
//
// No toolkit header: NVRTC compiles these files by themselves, and the tests' shim runs them on a CPU.
// Every integer argument of a kernel is 64 bits wide, as CuPy passes Python's integers.
#pragma once
#ifdef LORAY_SHIM
#include "shim.h"
#else
#define LORAY_EXPORT(kernel)
#endif

typedef long long i64;

struct bf16 {
  unsigned short bits;
};
struct fp16 {
  unsigned short bits;
};

__device__ inline float to_float(float v) { return v; }
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

// Round to nearest even, as torch does.
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

template <class T> __device__ inline T element(unsigned word, int half);
template <> __device__ inline bf16 element(unsigned word, int half) {
  return {static_cast<unsigned short>(word >> (16 * half))};
}
template <> __device__ inline fp16 element(unsigned word, int half) {
  return {static_cast<unsigned short>(word >> (16 * half))};
}

template <class T> __device__ inline bool aligned(const T *p, int bytes) {
  return (reinterpret_cast<unsigned long long>(p) & (bytes - 1)) == 0;
}

// Eight elements, `valid` of which exist; the others are zero. What is loaded at once depends on `wide` (p stands on 16
// bytes), which lane gets which element does not: sums come out the same wherever a row stands.
template <class T> __device__ inline void load8(const T *p, i64 valid, bool wide, float (&out)[8]) {
  if (wide && valid >= 8) {
    const uint4 w = *reinterpret_cast<const uint4 *>(p);
    const unsigned words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = to_float(element<T>(words[i / 2], i % 2));
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = i < valid ? to_float(p[i]) : 0.0f;
  }
}
template <> __device__ inline void load8(const float *p, i64 valid, bool wide, float (&out)[8]) {
  if (wide && valid >= 8) {
    const float4 a = *reinterpret_cast<const float4 *>(p), b = *reinterpret_cast<const float4 *>(p + 4);
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = i < valid ? p[i] : 0.0f;
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
