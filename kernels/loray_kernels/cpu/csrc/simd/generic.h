// The compiler's own vectors, which become NEON on ARM and SSE2 on x86-64. In memory and in registers the lowest lane
// comes first. simd.h includes this in its namespace.
#pragma once

constexpr int W = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(16)));

static inline Vec set1(float x) { return Vec{x, x, x, x}; }
static inline Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
// The first four, each as the upper half of a lane.
static inline Vec widen_(Halves x) { return (Vec)__builtin_shufflevector(Halves{}, x, 0, 8, 1, 9, 2, 10, 3, 11); }
static inline Vec load(const bf16* p) {
    typedef uint64_t Words __attribute__((vector_size(16)));
    uint64_t four;
    memcpy(&four, p, sizeof four);
    return widen_((Halves)Words{four, 0});
}
static inline Vec load(const int8_t* p) {
    typedef int8_t Bytes __attribute__((vector_size(4)));
    Bytes four;
    memcpy(&four, p, sizeof four);
    return __builtin_convertvector(four, Vec);
}
static inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
// bf16 in the upper half of each lane; the lower half is left over.
static inline Bits rounded_(Vec v) {
    const Bits bits = (Bits)v, even = bits + (bits >> 16 & 1) + 0x7fff, nan = bits | 0x400000;
    return v == v ? even : nan;
}
static inline void store(bf16* p, Vec v) {
    const Halves halves = (Halves)rounded_(v);
#if defined(__SSE2__)  // whose shuffles go by whole vectors of bytes only from SSSE3 on
    const __m128i upper = _mm_packs_epi32(_mm_srai_epi32((__m128i)halves, 16), __m128i{});
#else
    const Halves upper = __builtin_shufflevector(halves, halves, 1, 3, 5, 7, 1, 3, 5, 7);
#endif
    memcpy(p, &upper, W * sizeof(bf16));
}
static inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__aarch64__)
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
static inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
static inline float sum(Vec v) {
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
    return v[0] + v[1];
}
static inline float largest(Vec v) {
    v = max(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
    return v[0] > v[1] ? v[0] : v[1];
}
static inline Vec scale2(Vec p, Vec n) {
    typedef int32_t Integers __attribute__((vector_size(16)));
    return p * (Vec)((__builtin_convertvector(n, Integers) + 127) << 23);
}
static inline Vec lower(Vec two) { return (Vec)((Bits)two << 16); }
static inline Vec upper(Vec two) { return (Vec)((Bits)two & 0xffff0000); }
template <int n>
static inline Vec byte(Vec four) {
    typedef int32_t Integers __attribute__((vector_size(16)));
    return __builtin_convertvector((Integers)((Bits)four << (24 - 8 * n)) >> 24, Vec);
}
static inline Vec where(uint32_t bits, Vec x, Vec other) {
    return (Bits{bits, bits, bits, bits} & Bits{1, 2, 4, 8}) != 0 ? x : other;
}
